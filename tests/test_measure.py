"""Filing results: a table of its own for each recipe, and the baseline that is added to it afterwards."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import linearize
from linearize.report import schema
from linearize.types import InputError

SCRIPT = Path(linearize.__file__).parent.parent / "recipes" / "measure.py"
SMALL = [
    "data.length=64", "data.valid_tokens=512", "stages.transfer.tokens=256", "stages.transfer.batch=4",
    "stages.finetune.tokens=512", "stages.finetune.batch=4", "stages.finetune.lora.r=2", "method.mixer.window=0",
    "method.mixer.sinks=0", "eval.window=8", "eval.sinks=0", "eval.limit=4", "eval.generate=0",
    "eval.window_only=false",
]  # fmt: skip


def measure(monkeypatch, folder: Path, *words: str) -> schema.Result:
    """The file that recipes/measure.py leaves under `folder`."""
    script = folder / "recipes" / "measure.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPT.read_text())
    monkeypatch.setattr(sys, "argv", ["measure.py", "hedgehog/demo", "--work", str(folder / "runs"), *words])
    runpy.run_path(str(script), run_name="__main__")
    return schema.read(script.parent / "results" / "hedgehog" / "demo.json", schema.Result)


def test_a_trained_window_is_added_to_a_table_that_lacks_it(monkeypatch, tmp_path):
    text = tmp_path / "stories.jsonl"
    lines = [
        {"text": f"Once upon a time {i} little dogs ran to the park with ball {i * i} and came home. " * 8}
        for i in range(40)
    ]
    text.write_text("\n".join(map(json.dumps, lines)))
    given = ["--data", str(text), "--set", *SMALL]
    before = measure(monkeypatch, tmp_path, *given)
    assert before.row("window-only student") is None and before.trained_tokens == 768
    after = measure(monkeypatch, tmp_path, "--window-only", *given)
    row, untrained = after.row("window-only student"), after.row("zero-token window")
    assert row is not None and untrained is not None and row.nll != untrained.nll
    assert [r.name for r in after.rows] == [*(r.name for r in before.rows), "window-only student"]
    assert after.commit == before.commit and "seed 0, 768 tokens in float32, a run of its own at" in after.notes[-1]
    assert measure(monkeypatch, tmp_path, *given) == after  # filed: nothing is measured
    again = measure(monkeypatch, tmp_path, "--again", *given)  # the run that is kept is filed anew, with the window
    assert [r.name for r in again.rows] == [r.name for r in after.rows] and again.notes[-1] == after.notes[-1]
    with pytest.raises(InputError, match="holds the result of another plan"):  # and not passed off as another plan's
        measure(monkeypatch, tmp_path, "--again", *given, "stages.finetune.tokens=768")
    with pytest.raises(InputError, match="another teacher or another text"):
        measure(
            monkeypatch, tmp_path, "--work", str(tmp_path / "other"), "--window-only", *given, "data.valid_tokens=768"
        )
