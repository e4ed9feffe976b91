"""What every test shares: few threads, no network, fresh memory that holds NaN, and the assets where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: tests/test_triton.py

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models here are so small that threads only wait for each other (and workers share the cores)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and texts: $LINEARIZE_ASSETS, or ../shared/assets beside the project."""
    named = os.environ.get("LINEARIZE_ASSETS")
    folder = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"no assets folder at {named or '../shared/assets'} (set LINEARIZE_ASSETS)")
    return folder


@pytest.fixture
def poison():
    """torch.empty and its kin hold NaN."""
    from linearize.testing.laws import poisoned_memory

    with poisoned_memory():
        yield
