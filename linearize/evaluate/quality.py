"""How good a converted model is: every variant of one model on the same documents, in one pass.

A variant is a name and a context manager factory; inside it the model behaves as that variant (mixers off, a branch
off, ...). A context manager that yields a module has that module measured instead (see surgery/twin.py). For each batch
the teacher's log-probabilities are computed once and the variants are streamed against them, so that memory does not
grow with their number. All figures are weighted by token; predictions of positions 1 and up count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.progress import bar
from linearize.types import GateError, InputError

Variant = tuple[str, Callable[[], AbstractContextManager[Any]]]

TEACHER, STUDENT, WINDOW, LINEAR_OFF = "teacher", "student", "zero-token window", "linear_off"
WINDOW_ONLY = "window-only student"
_ROWS = 512  # positions whose probabilities over the vocabulary are held at a time, beside the logits


# -------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Targets:
    """The predicted tokens, end to end: their document, their position in it, and whether they are copies from
    beyond the window (`copy_from_beyond`). documents: how many."""

    doc_N: Tensor
    position_N: Tensor
    copy_N: Tensor
    documents: int
    window: int


@dataclass(frozen=True)
class Score:
    """One variant on all targets: nats, KL(teacher || variant) in nats, and whether both rank the same token first.

    residual: relative error of the residual stream after each layer (see `residual_error`), where it was measured.
    """

    name: str
    targets: Targets
    nll_N: Tensor
    kl_N: Tensor
    agree_N: Tensor
    residual: list[float] | None = None

    def take(self, documents: Sequence[int]) -> Score:
        """The same on some of the documents. The residual error, measured on others perhaps, is left out."""
        keep = torch.isin(self.targets.doc_N, torch.tensor(list(documents)))
        if not keep.any():
            raise InputError(f"no documents {list(documents)} among {self.targets.documents}")
        t = self.targets
        new = replace(t, doc_N=t.doc_N[keep], position_N=t.position_N[keep], copy_N=t.copy_N[keep])
        return Score(self.name, new, self.nll_N[keep], self.kl_N[keep], self.agree_N[keep])


def copy_from_beyond(ids_T: Tensor, window: int) -> Tensor:
    """bool [T - 1]: which of the tokens 1.. stood before in the sequence, but not among the last `window` tokens.

    The query that predicts token t sees t - window .. t - 1 through a window: it cannot see these.
    """
    order = ids_T.sort(stable=True).indices
    same = ids_T[order][1:] == ids_T[order][:-1]
    before = torch.full_like(ids_T, -1)
    before[order[1:][same]] = order[:-1][same]
    place = torch.arange(len(ids_T), device=ids_T.device)
    return ((before >= 0) & (place - before > window))[1:]


def measure(
    model: nn.Module,
    documents: Sequence[Tensor],
    variants: Sequence[Variant],
    *,
    teacher: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch: int = 8,
    window: int = 32,
    residual: int = 4,
    pad: int = 0,
    progress: bool | None = None,
) -> list[Score]:
    """Scores of the teacher, first, and of each variant.

    documents: int64 ids, each of at least two. batch: documents at a time, of similar length, padded on the right.
    window: what copy-from-beyond tokens are beyond. residual: how many documents the residual stream is compared on.
    pad: an id to pad with (any valid one: it is masked). Raises InputError for unusable documents, GateError where a
    variant's logits are not finite.
    """
    if not documents or min(map(len, documents)) < 2:
        raise InputError("evaluation needs documents of at least two tokens each")
    names = [TEACHER, *(name for name, _ in variants)]
    if len(set(names)) < len(names):
        raise InputError(f"two rows of one name: {', '.join(names)}")
    aimed = targets(documents, window)
    starts = torch.tensor([0, *(len(d) - 1 for d in documents)]).cumsum(0)
    # The teacher's own row goes through the same procedure: it is measured against itself.
    size = int(starts[-1])
    found = {name: torch.empty(3, size, dtype=torch.float64) for name in names}
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    with evaluating(model), bar("evaluation", len(documents) * len(names), progress) as advance:
        for at in range(0, len(order), batch):
            some = order[at : at + batch]
            ids_BT, mask_BT = _padded([documents[i] for i in some], pad)
            spots = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in some])
            with teacher() as other:
                known = _log_probabilities(chosen(model, other), ids_BT, mask_BT)
            for name, enter in [(TEACHER, teacher), *variants]:
                if name == TEACHER:
                    logits = known
                else:
                    with enter() as other:
                        logits = _logits(chosen(model, other), ids_BT, mask_BT)
                found[name][:, spots] = against(known, logits, _next(ids_BT, mask_BT))
                if not found[name][0, spots].isfinite().all():
                    raise GateError(f"row {name!r}: logits are not finite; look for NaN or inf in the model's weights")
                advance(len(some))
        depth: dict[str, list[float]] = {}
        if residual:
            depth = residual_error(model, documents[:residual], variants, teacher=teacher, pad=pad)
    return [Score(name, aimed, *found[name].unbind(0), residual=depth.get(name)) for name in names]


def residual_error(
    model: nn.Module,
    documents: Sequence[Tensor],
    variants: Sequence[Variant],
    *,
    teacher: Callable[[], AbstractContextManager[Any]] = nullcontext,
    pad: int = 0,
) -> dict[str, list[float]]:
    """By variant and layer: |h - h_teacher| / |h_teacher| of the residual stream after the layer, mean over tokens.

    Position 0 is left out: it sees itself alone and has no error. Most families report the last layer's stream after
    the final norm.
    """
    found: dict[str, Tensor] = {}
    count = 0
    with evaluating(model):
        for ids_T in documents:
            with teacher() as other:
                wanted = _hidden(chosen(model, other), ids_T)
            for name, enter in variants:
                with enter() as other:
                    got = _hidden(chosen(model, other), ids_T)
                error = [((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)).sum() for a, b in zip(got, wanted)]
                found[name] = torch.stack(error).double() + found.get(name, 0)
            count += len(ids_T) - 1
    return {name: (total / count).tolist() for name, total in found.items()}


def targets(documents: Sequence[Tensor], window: int) -> Targets:
    sizes = torch.tensor([len(d) - 1 for d in documents])
    return Targets(
        doc_N=torch.arange(len(documents)).repeat_interleave(sizes),
        position_N=torch.cat([torch.arange(1, len(d)) for d in documents]),
        copy_N=torch.cat([copy_from_beyond(d.cpu(), window) for d in documents]),
        documents=len(documents),
        window=window,
    )


def _padded(documents: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([d.cpu() for d in documents], batch_first=True, padding_value=pad)
    sizes = torch.tensor([len(d) for d in documents])
    return ids, torch.arange(ids.shape[1]) < sizes[:, None]


def _next(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The predicted tokens, document by document: int64 [n]."""
    return ids_BT[:, 1:][mask_BT[:, 1:]]


