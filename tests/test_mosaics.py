"""Mosaics: what is counted as a picture, and what of count and placement is kept."""

from __future__ import annotations

import json

import pytest
import torch

from linearize import api
from linearize.evaluate import drawings, mosaics
from linearize.evaluate.mosaics import NOTHING, Layout
from linearize.plan import Plan
from linearize.report import tables
from linearize.report.schema import Row
from linearize.types import InputError

LAYOUT = Layout("ab/ba")


def picture(kind: int, side: int = 16, frame: int = 2):
    """[1, side, side]: a square, as light as its class is high, in a dark frame."""
    tile = torch.full((1, side, side), -1.0)
    tile[:, frame + 1 : -frame - 1, frame + 1 : -frame - 1] = (kind + 1) / 5 - 1
    return tile


def mosaic(kinds, columns: int = 2):
    rows = [torch.cat([picture(k) for k in kinds[i : i + columns]], 2) for i in range(0, len(kinds), columns)]
    return torch.cat(rows, 1)


def judge(images):
    """Sees ten classes by the lightness of a picture's middle; sure of itself whatever it sees, as real ones are."""
    light = images[:, 0, 7:9, 7:9].mean((1, 2))
    kind = ((light + 1) * 5 - 1).round().long().clamp(0, 9)
    return torch.nn.functional.one_hot(kind, 10).float() * 9, light[:, None].expand(-1, 3)


judge.crop = 2


def test_a_layout_says_what_stands_where():
    assert (LAYOUT.rows, LAYOUT.columns, LAYOUT.asked, LAYOUT.pairs) == (2, 2, [0, 3], [(1, 2)])
    row = Layout("abcb")
    assert (row.rows, row.columns, row.asked, row.pairs) == (1, 4, [0], [(1, 3)])
    wide = torch.arange(24.0).view(1, 1, 4, 6)
    tiles = Layout("abc/dea").tiles(wide)
    assert tiles.shape == (1, 6, 1, 2, 2) and tiles[0, 4, 0].tolist() == [[14, 15], [20, 21]]
    with pytest.raises(InputError, match="ab/ba does not divide drawings of 4 x 5"):
        LAYOUT.tiles(torch.zeros(1, 1, 4, 5))


