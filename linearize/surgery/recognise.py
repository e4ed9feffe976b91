"""Recognising a base: is this the model that an adapter was made for, in whatever precision it was loaded?"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize.seams import hooks
from linearize.surgery.attach import Surgery
from linearize.types import InputError

log = logging.getLogger("linearize")

#: of the model type of a converted checkpoint, before its base's
PREFIX = "linearized_"
#: what of a base's configuration an adapter's tensors depend on
_FORM = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
#: KL in nats per token between a base and the copy it is recognised in. Measured (stories15M, SmolLM2-135M): bf16
#: 0.0003, 8-bit 0.001, 4-bit in groups of 32 to 64 0.04-0.33; a layer exchanged or 5 steps of fine-tuning 0.5, random
#: weights 5-7.
_SAME, _COPY = 0.02, 0.5


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """How a model is recognised in any precision, by what it says (mixers and LoRA off) of inputs that are always the
    same.

    Language models: four prompts that start with fixed ids and are continued greedily, and log probabilities of the 8
    likeliest tokens at the last 8 positions of each. Encoders: 32 channels of the last hidden state at 8 positions of
    four fixed texts or pictures.
    """
    if not predicts(model):
        return {"features": [[[round(v, 4) for v in row] for row in rows] for rows in _features(model).tolist()]}
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    first = config.get_text_config().bos_token_id
    places = [[p * 7919 + vocabulary // 3, p * 104729 + vocabulary // 5] for p in range(4)]
    start = [[first if isinstance(first, int) else 0, *(place % vocabulary for place in pair)] for pair in places]
    ids_BT = torch.tensor(start, device=hooks.device(model))
    with _as_teacher(model):
        for _ in range(12):
            last_BV = model(input_ids=ids_BT, use_cache=False).logits[:, -1]
            ids_BT = torch.cat([ids_BT, last_BV.argmax(-1, keepdim=True)], 1)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, -8:]
    top = logits_BTV.float().log_softmax(-1).topk(8, -1)
    values = [[[round(v, 4) for v in row] for row in rows] for rows in top.values.tolist()]
    return {"prompts": ids_BT.tolist(), "tokens": top.indices.tolist(), "log_probabilities": values}


def predicts(model: nn.Module) -> bool:
    """Whether it is a language model, whose outputs are the likelihoods of next tokens."""
    return any(part in type(model).__name__ for part in ("ForCausalLM", "LMHeadModel"))


def _features(model: nn.Module) -> Tensor:
    """Of fixed inputs: float32 [4, 8, channels], channels spread over the width."""
    config: Any = model.config
    device = hooks.device(model)
    if getattr(model, "main_input_name", None) == "pixel_values":
        size = config.image_size
        rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
        place = torch.arange(4 * config.num_channels * rows * columns, device=device, dtype=torch.float64)
        picture = (place * place.sqrt()).sin().view(4, config.num_channels, rows, columns)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs = {"pixel_values": picture.to(dtype)}
    else:
        vocabulary = config.get_text_config().vocab_size
        inputs = {"input_ids": torch.arange(64, device=device).view(4, 16) * 7919 % vocabulary}
    with _as_teacher(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some draw at random what they hide from themselves
        hidden_BTD = getattr(model, "base_model", model)(**inputs).last_hidden_state.float()
    step = max(1, hidden_BTD.shape[-1] // 32)
    return hidden_BTD[:, :: max(1, hidden_BTD.shape[1] // 8)][:, :8, ::step][..., :32]


def distance(model: nn.Module, known: Mapping[str, Any]) -> tuple[float, float]:
    """(how far this model is from the one a fingerprint was taken of, how far a model that knows nothing is).

    Language models: KL in nats per token from that model to this one and to even chances, over the fingerprint's
    tokens and the rest of the vocabulary as one. Encoders: squared distance of the features over their variance (1 for
    features that do not depend on the input). Infinite where one predicts and the other does not.
    """
    if ("features" in known) == predicts(model):
        return math.inf, 1.0
    if "features" in known:
        there, here = torch.tensor(known["features"]), _features(model).cpu()
        if there.shape != here.shape:
            return math.inf, 1.0
        spread = (there - there.mean((0, 1))).square().sum()
        return float((here - there).square().sum() / spread.clamp(min=1e-12)), 2.0
    device = hooks.device(model)
    ids_BT = torch.tensor(known["prompts"], device=device)
    tokens = torch.tensor(known["tokens"], device=device)
    with _as_teacher(model):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, -tokens.shape[1] :]
    here = _with_rest(logits_BTV.float().log_softmax(-1).gather(-1, tokens))
    there = _with_rest(torch.tensor(known["log_probabilities"], device=device))
    size, chosen = logits_BTV.shape[-1], tokens.shape[-1]
    even = torch.tensor([1 / size] * chosen + [max(size - chosen, 1) / size], device=device).log()
    apart, certain = ((there.exp() * (there - other)).sum(-1).mean() for other in (here, even))
    return float(apart), float(certain)


def _with_rest(log_p: Tensor) -> Tensor:
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-4).log()
    return torch.cat([log_p, rest], -1)


@contextlib.contextmanager
def _as_teacher(model: nn.Module) -> Iterator[None]:
    surgery, training = Surgery.of(model), model.training
    model.eval()
    try:
        with torch.no_grad(), surgery.teacher() if surgery else contextlib.nullcontext():
            yield
    finally:
        model.train(training)


def form(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    text: Any = config.get_text_config()
    sizes = {key: getattr(text, key, None) for key in _FORM}
    return {**sizes, "model_type": text.model_type.removeprefix(PREFIX)}


def recognise(model: nn.Module, base: Mapping[str, Any], name: str, revision: str | None = None) -> None:
    """Raises InputError where `model` is not the base an adapter was made for. Warns where it comes near in other
    numbers, or is of another commit of the same id."""
    wanted = base["id"] or "the embedded teacher"
    wanted += f" (revision {base['revision']})" if base["revision"] else ""
    here = form(model)
    for key, value in base["form"].items():
        if here.get(key) != value:
            raise InputError(
                f"this adapter was made for {wanted}, not for {name}: {key} is {value} there and {here.get(key)} here"
            )
    apart, certain = distance(model, base["fingerprint"])
    what = "predictions are {:.2g} nats per token" if predicts(model) else "features are {:.2g} of their variance"
    limit = min(_COPY, certain / 4)  # two models that know next to nothing are never far apart
    if not apart <= limit:
        raise InputError(
            f"this adapter was made for {wanted}, not for {name}: on the same inputs their "
            f"{what.format(apart)} apart (at most {limit:.2g} in a quantised copy)"
        )
    if apart > _SAME:
        log.warning(
            "%s is not quite %s, which the adapter was made for (%s apart): fine for a 4-bit copy, wrong for a "
            "fine-tuned one",
            name,
            wanted,
            what.format(apart),
        )
    commits = [text for text in (base["revision"], revision) if text and re.fullmatch("[0-9a-f]{40}", text)]
    if name == base["id"] and len(set(commits)) == 2:  # a branch's name says nothing
        log.warning("the adapter was made for %s at commit %s, this is commit %s", name, *commits)
