"""Is the student's attention like the teacher's? Entropy, monotonicity and range of each row, by layer and head.

One forward as the teacher; at each site both weight matrices are built from the same q and k (T x T: use documents of
a few hundred tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.evaluate.quality import evaluating
from linearize.stages.base import inputs
from linearize.types import Context, InputError, Site

if TYPE_CHECKING:
    from linearize.mixers.base import Mixer
    from linearize.surgery.attach import Surgery

_SIDES = ("teacher", "student")
_RANKED = 8  # a rank correlation over fewer keys says little: such rows are left out of monotonicity


@dataclass(frozen=True)
class Diagnostics:
    """Means over the rows (queries) of all documents, by [layer][head], of teacher and student.

    entropy: of a row's weights, nats. normalised: the same over log(keys seen): 1 is uniform. monotonicity: Spearman
    correlation of weights with the logits q . k (1: a softmax without bias). reach: effective sequence length of
    LoLCATs' equation 9, the mean distance a row looks back, in tokens. entropy_by_position: [layer][range], heads
    together, with `ranges` as "1-15", ...
    """

    layers: list[int]
    names: list[str]
    entropy: dict[str, list[list[float]]]
    normalised: dict[str, list[list[float]]]
    monotonicity: dict[str, list[list[float]]]
    reach: dict[str, list[list[float]]]
    ranges: list[str]
    entropy_by_position: dict[str, list[list[float]]]

    def as_dict(self) -> dict[str, Any]:
        """For `report.looks.Diagnostics` (without pictures)."""
        return {"layers": self.layers, "entropy": self.entropy, "monotonicity": self.monotonicity}


#: int64 ids of one document, or a batch of one example
Document = Tensor | dict[str, Tensor]


def diagnose(surgery: Surgery, documents: Sequence[Document]) -> Diagnostics:
    """Diagnostics of every converted layer whose mixer has weights, on a few documents. Layers that share a module are
    looked at together.

    Raises InputError where no mixer has a dense form, or there is no document.
    """
    totals: dict[str, dict[str, Tensor]] = {}
    sites: dict[str, Site] = {}
    width = 0

    def look(site: Site, mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, out: Tensor) -> None:
        nonlocal width
        logits_BHTS = _logits(q, k, ctx)
        weights = both_weights(site, mixer, q, k, v, ctx)
        if weights is None:
            return
        sites[site.name] = site
        width = max(width, 1 + _range(q.shape[2] - 1))
        sums = totals.setdefault(site.name, {})
        seen_TT = ctx.visible(q, window=site.shape.window)[0]
        for side, weights_BHTS in zip(_SIDES, weights, strict=True):
            for name, value in _rows(weights_BHTS, logits_BHTS, seen_TT).items():
                key = f"{side} {name}"
                sums[key] = value if key not in sums else _plus(sums[key], value)

    watched(surgery, documents, look)
    if not totals:
        raise InputError(f"method {surgery.method!r} has no attention weights to look at, or no document was given")
    order = [site.name for site in surgery.sites if site.name in totals]

    def means(name: str, count: str) -> dict[str, list[list[float]]]:
        found = {}
        for side in _SIDES:
            pairs = [(totals[site][f"{side} {name}"], totals[site][f"{side} {count}"]) for site in order]
            found[side] = [(total / n.clamp(min=1)).tolist() for total, n in pairs]
        return found

    return Diagnostics(
        layers=[place if sites[name].layer is None else sites[name].layer for place, name in enumerate(order)],
        names=order,
        entropy=means("entropy", "rows"),
        normalised=means("normalised", "rows"),
        monotonicity=means("monotonicity", "ranked"),
        reach=means("reach", "rows"),
        ranges=[f"{2 ** (r + 3) if r else 1}-{2 ** (r + 4) - 1}" for r in range(width)],
        entropy_by_position=means("by_position", "position_rows"),
    )


def dense_maps(
    surgery: Surgery, document: Document, heads: Mapping[int, Sequence[int]] | None = None
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """(layer, head) -> {"teacher", "student"}: weights [T, T] float32 on the CPU, for pictures; and further maps
    that the method has, by their names.

    heads: by layer number, those wanted (None: head 0 of the first, middle and last converted layer). Layers that
    are not converted, or whose mixer has no weights, are left out.
    """
    numbers = {s.name: place if s.layer is None else s.layer for place, s in enumerate(surgery.sites)}
    if heads is None:
        layers = list(numbers.values())
        heads = {layer: [0] for layer in (layers[0], layers[len(layers) // 2], layers[-1])}
    found: dict[tuple[int, int], dict[str, Tensor]] = {}

    def look(site: Site, mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, out: Tensor) -> None:
        layer = numbers[site.name]
        weights = both_weights(site, mixer, q, k, v, ctx) if layer in heads else None
        if weights is not None:
            named = {**dict(zip(_SIDES, weights, strict=True)), **mixer.maps(q, k, v, ctx)}
            for head in heads[layer]:
                found[layer, head] = {name: w[0, head].detach().float().cpu() for name, w in named.items()}

    watched(surgery, [document], look)
    return found


def teacher_weights(site: Site, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context) -> Tensor:
    """Softmax weights [B, H, T, T] from q and k: with the teacher's own window, padding and packed documents, without
    what is not in the scores (soft-cap, learned sinks, ALiBi; `site.drops` names them)."""
    scores = _logits(q_BHTK, k_BGTK, ctx)
    seen = ctx.visible(q_BHTK, window=site.shape.window)[:, None]
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0)


def watched(surgery: Surgery, documents: Sequence[Document], look: Any) -> None:
    """One forward of each document as the teacher, every site shown to `look`."""
    with surgery.watch(look), evaluating(surgery.model):
        for document in documents:
            batch = document if isinstance(document, dict) else {"input_ids": document[None]}
            surgery.model(**inputs(surgery.model, batch))


def both_weights(
    site: Site, mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context
) -> tuple[Tensor, Tensor] | None:
    """Weights of teacher and student, or None where the mixer has none."""
    try:
        student = mixer.dense(q, k, v, ctx)
    except NotImplementedError:  # a third party's mixer may have no weights to show
        return None
    return teacher_weights(site, q, k, ctx), student


def _logits(q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context) -> Tensor:
    group = q_BHTK.shape[1] // k_BGTK.shape[1]
    return q_BHTK.double() @ k_BGTK.double().repeat_interleave(group, 1).mT * ctx.scale


def _range(position: int) -> int:
    """0 for positions up to 15, 1 for 16-31, 2 for 32-63, ..."""
    return max(0, int(math.log2(max(position, 1))) - 3)


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """Sums over ranges of positions, of which longer documents have more."""
    if a.shape == b.shape:
        return a + b
    return torch.nn.functional.pad(a, (0, max(0, len(b) - len(a)))) + torch.nn.functional.pad(
        b, (0, max(0, len(a) - len(b)))
    )


def _rows(weights_BHTS: Tensor, logits_BHTS: Tensor, seen_TT: Tensor) -> dict[str, Tensor]:
    """Sums by head, over the rows that see two keys or more (of causal attention position 0 sees itself alone)."""
    w = weights_BHTS.double()
    T, H = w.shape[-1], w.shape[1]
    place = torch.arange(T, device=w.device)
    keys = seen_TT.sum(-1)
    rows, ranked = keys >= 2, keys >= _RANKED
    entropy = torch.special.entr(w.clamp(min=0)).sum(-1)[0]
    reach = (w * (place[:, None] - place).abs()).sum(-1)[0]
    ranges = torch.tensor([_range(t) for t in range(T)], device=w.device)
    spans = torch.nn.functional.one_hot(ranges)[rows].double()
    return {
        "entropy": entropy[:, rows].sum(1).cpu(),
        "normalised": (entropy / keys.double().log().clamp(min=1e-12))[:, rows].sum(1).cpu(),
        "reach": reach[:, rows].sum(1).cpu(),
        "rows": torch.full((H,), float(rows.sum()), dtype=torch.float64),
        "monotonicity": spearman(logits_BHTS[0], w[0], seen_TT)[:, ranked].sum(1).cpu(),
        "ranked": torch.full((H,), float(ranked.sum()), dtype=torch.float64),
        "by_position": (entropy[:, rows].sum(0) @ spans).cpu(),
        "position_rows": (H * spans.sum(0)).cpu(),
    }


def spearman(x_HTS: Tensor, y_HTS: Tensor, seen_TT: Tensor | None = None) -> Tensor:
    """Rank correlation [H, T] of row t over the keys it sees (None: 0..t), ties by their mean rank; 0 where one of them
    is constant."""
    T = x_HTS.shape[-1]
    seen = torch.ones(T, T, dtype=torch.bool, device=x_HTS.device).tril() if seen_TT is None else seen_TT
    count = seen.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.double().masked_fill(~seen, torch.inf).contiguous()
        sorted_values = values.sort(-1).values
        low = torch.searchsorted(sorted_values, values, right=False)
        high = torch.searchsorted(sorted_values, values, right=True)
        rank = (low + high - 1) / 2
        return (rank - (count - 1) / 2) * seen

    x, y = centred(x_HTS), centred(y_HTS)
    norm = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return torch.where(norm > 0, (x * y).sum(-1) / norm.clamp(min=1e-12), 0.0)