def test_only_whole_pictures_are_counted():
    """The judge is sure each time; the frame tells."""
    whole = mosaic([1, 2, 3, 4])[None]
    cases = {
        "whole": (whole, [1, 2, 3, 4]),
        "moved by half a tile": (whole.roll((8, 8), (2, 3)), [NOTHING] * 4),
        "one is missing": (torch.cat([whole[..., :16], torch.full((1, 1, 32, 16), -1.0)], 3), [1, NOTHING, 3, NOTHING]),
        "noise": (torch.rand(whole.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1, [NOTHING] * 4),
        "one over the whole": (torch.nn.functional.interpolate(picture(5)[None], (32, 32)), [NOTHING] * 4),
    }
    for name, (images, kinds) in cases.items():
        found, features = mosaics.seen(LAYOUT.tiles(images), judge, 2)
        assert found.tolist() == [kinds] and features.shape == (1, 4, 3), name
    unsure, _ = mosaics.seen(LAYOUT.tiles(whole), lambda x: (torch.zeros(len(x), 10), judge(x)[1]), 2)
    assert unsure.tolist() == [[NOTHING] * 4]
    with pytest.raises(InputError, match="how wide"):
        mosaics.seen(LAYOUT.tiles(whole), judge, 0)


def test_count_and_placement():
    known = torch.tensor([[1, 2, 2, 1]])
    asked = torch.tensor([1])

    def of(*kinds, teacher=known):
        found = mosaics.figures(torch.tensor([kinds]), teacher, LAYOUT, asked)
        return {name: float(values) for name, values in found.items()}

    same = {"tiles_seen": 4, "count_kept": 1, "placement_kept": 1, "pairs_alike": 1, "top1": 1}
    assert of(1, 2, 2, 1) == same
    assert of(2, 1, 1, 2) == {**same, "placement_kept": 0, "top1": 0}  # all there, elsewhere
    assert of(1, 2, 3, 1) == {**same, "placement_kept": 0.75, "pairs_alike": 0}
    assert of(1, 2, NOTHING, 1) == {
        "tiles_seen": 3, "count_kept": 0, "placement_kept": 0.75, "pairs_alike": 0, "top1": 1,
    }  # fmt: skip
    assert of(NOTHING, NOTHING, NOTHING, NOTHING)["pairs_alike"] == 0
    one = torch.tensor([[1, NOTHING, NOTHING, NOTHING]])
    assert of(1, 2, NOTHING, NOTHING, teacher=one)["placement_kept"] == 1
    assert of(1, 2, NOTHING, NOTHING, teacher=one)["count_kept"] == 0
    none = of(*[NOTHING] * 4, teacher=torch.full((1, 4), NOTHING))
    assert none["count_kept"] == none["placement_kept"] == 0  # a teacher that shows nothing: nothing was kept


def test_scores_of_drawings():
    teacher = drawings.Score("teacher", torch.stack([mosaic([1, 2, 2, 1]), mosaic([3, 4, 4, 3])]))
    moved = drawings.Score("student", torch.stack([mosaic([1, 2, 2, 1]), mosaic([4, 3, 3, 4])]))
    labels = torch.tensor([1, 3])
    both = [(s, (s.drawn, teacher.drawn)) for s in (teacher, moved)]
    own, other = (drawings.samples(s, teacher, labels, judge, LAYOUT, shown).samples for s, shown in both)
    assert own.keys() == {"tiles_seen", "pairs_alike", "top1"} and own["top1"].values_N.tolist() == [1, 1]
    assert other["count_kept"].values_N.tolist() == [1, 1] and other["placement_kept"].values_N.tolist() == [1, 0]
    assert other["top1"].values_N.tolist() == [1, 0] and "agreement" not in other and "cosine" in other


def test_the_table_shows_mosaics_and_seconds():
    teacher = Row(name="teacher", tiles_seen=3.9, accuracy=0.9, image_seconds={4: 0.5, 50: 6.25})
    student = Row(name="student", tiles_seen=3.5, count_kept=0.75, placement_kept=0.5, image_seconds={4: 0.25, 50: 3})
    table = tables.encoder_table([teacher, student], "diffusion", "mosaics", str)
    assert table.columns == ["", "class", "seen", "count kept", "placement kept", "s at 4 steps", "s at 50 steps"]
    assert table.rows[0][2:] == ["3.9000", "–", "–", "0.500", "6.250"]
    assert table.rows[1][2:] == ["3.5000", "75.00 %", "50.00 %", "0.250", "3.000"]
    assert any(note.startswith("Mosaics:") for note in table.notes) and any("seconds" in n for n in table.notes)


@pytest.mark.parametrize(
    "override, said",
    [
        ("eval.mosaic=ab/b", "rows of one length"),
        ("eval.mosaic=a", "rows of one length"),
        ("eval.mosaic=AB", "should match pattern"),
    ],
)
def test_a_layout_that_is_none_is_refused(override, said):
    with pytest.raises(InputError, match=said):
        Plan.read({"task": "diffusion"}, [override])


def test_where_a_mosaic_means_nothing():
    plan = Plan.read({"task": "diffusion"}, ["eval.mosaic=ab/ba"])
    assert any("their dark frames: say how wide" in line for line in plan.problems())
    plan = Plan.read({"task": "image"}, ["eval.mosaic=ab/ba", "eval.crop=1"])
    assert any("eval.mosaic: is of drawings" in line for line in plan.problems())
    default = Plan.read({"task": "diffusion"})
    assert default.digest() != Plan.read({"task": "diffusion"}, ["eval.mosaic=ab/ba"]).digest()


def test_a_conversion_counts(tmp_path):
    """Random weights draw noise, in which nothing may be seen."""
    from test_diffusion import FEW, dit, scheduler

    dit().save_pretrained(tmp_path / "pipe" / "transformer")
    scheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}))
    done = api.convert(
        tmp_path / "pipe", "clear", task="diffusion", output_dir=tmp_path / "out",
        overrides=[*FEW[:-2], "method.mixer.radius=2", "eval.mosaic=ab/ba", "eval.crop=1"],
    )  # fmt: skip
    teacher, student = done.report.row("teacher"), done.report.row("student")
    assert teacher.tiles_seen == 0 and teacher.count_kept is None and "mosaics laid out ab/ba" in done.report.evaluation
    assert student.tiles_seen == student.count_kept == student.placement_kept == student.accuracy == 0
    assert student.frechet is not None and student.cosine is not None and student.agreement is None
    assert "placement kept" in (tmp_path / "out" / "report.html").read_text()
