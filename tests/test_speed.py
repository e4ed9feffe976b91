"""What bench measures: the rows of each kind of model, memory that grows as it should, and sizes that are refused."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import yaml

import linearize
from linearize import api
from linearize.evaluate.speed import IMAGE_UNITS, LAYER_UNITS, UNITS, image_speed, layer, peak_bytes, speed
from linearize.testing.pico import pico
from linearize.types import InputError, SiteShape


def test_text_and_encoders():
    surgery = linearize.attach(pico("llama"), None, "hedgehog")
    rows = speed(surgery, [16], repeats=1, new_tokens=2)
    assert set(rows) == {"prefill 16", "decode at 16", "transfer 16"}
    assert set(rows["prefill 16"]) == set(UNITS)
    surgery = linearize.attach(pico("bert"), None, "hedgehog")
    rows = speed(surgery, [16], repeats=1)
    assert set(rows) == {"prefill 16", "transfer 16"} and "teacher_bytes" not in rows["prefill 16"]
    with pytest.raises(InputError, match="128 positions"):
        speed(surgery, [256], repeats=1)


def test_images_of_other_sizes():
    surgery = linearize.attach(pico("vit"), None, "hedgehog")
    rows = speed(surgery, [16, 64], batch=2, repeats=1)
    assert [(name, row["tokens"]) for name, row in rows.items()] == [("16 px", 16), ("64 px", 256)]
    assert set(rows["64 px"]) == set(IMAGE_UNITS)
    assert rows["64 px"]["student_peak_bytes"] > 8 * rows["16 px"]["student_peak_bytes"]
    with pytest.raises(InputError, match=r"lengths 18: this vit cuts images in patches of 4 pixels"):
        image_speed(surgery, [18])


@pytest.mark.parametrize(
    ("form", "lengths", "rows"),
    [
        ({"model_type": "llama", "vocab_size": 97}, "8", ["prefill 8", "decode at 8", "transfer 8"]),
        ({"model_type": "vit", "image_size": 32, "patch_size": 16}, "32,64", ["32 px", "64 px"]),
    ],
)
def test_bench_of_a_form(form, lengths, rows, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    recipe = {"version": 1, "model": {"form": {**form, **sizes}}, "method": {"layers": "all"}}
    recipe["method"]["mixer"] = {"window": 0, "sinks": 0}
    recipe["task"] = "image" if "patch_size" in form else "text"
    file = tmp_path / "form-1.5.yaml"
    file.write_text(yaml.safe_dump(recipe))
    done = api.bench(recipe=file, lengths=lengths, repeats=1, random_weights=True, output_dir=tmp_path, device="cpu")
    assert [row.name for row in done.bench.rows] == rows
    assert done.bench.notes == ["random weights of this form"] and done.file.is_file()
    assert done.file.stem == done.bench.name == "form-1.5-hedgehog", "files of several recipes stand beside each other"
    assert ("student_peak_bytes" in done.bench.units) == (recipe["task"] == "image")


def test_peak_counts_what_lives_at_once():
    def run():
        for _ in range(3):
            torch.empty(1000)
        return torch.empty(500), torch.empty(500)

    assert peak_bytes(run, torch.device("cpu")) == 4000


def test_layer():
    shape = SiteShape(heads=2, kv_heads=2, key_dim=8, value_dim=8, width=16, scale=0.3, causal=False, image=True)
    rows = layer(shape, {"hedgehog": {}}, [(8, 16), (32, 16)], repeats=2)
    assert list(rows) == ["hedgehog 128", "hedgehog 512"] and set(rows["hedgehog 128"]) == set(LAYER_UNITS)
    few, many = (row["mixer_peak_bytes"] for row in rows.values())
    assert many < 4.2 * few

    judge = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "vit_b_layer.py"))["judge"]
    good = {"m 1024": {"ratio": 2.0, "mixer_peak_bytes": 10}, "m 4096": {"ratio": 7.0, "mixer_peak_bytes": 40}}
    assert judge(good)[0]
    assert not judge({**good, "m 4096": {"ratio": 5.0, "mixer_peak_bytes": 40}})[0]
    assert not judge({**good, "m 4096": {"ratio": 7.0, "mixer_peak_bytes": 160}})[0]
