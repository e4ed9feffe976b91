"""A made-up report for the tests of linearize/report: shapes as real ones have them, numbers of nobody's model."""

from __future__ import annotations

import numpy as np

from linearize.report.schema import Report

LAYERS, HEADS, POSITIONS = 6, 6, 255


def row(name: str, nll: float, **more: object) -> dict[str, object]:
    return {"name": name, "perplexity": float(np.exp(nll)), "nll": nll, **more}


def example(**changes: object) -> Report:
    """The report, with some of its keys replaced."""
    rng = np.random.default_rng(0)
    place = np.arange(1, POSITIONS + 1)

    def by_position(nll: float, beyond: float = 0.0) -> list[float]:
        late = beyond * np.clip((place - 32) / 120, 0, 1)
        return (nll + 2.2 * np.exp(-place / 14) + late + 0.15 * rng.standard_normal(POSITIONS)).tolist()

    def transfer_series() -> dict[str, list[float]]:
        steps = np.linspace(1, 600, 60)
        series = {"step": steps.tolist()}
        for layer in range(LAYERS):
            start, end = 0.9 - 0.08 * layer, 0.02 + 0.012 * layer
            noise = np.exp(0.06 * rng.standard_normal(60))
            series[f"layer.{layer}"] = ((end + (start - end) * np.exp(-steps / (60 + 25 * layer))) * noise).tolist()
        series["loss"] = np.mean([series[f"layer.{layer}"] for layer in range(LAYERS)], 0).tolist()
        return series

    def softmax(scores: np.ndarray) -> np.ndarray:
        scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def picture(layer: int, head: int) -> dict[str, object]:
        from linearize.report.looks import Picture

        q, k = rng.standard_normal((2, 64, 8))
        near = -0.08 * (1 + head) * np.abs(np.subtract.outer(np.arange(64), np.arange(64)))
        teacher = softmax(q @ k.T + near)
        student = softmax(0.75 * (q @ k.T) + near + 0.3 * rng.standard_normal((64, 64)))
        return Picture.pack(layer, head, teacher, student).model_dump()

    entropy = np.sort(rng.uniform(0.8, 3.6, (LAYERS, HEADS)), 0)
    spearman = rng.uniform(0.93, 1.0, (LAYERS, HEADS))
    state = 36 * LAYERS * HEADS * 97 * 48 // 6
    parts = {"stories 0-48": {"perplexity": 4.31}, "stories 54-119": {"perplexity": 4.87}}
    base: dict[str, object] = {
        "command": "linearize convert --recipe demo",
        "commit": {"id": "0123456789abcdef0123456789abcdef01234567", "dirty": False, "package": "0.1.0"},
        "machine": {
            "cpu": "Example", "cores": 2, "threads": 2, "memory": 8 << 30, "device": "cpu", "system": "Linux x86_64",
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "date": "2026-11-22T12:00:00Z",
        "model": {
            "id": "example", "type": "llama", "parameters": 15_191_712, "layers": LAYERS, "converted": LAYERS,
            "license": "mit",
        },
        "method": "hedgehog",
        "recipe": "hedgehog/example",
        "plan_digest": "abc123",
        "seeds": [0],
        "evaluation": "120 stories, positions 1-255",
        "rows": [
            row("teacher", 1.50, copy_nll=0.62, copy_share=0.2, by_position=by_position(1.5), parts=parts),
            row("swapped", 4.45, kl=2.95, top1=0.24, copy_nll=4.1, residual_error=[0.5, 0.8, 1.1, 1.2, 1.3]),
            row("after transfer", 2.05, kl=0.56, top1=0.71, copy_nll=1.3, residual_error=[0.2, 0.3, 0.4, 0.5, 0.5]),
            row(
                "student", 1.56, kl=0.08, top1=0.9, copy_nll=0.79, gap_closed=0.63, marginal=0.12,
                residual_error=[0.1, 0.15, 0.2, 0.24, 0.3], by_position=by_position(1.56, 0.05), parts=parts,
                buckets={"1-15": 12.1, "16-31": 7.4}, intervals={"marginal": (0.1, 0.14)}, documents=120, tokens=30_000,
            ),
            row(
                "zero-token window", 1.73, kl=0.25, top1=0.84, copy_nll=1.08, by_position=by_position(1.66, 0.3),
                cache_bytes={1024: 32 * 1152, 8192: 32 * 1152, 65536: 32 * 1152},
            ),
            row("window-only student", 1.64, kl=0.17, top1=0.86, copy_nll=1.0, by_position=by_position(1.6, 0.2)),
            row("linear_off", 1.68, kl=0.2, top1=0.85, copy_nll=1.05),
            row("window_off", 2.4, kl=0.95, top1=0.6),
        ],
        "stages": [
            {"name": "selfgen", "steps": 40, "tokens": 1_500_000, "seconds": 210.0},
            {
                "name": "transfer", "steps": 600, "tokens": 1_000_000, "seconds": 140.0, "first": 0.7, "last": 0.05,
                "series": transfer_series(),
            },
            {
                "name": "finetune", "steps": 300, "tokens": 500_000, "seconds": 121.0, "first": 0.56, "last": 0.09,
                "series": {"loss": (0.09 + 0.47 * np.exp(-np.arange(100) / 18) * rng.uniform(0.8, 1.2, 100)).tolist()},
            },
        ],
        "state": {n: {"state_bytes": state, "kv_bytes": n * LAYERS * 576 * 2} for n in (1024, 8192, 65536)},
        "sample": [
            {
                "prompt": "Once upon a time", "teacher": ", there was a little girl named Lily.",
                "student": ", there was a little girl named Lily. She <b>loved</b> cats & dogs.",
            }
        ],
        "generation": {"nll_teacher": 1.1, "nll_student": 1.24, "repetition_teacher": 0.02, "repetition_student": 0.03},
        "curves": {
            "ratio": {
                "x_label": "tokens", "y_label": "perplexity ratio", "x": [0, 5e5, 1e6, 1.5e6], "y": [9, 2, 1.4, 1.06],
            }
        },
        "verdict": {"level": "good", "headline": "1.06 times the teacher's perplexity", "lines": ["A line."]},
        "notes": ["Example."],
        "plan": {"version": 1, "method": {"name": "hedgehog"}, "stages": [{"kind": "transfer", "tokens": 1_000_000}]},
        "sites": [
            {"name": "model.layers.0.self_attn", "layer": 0, "converted": True, "drops": ["soft-cap 50"]},
            {"name": "model.layers.1.self_attn", "layer": 1, "converted": False, "why": "its own window is smaller"},
        ],
        "diagnostics": {
            "layers": list(range(LAYERS)),
            "entropy": {"teacher": entropy.tolist(), "student": (entropy + 0.5 * rng.random(entropy.shape)).tolist()},
            "monotonicity": {"teacher": np.ones_like(spearman).tolist(), "student": (spearman - 0.05).tolist()},
            "pictures": [picture(layer, head) for layer, head in ((0, 1), (2, 4), (3, 0), (5, 5))],
        },
    }  # fmt: skip
    return Report.model_validate({**base, **changes})
