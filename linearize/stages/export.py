"""Other forms of a converted model: a full checkpoint, or one program without Python (torch.export)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.storage import atomic_folder, write_atomic
from linearize.surgery import files
from linearize.surgery.attach import Surgery
from linearize.types import GateError, InputError, Unsupported, nearest

FORMATS = ("safetensors", "torch-export")


def export(model: nn.Module | Surgery, folder: str | Path, format: str = "safetensors", tokenizer: Any = None) -> Path:
    """Write a converted model to `folder` in another form; returns the folder.

    "safetensors": the full checkpoint (files.save). "torch-export": `model.pt2`, a program (input_ids [B, T],
    attention_mask [B, T]) -> logits [B, T, vocabulary] of any batch, and any length from 64 tokens (or the
    window) on: pad shorter ones on the left. It is compared with the model itself at other lengths than it was traced
    at; `model.json` holds its signature.
    Raises InputError for another format, Unsupported where torch cannot trace the model, GateError where the program
    computes something else, StorageError.
    """
    form = format.replace("_", "-").replace("torch.export", "torch-export")
    if form not in FORMATS:
        raise InputError(f"cannot export to {format!r}: {nearest(form, FORMATS)} (formats: {', '.join(FORMATS)})")
    model = model.model if isinstance(model, Surgery) else model
    if form == "safetensors":
        return files.save(model, folder, tokenizer)
    if Surgery.of(model) is None:
        raise InputError("this model is not converted: attach a method first")
    with atomic_folder(folder) as part:
        program, said = _program(model)
        stream = io.BytesIO()
        torch.export.save(program, stream)
        write_atomic(part / "model.pt2", stream.getvalue())
        write_atomic(part / "model.json", json.dumps(said, indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return Path(folder)


class _Logits(nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def _program(model: nn.Module) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The traced model and what to know about it. Lengths are symbolic; raises Unsupported, GateError."""
    surgery = Surgery.of(model)
    assert surgery is not None
    config: Any = model.config
    text = config.get_text_config()
    shortest = max(64, getattr(surgery.config, "window", 0))
    # Traced at one length and checked at others, one of them a whole number of chunks.
    traced_at, lengths = 2 * shortest + 22, [shortest + 7, 2 * shortest]
    most = getattr(text, "max_position_embeddings", None) or traced_at
    if most < traced_at:
        raise Unsupported(f"torch-export needs a model of at least {traced_at} positions, this one has {most}")
    whole, training = _Logits(model).eval(), model.training
    try:
        with torch.no_grad():
            traced = _inputs(model, 2, traced_at, text.vocab_size)
            sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
            try:
                program = torch.export.export(
                    whole, traced, dynamic_shapes={"input_ids": sizes, "attention_mask": dict(sizes)}
                )
            except Exception as error:  # torch raises many kinds, none of them public
                said = str(error).strip().splitlines()[0]
                raise Unsupported(f"torch.export cannot trace this {config.model_type}: {said}") from error
            run = program.module()
            for length in lengths:
                _compare(run, whole, _inputs(model, 3, length, text.vocab_size))
    finally:
        model.train(training)
    said = {
        "inputs": {"input_ids": "int64 [batch, tokens]", "attention_mask": "int64 [batch, tokens], 0 at padding"},
        "output": f"logits, {str(model.dtype).removeprefix('torch.')} [batch, tokens, {text.vocab_size}]",
        "tokens": {"at least": shortest, "at most": most},
        "checked at": lengths,
        "torch": torch.__version__,
    }
    return program, said


def _inputs(model: nn.Module, batch: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    ids = torch.arange(batch * length, device=device).view(batch, length) * 7919 % vocabulary
    mask = torch.ones_like(ids)
    mask[-1, : length // 4] = 0  # one row is padded
    return ids, mask


def _compare(run: nn.Module, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    length = inputs[0].shape[1]
    try:
        got = run(*inputs)
    except Exception as error:
        said = str(error).strip().splitlines()[0]
        raise Unsupported(f"torch.export fixed the length of this model: at {length} tokens {said}") from error
    real = inputs[1].bool()
    want = model(*inputs)[real].float()
    apart = (got[real].float() - want).abs().max() / want.abs().max()
    limit = 1e-4 if next(model.parameters()).dtype.itemsize >= 4 else 5e-2
    if not apart <= limit:
        raise GateError(f"the exported program is {float(apart):.2g} off (relative) at {length} tokens: not written")
