"""Other forms of a converted model: a full checkpoint, or one program without Python (torch.export, ONNX)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.stages.programs import torch_program, write_onnx
from linearize.storage import atomic_folder, write_atomic
from linearize.surgery import files
from linearize.surgery.attach import Surgery
from linearize.types import InputError, nearest

FORMATS = ("safetensors", "torch-export", "onnx")


def export(model: nn.Module | Surgery, folder: str | Path, format: str = "safetensors", tokenizer: Any = None) -> Path:
    """Write a converted model to `folder` in another form; returns the folder.

    "safetensors": the full checkpoint (files.save). "torch-export": `model.pt2`, a program (input_ids [B, T],
    attention_mask [B, T]) -> logits [B, T, vocabulary] of any batch, and any length from 64 tokens (or the
    window) on: pad shorter ones on the left. "onnx": `model.onnx` of an encoder or a vision transformer, in float32.
    Programs are compared with the model itself at other sizes than they were traced at; `model.json` holds the
    signature.
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
        if form == "onnx":
            said = write_onnx(model, part / "model.onnx")
        else:
            program, said = torch_program(model)
            stream = io.BytesIO()
            torch.export.save(program, stream)
            write_atomic(part / "model.pt2", stream.getvalue())
        write_atomic(part / "model.json", json.dumps(said, indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return Path(folder)
