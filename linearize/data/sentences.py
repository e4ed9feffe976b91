"""Texts as an encoder takes them: each whole, or cut into passages; padded on the right. Pairs with scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.data.examples import Examples
from linearize.data.labels import NO_LABELS, check_labels, label_numbers
from linearize.data.reading import column_of, read_rows, read_text, split_of
from linearize.data.text import check_vocabulary
from linearize.types import InputError, Unsupported, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: model types whose positions begin behind the padding id
_BEHIND_PADDING = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet"),
    *("longformer", "xmod", "ibert", "luke"),
}


# --------------------------------------------------------------------------------------------------------- reading
def read_sentences(
    source: str | Path,
    *,
    split: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    lines: bool = True,
) -> tuple[list[str], list[Any] | None]:
    """(texts, labels) of a source as `text.read_texts` takes it; of plain text each line that is not blank (lines), or
    each document. label_column: of a table, where its labels are wanted. Raises InputError, StorageError."""
    wanted = None if label_column == NO_LABELS else label_column
    texts: list[str] = []
    labels: list[Any] = []
    for row in read_rows(source, split, limit, lines=lines):
        if isinstance(row, str):
            if wanted is not None:
                raise InputError(f"{source}: plain text has no labels {wanted!r}: give a table, or leave them out")
            text = row
        else:
            text = row[column_of(row, text_column, source)]
            if wanted is not None:
                labels.append(row[column_of(row, wanted, source)])
        if not isinstance(text, str | None):
            raise InputError(f"{source}: the text column holds {type(text).__name__}; name another: data.text_column")
        if text and not text.isspace():
            texts.append(text)
        elif wanted is not None:
            labels.pop()
    if not texts:
        raise InputError(f"{source}: no text in it; give a source with at least one text that is not blank")
    return texts, labels if wanted is not None else None


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts and how alike people found them: scores float64 [N], on any scale."""

    first: list[str]
    second: list[str]
    scores: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @property
    def texts(self) -> list[str]:
        """All first ones, then all second ones."""
        return self.first + self.second


def read_pairs(
    source: str | Path,
    *,
    split: str | None = None,
    columns: Sequence[str] = ("sentence1", "sentence2", "score"),
    limit: int | None = None,
) -> Pairs:
    """Scored pairs: a table with these columns (source and split as in `text.read_texts`), or the STS benchmark's own
    files: tab-separated genre, file, year, id, score and both sentences, no header, no quoting.

    Raises InputError for a source that is neither, a score that is no number, and scores that are all alike.
    """
    rows = _sts_rows(source, split)
    if rows is None:
        rows = (_pair(row, columns, source) for row in read_rows(source, split, limit))
    first, second, scores = [], [], []
    for number, (one, other, score) in enumerate(rows, 1):
        if limit is not None and number > limit:
            break
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or not (isinstance(one, str) and isinstance(other, str)):
            raise InputError(f"{source}, pair {number}: two texts and a number are expected, found score {score!r}")
        first.append(one)
        second.append(other)
        scores.append(value)
    if len(set(scores)) < 2:
        raise InputError(f"{source}: {len(scores)} pairs with one score: a rank correlation needs scores that differ")
    return Pairs(first, second, torch.tensor(scores, dtype=torch.float64))


