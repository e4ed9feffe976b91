"""The examples run, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from linearize.models import TEACHERS
from linearize.testing.pico import pico

EXAMPLES = Path(__file__).parent.parent / "examples"
STORY = "Once upon a time there was a {} who liked to sing. One day it met a friend, and they sang together. "
SMALL = ["--tokens", "1024"]
ARGUMENTS = {
    "convert.py": SMALL,
    "diffusion.py": ["--tokens", "4096", "--drawings", "16"],
    "encoder.py": ["bert", "sentences.txt", *SMALL],
    "own_data.py": ["stories.jsonl"],
    "passkey.py": [*SMALL, "--trials", "3"],
    "sea_maps.py": [*SMALL, "--keys", "64"],
    "trainer.py": ["3"],
    "vit.py": ["images.npz", *SMALL],
}


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_example(name, tmp_path):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 40
    animals = ["dog", "cat", "bird", "fish", "frog", "bear"]
    lines = [f'{{"text": "{STORY.format(a) * n}"}}' for a in animals for n in range(2, 6)]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    if name == "encoder.py":
        days = [f"Day {n}. {STORY.format(animal)}" for animal in animals for n in range(200)]
        (tmp_path / "sentences.txt").write_text("\n".join(days))
        pico("bert", vocab_size=2048, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
        AutoTokenizer.from_pretrained(TEACHERS / "text").save_pretrained(tmp_path / "bert")
    if name == "vit.py":
        images = np.random.default_rng(0).integers(0, 256, (400, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / "images.npz", images=images)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
    }
    run = [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "plug_in.py":
        assert "removed without a trace: True" in done.stdout
    if name == "lora_beside.py":
        changed = float(done.stdout.split("draws by ")[1].split()[0])
        assert changed > 1e-4 and "stays when CLEAR is gone: True" in done.stdout
    if name == "high_resolution.py":
        assert "one step at 16 x 16 tokens" in done.stdout and "drawn: (1, 256, 4)" in done.stdout
    if name == "decode_with_a_state.py":
        assert "the same as from the whole prompt: True" in done.stdout
    if name == "attention_pictures.py":
        assert (tmp_path / "attention.png").stat().st_size > 10_000
    if name == "sea_maps.py":
        assert "64 keys: perplexity" in done.stdout
        files = {path.name for path in (tmp_path / "sea" / "maps").iterdir()}
        assert files == {"maps.safetensors", *(f"layer-{n:02}.png" for n in range(5))}
    if name == "diffusion.py":
        assert "student" in done.stdout and "drawn by the student: (4, 1, 32, 32)" in done.stdout
    if name in ("encoder.py", "vit.py"):
        assert done.stdout.startswith("teacher") and "student" in done.stdout
