"""The benchmark of operations: nothing wrong is timed, ratios are of turns, bars can be missed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linearize.evaluate import kernels
from linearize.report import races
from linearize.report.provenance import gather
from linearize.report.schema import Bench, Measure

SMALL = {"heads": 2, "dim": 8, "repeats": 2}


def test_times_every_contestant_and_knows_their_errors():
    table = kernels.compare([64, 100], **SMALL)
    names = [c.name for c in kernels.contestants(torch.device("cpu"))]
    assert set(table.rows) == {f"forward {name} {n}" for name in names for n in (64, 100)}
    for row in table.rows.values():
        assert row["low"] <= row["ms"] <= row["high"] and 0 <= row["error"] < 1e-5
    assert table.rows["forward sdpa 64"]["times_sdpa"] == 1
    both = kernels.compare([64], backward=True, **SMALL)
    assert set(both.rows) == {f"both {name} 64" for name in names}
    step = kernels.decode([100], heads=2, dim=8, repeats=2)
    assert set(step.rows) == {"decode sdpa 100", "decode mapped_linear 100"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_a_wrong_answer_gets_no_time(monkeypatch, backward):
    def wrong(x):
        return kernels._by_definition(x) + (x.v.detach() if not backward else 0.01 * x.q.sin())

    found = [
        replace(c, run=wrong) if c.name == "mapped_linear" else c for c in kernels.contestants(torch.device("cpu"))
    ]
    monkeypatch.setattr(kernels, "contestants", lambda *_: found)
    table = kernels.compare([64], backward=backward, **SMALL)
    assert not [row for row in table.rows if "mapped_linear" in row]
    assert any("WRONG" in note and "mapped_linear" in note for note in table.notes)


def test_who_is_slow_is_not_asked_for_more(monkeypatch):
    monkeypatch.setattr(kernels, "PATIENCE", 0.0)
    monkeypatch.setattr(kernels, "SLOW", 0.0)
    table = kernels.compare([32, 64], **SMALL)
    assert all(row.endswith(" 32") for row in table.rows) and any("not asked for more" in n for n in table.notes)


def test_who_needs_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(kernels, "ROOM", 1.0)
    table = kernels.compare([32], **SMALL)
    assert not [row for row in table.rows if "cumsum" in row] and any("would hold" in n for n in table.notes)


def test_crossing_lies_between_the_lengths_around_it():
    rows = {f"forward mapped_linear {n}": {"times_sdpa": n / 512} for n in (128, 256, 1024)}
    assert kernels.crossing(kernels.Table(rows)) == pytest.approx(512)
    assert kernels.crossing(kernels.Table({"forward mapped_linear 8": {"times_sdpa": 2.0}})) is None


def test_bars_are_met_or_missed():
    place = Path(__file__).parent.parent / "benchmarks" / "ops.py"
    spec = importlib.util.spec_from_file_location("ops_benchmark", place)
    ops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ops)
    good = {
        "forward mapped_linear 8192": {"times_sdpa": 6.5, "floor": 1.7},
        "both mapped_linear 8192": {"times_sdpa": 6.5, "floor": 2.1},
        "decode mapped_linear 65536": {"times_sdpa": 300.0},
    }
    assert ops.judge(good, 579)[0]
    for name, metric, value in (
        ("forward mapped_linear 8192", "times_sdpa", 5.9),
        ("forward mapped_linear 8192", "floor", 1.9),
        ("both mapped_linear 8192", "floor", 2.3),
        ("decode mapped_linear 65536", "times_sdpa", 199.0),
    ):
        assert not ops.judge({**good, name: {**good[name], metric: value}}, 579)[0]
    assert not ops.judge(good, 300)[0] and not ops.judge(good, 900)[0]


def test_a_benchmark_is_drawn_with_what_it_has():
    table = kernels.compare([32, 64], **SMALL)
    share = table.rows["forward mapped_linear 64"]
    assert share["flops_share"] > 0 and share["bytes_share"] > 0
    assert share["flops_share"] * share["floor"] == pytest.approx(1, rel=1)
    provenance = gather(device="cpu")
    bench = Bench(
        **provenance, name="ops", settings={}, units=kernels.UNITS,
        rows=[Measure(name=name, metrics=row) for name, row in table.rows.items()],
    )  # fmt: skip
    field = races.lines(bench, "forward")
    assert set(field) == {c.name for c in kernels.contestants(torch.device("cpu"))}
    assert [tokens for tokens, _ in field["separate maps"]] == [32, 64]
    bare = bench.model_copy(update={"rows": [Measure(name="forward sdpa 64", metrics={"ms": 1.0})]})
    pictures = [races.race(bench, even=50.0), races.race(bench), races.race(bare)]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len(set(pictures)) == 3


def test_peers_that_are_not_there_are_named(monkeypatch):
    def gone():
        raise ImportError("no module named qwen3_next")

    monkeypatch.setattr(kernels.peers.hf, "chunked_delta_rule", gone)
    table = kernels.compare([32], **SMALL)
    assert "forward qwen3_next, minimax: left out, no module named qwen3_next" in table.notes
    assert not any("minimax" in row for row in table.rows)