def _sts_rows(source: str | Path, split: str | None) -> Iterator[tuple[str, str, str]] | None:
    """The rows of an STS benchmark file; None where it is none."""
    path = Path(source).expanduser()
    if not path.is_file() or path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return None
    lines = [(n, line.split("\t")) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    first = lines[0][1] if lines else []
    if len(first) < 7 or not first[4].replace(".", "", 1).isdecimal():
        return None
    for number, line in lines:
        if len(line) < 7:
            raise InputError(f"{source}, line {number}: {len(line)} fields, 7 separated by tabs are expected")
    return ((line[5], line[6], line[4]) for _, line in split_of(split)[1](lines))


def _pair(row: Any, columns: Sequence[str], source: str | Path) -> tuple[Any, ...]:
    if isinstance(row, str):
        raise InputError(f"{source}: plain text holds no pairs; give a table with columns {', '.join(columns)}")
    for name in columns:
        if name not in row:
            raise InputError(f"{source}: no column {name!r} for pairs; {nearest(name, list(row))}")
    return tuple(row[name] for name in columns)


# ------------------------------------------------------------------------------------------------------- sequences
@dataclass(frozen=True)
class Form:
    """How a tokenizer frames one text: `head` and `tail` ids (CLS, SEP), the padding id, whether there are types."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    pad: int
    types: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Form:
        """Read off one encoded text. Raises Unsupported where a text is framed by more than ids before and after."""
        coded = tokenizer("a b", return_special_tokens_mask=True, verbose=False)
        marks, ids = coded["special_tokens_mask"], coded["input_ids"]
        inner = tokenizer("a b", add_special_tokens=False, verbose=False)["input_ids"]
        start = next((place for place, mark in enumerate(marks) if not mark), 0)
        if ids[start : start + len(inner)] != inner or any(coded.get("token_type_ids", [])):
            raise Unsupported(f"{type(tokenizer).__name__} does not frame a text by ids before and after it alone")
        pad = tokenizer.pad_token_id
        return cls(tuple(ids[:start]), tuple(ids[start + len(inner) :]), pad or 0, "token_type_ids" in coded)

    @property
    def size(self) -> int:
        return len(self.head) + len(self.tail)


class Sentences(Examples):
    """Texts as token ids; item i is {"input_ids", "attention_mask", "token_type_ids" where the model has them}: int64
    [length], and "labels" where known. notes: what a user may not have expected."""

    def __init__(
        self,
        ids: Tensor,
        starts: Tensor,
        stops: Tensor,
        form: Form,
        *,
        labels: Tensor | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """ids int32 of all texts, without what frames them; text i is ids[starts[i] : stops[i]]; labels int64 [N]."""
        self.ids, self.starts, self.stops, self.form = ids, starts, stops, form
        self.labels, self.notes = labels, tuple(notes)
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        inner = self.ids[int(self.starts[index]) : int(self.stops[index])].long()
        ids = torch.cat([torch.tensor(self.form.head).long(), inner, torch.tensor(self.form.tail).long()])
        item = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.form.types:
            item["token_type_ids"] = torch.zeros_like(ids)
        return item if self.labels is None else item | {"labels": self.labels[index]}

    @property
    def sizes(self) -> Tensor:
        """int64 [N]: positions of each text, its frame among them."""
        return self.stops - self.starts + self.form.size

    @property
    def tokens(self) -> int:
        return int(self.sizes.sum())

    @property
    def length(self) -> int:
        return int(self.sizes.max())

    @property
    def digest(self) -> str:
        """sha256 over ids, labels and frame."""
        if self._digest is None:
            form = self.form
            total = hashlib.sha256(json.dumps([form.head, form.tail, form.pad, form.types]).encode())
            for part in (self.sizes, self.labels):
                if part is not None:
                    total.update(memoryview(part.contiguous().numpy()).cast("B"))
            for start, stop in zip(self.starts.tolist(), self.stops.tolist()):
                if stop > start:
                    total.update(memoryview(self.ids[start:stop].numpy()).cast("B"))
            self._digest = total.hexdigest()
        return self._digest

    def take(self, start: int, stop: int | None = None) -> Sentences:
        """Texts start..stop as a view."""
        stop = len(self) if stop is None else min(stop, len(self))
        if not 0 <= start < stop:
            raise InputError(f"no texts between {start} and {stop}: the data has {len(self)}")
        labels = None if self.labels is None else self.labels[start:stop]
        rows = slice(start, stop)
        return Sentences(self.ids, self.starts[rows], self.stops[rows], self.form, labels=labels, notes=self.notes)

    def hold_out(self, tokens: int) -> tuple[Sentences, Sentences]:
        """(training, validation): the last texts, `tokens` positions or a little more of them, apart from the rest."""
        behind = self.sizes.flip(0).cumsum(0).flip(0)
        keep = min(int((behind >= tokens).sum()) - 1, len(self) - 1)
        if keep < 1:
            raise InputError(f"{self.tokens} tokens are too few to hold out {tokens}: give more text")
        return self.take(0, keep), self.take(keep)

    def halves(self) -> tuple[Sentences, Sentences]:
        """The first and the second half of each text, each framed as a text of its own. Raises InputError where one
        has fewer than two tokens."""
        if int((self.stops - self.starts).min()) < 2:
            raise InputError("a text of fewer than two tokens has no halves: give passages")
        middle = (self.starts + self.stops) // 2
        return Sentences(self.ids, self.starts, middle, self.form), Sentences(self.ids, middle, self.stops, self.form)

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch [B, T], padded on the right, always with an `attention_mask`."""
        fill = {"input_ids": self.form.pad}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([i[name] for i in items], True, fill.get(name, 0))
            for name in items[0]
            if name != "labels"
        }
        return batch | {"labels": torch.stack([i["labels"] for i in items])} if "labels" in items[0] else batch

    def check(self, config: Any, *, allow_longer: bool = False) -> None:
        """Raises InputError where the model of `config` cannot read these ids, this length or these labels."""
        largest = int(self.ids.max()) if len(self.ids) else 0
        check_vocabulary(max(largest, *self.form.head, *self.form.tail, 0), config)
        limit = positions(config)
        if limit is not None and self.length > limit and not allow_longer:
            raise InputError(
                f"texts of {self.length} tokens are longer than the model's {limit} positions: set data.length to at "
                f"most {limit}, or pass --allow-longer"
            )
        check_labels(self.labels, config)


