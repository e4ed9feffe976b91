"""A converted model as one program without its Python: by torch.export, or as ONNX."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.surgery.attach import Surgery
from linearize.types import GateError, InputError, Unsupported

#: what an ONNX file is written and checked with: the extra "onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Function(nn.Module):
    """The model as a function of tensors only: its inputs by position -> its main output."""

    def __init__(self, model: nn.Module, names: list[str], output: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.output, self.settings = model, names, output, settings

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        given = dict(zip(self.names, (first, second)))
        return self.model(**given, **self.settings)[self.output]


def torch_program(model: nn.Module) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """A causal model traced by torch.export, and what to know about it. Lengths are symbolic; compared with the model
    itself at others than it was traced at. Raises Unsupported, GateError."""
    config: Any = model.config
    shortest, traced_at, checked_at = _lengths(model, "torch-export")
    vocabulary = config.get_text_config().vocab_size
    names, training = ["input_ids", "attention_mask"], model.training
    whole = _Function(model, names, "logits", {"use_cache": False}).eval()
    try:
        with torch.no_grad():
            sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
            try:
                program = torch.export.export(whole, _text(model, 2, traced_at), dynamic_shapes=(sizes, dict(sizes)))
            except Exception as error:  # torch raises many kinds, none of them public
                raise Unsupported(f"torch.export cannot trace this {config.model_type}: {_line(error)}") from error
            run = program.module()
            for length in checked_at:
                _compare(run, whole, _text(model, 3, length), f"{length} tokens")
    finally:
        model.train(training)
    said = {
        "inputs": {"input_ids": "int64 [batch, tokens]", "attention_mask": "int64 [batch, tokens], 0 at padding"},
        "output": f"logits, {str(model.dtype).removeprefix('torch.')} [batch, tokens, {vocabulary}]",
        "tokens": {"at least": shortest, "at most": _positions(config) or traced_at},
        "checked at": checked_at,
        "torch": torch.__version__,
    }
    return program, said


def write_onnx(model: nn.Module, path: Path) -> dict[str, Any]:
    """An encoder or a vision transformer as ONNX in float32, of any batch size. Returns what to know about it.

    An encoder takes any length, or lengths from 64 tokens (or the window) on where its mixers go in chunks.
    onnxruntime runs the written file at batch sizes and lengths other than those it was traced at, and must agree with
    the model. Raises InputError where packages are missing, Unsupported where it cannot be traced or run, GateError
    where the file computes something else.
    """
    surgery = Surgery.of(model)
    assert surgery is not None
    config: Any = model.config
    name = f"this {config.model_type}"
    if any(site.shape.causal for site in surgery.sites):
        raise Unsupported(f"{name} is a decoder, and ONNX is written for encoders: export it as torch-export")
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{name} has a decoder, and ONNX is written for encoders: convert and export its encoder")
    if missing := [package for package in ONNX_PACKAGES if find_spec(package) is None]:
        raise InputError(f"onnx needs {', '.join(missing)}: pip install 'linearize[onnx]'")
    model = copy.deepcopy(model).float().cpu().eval()
    any_size = torch.export.Dim.AUTO
    if model.main_input_name == "pixel_values":  # type: ignore[union-attr]
        names, sizes = ["pixel_values"], {0: any_size}
        traced, checks = _images(model, 2), [_images(model, 1), _images(model, 5)]
        said: dict[str, Any] = {"inputs": {"pixel_values": f"float32 [batch, {_axes(traced[0])}]"}}
    else:
        names, sizes = ["input_ids", "attention_mask"], {0: any_size, 1: any_size}
        shortest, traced_at, lengths = _lengths(model, "onnx")
        traced, checks = _text(model, 2, traced_at), [_text(model, n + 1, length) for n, length in enumerate(lengths)]
        said = {
            "inputs": {"input_ids": "int64 [batch, tokens]", "attention_mask": "int64 [batch, tokens], 0 at padding"},
            "tokens": {"at least": shortest, "at most": _positions(config) or traced_at},
        }
    with torch.no_grad(), _quiet():
        out = model(**dict(zip(names, traced)))
        output = "logits" if "logits" in out else "last_hidden_state"
        whole = _Function(model, names, output, {}).eval()
        try:
            program: Any = torch.onnx.export(
                whole,
                traced,
                dynamo=True,
                dynamic_shapes=tuple(dict(sizes) for _ in names),
                input_names=names,
                output_names=[output],
                verbose=False,
            )
        except Exception as error:
            raise Unsupported(f"torch.onnx cannot trace {name}: {_line(error.__cause__ or error)}") from error
        program.save(path)
        run = _onnx_session(path, names)
        for inputs in checks:
            _compare(run, whole, inputs, f"{' x '.join(map(str, inputs[0].shape))} inputs")
        if "tokens" in said:
            with contextlib.suppress(Unsupported, GateError):  # then chunks were traced, and it stays as it is
                short = [_text(model, 2, length) for length in (2, 33)]
                for inputs in short:
                    _compare(run, whole, inputs, "few tokens")
                said["tokens"]["at least"] = 2
                checks += short
    said["output"] = f"{output}, float32 [batch, {_axes(out[output]) if names[0] == 'pixel_values' else 'tokens, ...'}]"
    said["checked at"] = [list(inputs[0].shape) for inputs in checks]
    said["torch"] = torch.__version__
    return said


def _axes(x: Tensor) -> str:
    return ", ".join(map(str, x.shape[1:]))


def _onnx_session(path: Path, names: list[str]) -> Callable[..., Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unsupported(f"onnxruntime cannot load what torch.onnx wrote: {_line(error)}") from error
    return lambda *inputs: torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx says at length which packages of others it has not found."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# ------------------------------------------------------------------------------------------------ inputs, comparing
def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _lengths(model: nn.Module, form: str) -> tuple[int, int, list[int]]:
    """(shortest, traced at, checked at): one of those is a whole number of chunks. Raises Unsupported."""
    surgery = Surgery.of(model)
    assert surgery is not None
    shortest = max(64, getattr(surgery.config, "window", 0) or 0)
    traced_at, most = 2 * shortest + 22, _positions(model.config)
    if most is not None and most < traced_at:
        raise Unsupported(f"{form} needs a model of at least {traced_at} positions, this one has {most}")
    return shortest, traced_at, [shortest + 7, 2 * shortest]


def _text(model: Any, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; of two or more rows the last is padded: in front where the model is causal."""
    surgery = Surgery.of(model)
    assert surgery is not None
    device = next(model.parameters()).device
    ids = torch.arange(batch * length, device=device).view(batch, length) * 7919
    ids = ids % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    if batch > 1:
        part = slice(length // 4) if surgery.sites[0].shape.causal else slice(-(length // 4), None)
        mask[-1, part] = 0
    return ids, mask


def _images(model: Any, batch: int) -> tuple[Tensor]:
    size = model.config.image_size
    rows, columns = size if isinstance(size, list | tuple) else (size, size)
    shape = (batch, model.config.num_channels, rows, columns)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(batch)),)


def _compare(run: Callable[..., Tensor], model: nn.Module, inputs: tuple[Tensor, ...], where: str) -> None:
    """Raises Unsupported where `run` takes only the sizes it was traced at, GateError where it computes something
    else; positions of padding are not looked at."""
    try:
        got = run(*inputs)
    except Exception as error:
        raise Unsupported(f"the program was fixed to the sizes it was traced at: at {where} {_line(error)}") from error
    want = model(*inputs)
    if len(inputs) > 1:
        got, want = got[inputs[1].bool()], want[inputs[1].bool()]
    apart = (got.float() - want.float()).abs().max() / want.float().abs().max()
    limit = 1e-4 if next(model.parameters()).dtype.itemsize >= 4 else 5e-2
    if not apart <= limit:
        raise GateError(f"the exported program is {float(apart):.2g} off (relative) at {where}: not written")


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