def chosen(model: nn.Module, other: Any) -> nn.Module:
    return other if isinstance(other, nn.Module) else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; each module's mode is put back (LoRA's dropout learns in a model that is
    otherwise in eval mode)."""
    learning = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in learning:
            module.training = True


def forward(model: Any, ids_BT: Tensor, mask_BT: Tensor, **more: Any) -> Any:
    """The model's output without a cache; the mask (True at real tokens) is passed only where something is padded."""
    device = next(model.parameters()).device
    mask = None if mask_BT.all() else mask_BT.long().to(device)
    return model(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False, **more)


def _logits(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[n, vocabulary]: at each token but the last of each document."""
    logits = forward(model, ids_BT, mask_BT).logits[:, :-1]
    return logits[mask_BT[:, 1:].to(logits.device)]


def _log_probabilities(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    logits = _logits(model, ids_BT, mask_BT)
    out = torch.empty(logits.shape, dtype=precise(logits), device=logits.device)
    for at in range(0, len(logits), _ROWS):
        out[at : at + _ROWS] = logits[at : at + _ROWS].to(out.dtype).log_softmax(-1)
    return out


def precise(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def against(known_NV: Tensor, logits_NV: Tensor, next_N: Tensor) -> Tensor:
    """[3, n] on the CPU: nll of the next tokens, KL(known || logits), same first token."""
    out = torch.empty(3, len(next_N), dtype=torch.float64)
    for at in range(0, len(next_N), _ROWS):
        part = slice(at, at + _ROWS)
        log_p = known_NV[part]
        log_q = log_p if logits_NV is known_NV else logits_NV[part].to(log_p.dtype).log_softmax(-1)
        p = log_p.exp()
        out[0, part] = -log_q.gather(-1, next_N[part, None].to(log_q.device))[:, 0]
        out[1, part] = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)  # a piece of chance 0 adds nothing
        out[2, part] = (log_p.argmax(-1) == log_q.argmax(-1)).to(out.dtype)
    return out


def _hidden(model: nn.Module, ids_T: Tensor) -> list[Tensor]:
    out = forward(model, ids_T[None], torch.ones(1, len(ids_T), dtype=torch.bool), output_hidden_states=True)
    return [h[0, 1:].float().cpu() for h in out.hidden_states[1:]]


# -------------------------------------------------------------------------------------------------- reporting
@dataclass(frozen=True)
class Row:
    """One line of the table. perplexity = exp(nll); ratio: to the teacher's. kl: KL(teacher || this), nats per token.
    top1: share of positions where both rank the same token first.

    copy_nll: nats on copy-from-beyond tokens; copy_share: their share; gap_closed: share of the window-to-teacher gap
    closed on them. marginal, marginal_copy: nats lost with the linear branch off, on all and on those tokens;
    marginal_share: of the window-to-teacher gap there. residual_error: by layer. by_position: nats at positions 1, 2,
    ... ; buckets: perplexity by position range. intervals: 95 % bootstrap intervals over documents, by metric.
    """

    name: str
    documents: int
    tokens: int
    perplexity: float
    nll: float
    kl: float
    top1: float
    ratio: float
    copy_nll: float | None = None
    copy_share: float | None = None
    gap_closed: float | None = None
    marginal: float | None = None
    marginal_copy: float | None = None
    marginal_share: float | None = None
    residual_error: list[float] | None = None
    by_position: list[float] = field(default_factory=list)
    buckets: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def compare(
    model: nn.Module,
    documents: Sequence[Tensor],
    variants: Sequence[Variant],
    *,
    teacher: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch: int = 8,
    window: int = 32,
    residual: int = 4,
    pad: int = 0,
    progress: bool | None = None,
    seed: int = 0,
) -> list[Row]:
    """`measure` and `table` together: the teacher's row, then one per variant."""
    scores = measure(
        model, documents, variants, teacher=teacher, batch=batch, window=window, residual=residual, pad=pad,
        progress=progress,
    )  # fmt: skip
    return table(scores, seed=seed)


def table(scores: Sequence[Score], *, resamples: int = 1000, seed: int = 0) -> list[Row]:
    """Rows from scores on the same targets; the first is the teacher's.

    gap_closed needs a row "zero-token window", marginal the rows "student" and "linear_off". Intervals resample
    documents, the same ones for all rows, so that those of differences are paired; with one document there are none.
    """
    teacher, named = scores[0], {score.name: score for score in scores}
    copies = bool(teacher.targets.copy_N.any())
    sums = {score.name: _sums(score) for score in scores}
    draws = _draws(sums[teacher.name].shape[0], resamples, seed)
    rows = []
    for score in scores:
        others = [sums.get(name) for name in (TEACHER, WINDOW, LINEAR_OFF if score.name == STUDENT else "")]
        value = {k: float(v) for k, v in _figures(_whole(sums[score.name]), *map(_whole, others)).items()}
        spread = {}
        if draws is not None:
            again = _figures(draws @ sums[score.name], *(None if o is None else draws @ o for o in others))
            for name, values in again.items():
                sound = values[values.isfinite()]
                if len(sound):
                    low, high = sound.quantile(torch.tensor([0.025, 0.975], dtype=sound.dtype)).tolist()
                    spread[name] = (low, high)
        kept = {k: v for k, v in value.items() if math.isfinite(v)}
        if score.name == TEACHER or WINDOW not in named or score.name == WINDOW:
            kept.pop("gap_closed", None)
        rows.append(
            Row(
                name=score.name,
                documents=int(sums[score.name].shape[0]),
                tokens=len(score.nll_N),
                copy_share=float(teacher.targets.copy_N.double().mean()) if copies else None,
                residual_error=score.residual,
                by_position=_by_position(score),
                buckets=_buckets(score),
                intervals={name: pair for name, pair in spread.items() if name in kept},
                **kept,
            )
        )
    return rows


def _sums(score: Score) -> Tensor:
    """float64 [documents, 6]: tokens, nll, kl, agreement; tokens and nll of copies."""
    t = score.targets
    copy_N = t.copy_N.double()
    columns = [torch.ones_like(copy_N), score.nll_N, score.kl_N, score.agree_N, copy_N, score.nll_N * copy_N]
    present, index = t.doc_N.unique(return_inverse=True)
    stacked = torch.stack([c.double() for c in columns], 1)
    return torch.zeros(len(present), len(columns), dtype=torch.float64).index_add(0, index, stacked)


def _draws(documents: int, resamples: int, seed: int) -> Tensor | None:
    """float64 [resamples, documents]: how often each document is drawn."""
    if documents < 2 or not resamples:
        return None
    picks = torch.randint(documents, (resamples, documents), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, documents, dtype=torch.float64).scatter_add(1, picks, torch.ones_like(picks).double())


def _whole(sums: Tensor | None) -> Tensor | None:
    return None if sums is None else sums.sum(0)


def _figures(
    own: Tensor | None, teacher: Tensor | None, window: Tensor | None, linear_off: Tensor | None
) -> dict[str, Tensor]:
    """All figures of a row from column sums [..., 6]; not finite where there is nothing to divide by."""
    assert own is not None and teacher is not None
    tokens, nll, kl, agree, copies, copy_nll = own.unbind(-1)
    mean, copy = nll / tokens, copy_nll / copies
    found = {
        "nll": mean,
        "perplexity": mean.exp(),
        "kl": kl / tokens,
        "top1": agree / tokens,
        "ratio": (mean - teacher[..., 1] / tokens).exp(),
        "copy_nll": copy,
    }
    best = teacher[..., 5] / copies
    gap = None if window is None else window[..., 5] / copies - best
    if gap is not None:
        gap = torch.where(gap > 0, gap, torch.nan)
        found["gap_closed"] = 1 - (copy - best) / gap
    if linear_off is not None:
        found["marginal"] = linear_off[..., 1] / tokens - mean
        found["marginal_copy"] = linear_off[..., 5] / copies - copy
        if gap is not None:
            found["marginal_share"] = found["marginal_copy"] / gap
    return found


def _by_position(score: Score) -> list[float]:
    place = score.targets.position_N
    size = int(place.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add(0, place, score.nll_N.double())
    return (total / place.bincount(minlength=size).clamp(min=1))[1:].tolist()


def _buckets(score: Score) -> dict[str, float]:
    """Perplexity by powers of two of the position: "1-15", "16-31", "32-63", ..."""
    place, found = score.targets.position_N, {}
    low, high, last = 1, 16, int(place.max())
    while low <= last:
        inside = (place >= low) & (place < high)
        if inside.any():
            found[f"{low}-{min(high - 1, last)}"] = float(score.nll_N[inside].double().mean().exp())
        low, high = high, 2 * high
    return found