def positions(config: Any) -> int | None:
    """How many tokens a model of `config` has positions for; None where they do not end."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    behind = any(getattr(kind, "model_type", None) in _BEHIND_PADDING for kind in type(text).__mro__)
    return limit - (text.pad_token_id or 0) - 1 if limit is not None and behind else limit


def sentences(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    *,
    length: int | None = None,
    minimum: int | None = None,
    cut: bool = False,
    labels: Sequence[Any] | None = None,
    seed: int | None = None,
) -> Sentences:
    """Each text as one example of at most `length` tokens (None: what model and tokenizer take), what frames it
    included; longer ones end there, and `notes` say how many.

    cut: a longer text becomes passages of `minimum` (default half of `length`) to `length` tokens instead, each to the
    end of a sentence (else of a word) where one ends within these bounds; shorter ones are left out. labels: one each,
    as the head of `config` numbers or names them. seed: shuffle the texts first. Raises InputError, Unsupported.
    """
    form = Form.of(tokenizer)
    limits = [limit for limit in (positions(config), tokenizer.model_max_length) if limit is not None and limit < 1e9]
    length = length or min(limits, default=512)
    room, least = length - form.size, (minimum or length // 2) - form.size
    if room < 2 or (cut and not 0 < least <= room):
        raise InputError(
            f"data.length {length} and data.minimum {minimum or length // 2} leave no room: {form.size} tokens frame a "
            "text, and the minimum must not be above the length"
        )
    if cut and labels is not None:
        raise InputError("labels are of whole texts: do not cut them into passages, or leave the labels out")
    order = list(range(len(texts)))
    if seed is not None:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces: list[Tensor] = []
    starts, stops, at, over, short = [], [], 0, 0, 0
    for ids, text, offsets in _encoded([texts[i] for i in order], tokenizer, cut):
        spans = [(0, min(len(ids), room))]
        over += len(ids) > room
        if cut:
            spans = list(_passages(text, offsets, least, room))
            short += spans[-1][1] < len(ids)
        pieces.append(torch.tensor(ids, dtype=torch.int32))
        starts += [at + start for start, stop in spans if stop > start or not cut]
        stops += [at + stop for start, stop in spans if stop > start or not cut]
        at += len(ids)
    if not starts:
        raise InputError(f"no text has {minimum or length // 2} tokens: give longer ones, or lower data.minimum")
    notes = []
    if over and not cut:
        notes.append(f"{over:,} of {len(texts):,} texts are longer than {length} tokens: their ends are left out")
    if short:
        notes.append(f"the ends of {short:,} of {len(texts):,} texts are shorter than a passage and left out")
    numbers = None
    if labels is not None:
        numbers, more = label_numbers([labels[i] for i in order], None, config, "the labels")
        notes += more
    return Sentences(torch.cat(pieces), torch.tensor(starts), torch.tensor(stops), form, labels=numbers, notes=notes)


def _encoded(
    texts: Sequence[str], tokenizer: Any, offsets: bool, chunk: int = 512
) -> Iterator[tuple[list[int], str, list[tuple[int, int]]]]:
    """(ids without a frame, the text, where in it each id stands)"""
    if offsets and not tokenizer.is_fast:
        raise Unsupported(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand, so that it cannot be cut into "
            "passages: give short texts, or take the model's fast tokenizer"
        )
    for at in range(0, len(texts), chunk):
        part = list(texts[at : at + chunk])
        coded = tokenizer(part, add_special_tokens=False, verbose=False, return_offsets_mapping=offsets)
        yield from zip(coded["input_ids"], part, coded["offset_mapping"] if offsets else [[]] * len(part))


def _passages(text: str, offsets: list[tuple[int, int]], least: int, room: int) -> Iterator[tuple[int, int]]:
    """Spans of tokens, each of `least` to `room` but the last (start = stop: too short), all of them in order."""
    at = 0
    while len(offsets) - at > room:
        ends = range(at + room, at + least - 1, -1)
        stop = next((end for end in ends if _ends_sentence(text, offsets[end - 1][1])), None)
        if stop is None:
            stop = next((end for end in ends if _starts_word(text, offsets[end][0])), at + room)
        yield at, stop
        at = stop
    yield at, len(offsets) if len(offsets) - at >= least else at


def _ends_sentence(text: str, place: int) -> bool:
    return text[place : place + 1].isspace() and text[max(place - 3, 0) : place].rstrip("\"')\u201d\u2019")[-1:] in set(
        ".!?"
    )


def _starts_word(text: str, place: int) -> bool:
    return place == 0 or text[place - 1].isspace() or text[place : place + 1].isspace()
