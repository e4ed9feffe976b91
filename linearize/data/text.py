"""Text in, token ids out: reading files and hub datasets, packing documents, chat turns with a completion mask.

A packed sequence holds several documents. Each starts with the tokenizer's first token, and `position_ids` restart
there, which is how transformers (without an attention mask and without a cache) and linearize tell documents
apart: they never see each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linearize.data.examples import Examples
from linearize.data.reading import column_of, first_line, read_rows
from linearize.storage import write_atomic
from linearize.types import InputError, StorageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IGNORE = -100
Chat = list[dict[str, str]]


# --------------------------------------------------------------------------------------------------- reading
def read_texts(
    source: str | Path, *, split: str | None = None, text_column: str | None = None, limit: int | None = None
) -> list[str]:
    """The documents of `source`: a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a hub
    dataset (`name` or `name:config`).

    A text file is split at "<|endoftext|>" (pieces stripped) where it has one, otherwise it is one document as it
    stands. split: the hub dataset's, or the part of a folder's file names; "[100:200]" and "train[:5%]" cut out
    documents. limit: stop after so many. Raises InputError for a source that is missing, empty, not UTF-8, broken,
    or lacks the text column.
    """
    texts = []
    for row in read_rows(source, split, limit):
        text = row if isinstance(row, str) else row[column_of(row, text_column, source)]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{source}: the text column holds {type(text).__name__}; name another: data.text_column")
        if text and not text.isspace():
            texts.append(text)
    if not texts:
        raise InputError(f"{source}: no text in it; give a source with at least one non-empty document")
    return texts


def read_chats(
    source: str | Path, *, split: str | None = None, column: str | None = None, limit: int | None = None
) -> list[Chat]:
    """The conversations of `source` as lists of {"role", "content"}.

    Understood: a column "messages" or "conversations" (role/content or from/value), or Alpaca's columns
    instruction, input, output. Sources, `split`, `limit` as in `read_texts`. Raises InputError.
    """
    chats = []
    for row in read_rows(source, split, limit):
        chat = _chat(row, column) if isinstance(row, dict) else None
        if chat is None:
            has = f"columns {', '.join(row)}" if isinstance(row, dict) else "plain text"
            raise InputError(
                f"{source}: chat data needs a column 'messages' (role, content) or 'instruction' and 'output', this "
                f"has {has}; name the column, or set data.chat: false"
            )
        if chat:
            chats.append(chat)
    if not chats:
        raise InputError(f"{source}: no conversation in it")
    return chats


def _chat(row: dict[str, Any], column: str | None) -> Chat | None:
    turns = next((row[c] for c in ([column] if column else ["messages", "conversations"]) if c in row), None)
    if turns is None:
        if column or not {"instruction", "output"} <= row.keys():
            return None
        ask = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [{"role": "user", "content": ask}, {"role": "assistant", "content": row["output"]}]
    roles = {"human": "user", "gpt": "assistant"}
    chat = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            return None
        chat.append({"role": roles.get(role, role), "content": content})
    return chat


# -------------------------------------------------------------------------------------------------- sequences
class Tokens(Examples):
    """Sequences of token ids, map-style: item i is {"input_ids", "labels", "position_ids"}, int64 [length].

    position_ids restart at each document. labels are input_ids with -100 where nothing is to be learned: the first
    token of each document, and all but the assistant's turns under `completion_only`. They are not shifted
    (transformers shifts them).
    """

    def __init__(self, ids: Tensor, offsets: Tensor, starts: Tensor, learn: Tensor, settings: dict[str, Any]) -> None:
        """ids int32 [N] of all sequences end to end; offsets int64 [sequences + 1]; starts, learn bool [N]."""
        self.ids, self.offsets, self.starts, self.learn, self.settings = ids, offsets, starts, learn, settings
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        row = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ids = self.ids[row].long()
        places = torch.arange(len(ids))
        first = torch.where(self.starts[row], places, 0).cummax(0).values
        return {
            "input_ids": ids,
            "labels": torch.where(self.learn[row], ids, IGNORE),
            "position_ids": places - first,
        }

    @property
    def tokens(self) -> int:
        """Ids in all sequences together."""
        return int(self.offsets[-1] - self.offsets[0])

    @property
    def sizes(self) -> Tensor:
        """int64 [N]: ids in each sequence."""
        return self.offsets.diff()

    @property
    def length(self) -> int:
        """Ids in the longest sequence."""
        return int(self.sizes.max())

    @property
    def digest(self) -> str:
        """sha256 over ids and settings: equal digests mean equal data."""
        if self._digest is None:
            total = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
            span = slice(int(self.offsets[0]), int(self.offsets[-1]))
            for part in (self.ids[span], self.starts[span], self.learn[span], self.offsets - self.offsets[0]):
                total.update(memoryview(part.contiguous().numpy()).cast("B"))
            self._digest = total.hexdigest()
        return self._digest

    def take(self, start: int, stop: int | None = None) -> Tokens:
        """Sequences start..stop as a view."""
        stop = len(self) if stop is None else min(stop, len(self))
        if not 0 <= start < stop:
            raise InputError(f"no sequences between {start} and {stop}: the data has {len(self)}")
        return Tokens(self.ids, self.offsets[start : stop + 1], self.starts, self.learn, self.settings)

    def hold_out(self, tokens: int) -> tuple[Tokens, Tokens]:
        """(training, validation): the last sequences, `tokens` ids or a little more of them, apart from the rest."""
        ahead = self.offsets[-1] - self.offsets[:-1]
        keep = min(int((ahead >= tokens).sum()) - 1, len(self) - 1)
        if keep < 1:
            raise InputError(f"{self.tokens} tokens are too few to hold out {tokens}: give more text")
        return self.take(0, keep), self.take(keep)

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch [B, T]. Items of different length are padded on the right (with id 0, which the mask hides); items of
        one length come without a mask, since transformers tells packed documents apart only without it."""
        sizes = [len(item["input_ids"]) for item in items]
        if len(set(sizes)) == 1:
            return {name: torch.stack([item[name] for item in items]) for name in items[0]}
        fill = {"input_ids": 0, "labels": IGNORE, "position_ids": 0}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        batch["attention_mask"] = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
        return batch

    def check(self, config: PretrainedConfig, *, allow_longer: bool = False) -> None:
        """Raises InputError where the model of `config` cannot read these ids, or sequences of this length."""
        check_vocabulary(int(self.ids.max()), config)
        check_length(self.length, config, allow_longer)

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically; the same data are the same bytes. Raises StorageError."""
        from safetensors.torch import save

        parts = {"ids": self.ids, "offsets": self.offsets, "starts": self.starts, "learn": self.learn}
        # One metadata key: safetensors writes several in no fixed order.
        write_atomic(path, save(parts, metadata={"settings": json.dumps(self.settings, sort_keys=True)}))

    @classmethod
    def open(cls, path: str | Path) -> Tokens:
        """Reads what `save` wrote, memory-mapped. Raises StorageError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                settings = json.loads(file.metadata()["settings"])
                parts = {name: file.get_tensor(name) for name in ("ids", "offsets", "starts", "learn")}
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: not a readable file of tokens ({first_line(error)}); delete it") from None
        return cls(**parts, settings=settings)

    @classmethod
    def join(cls, parts: Sequence[Tokens], settings: dict[str, Any]) -> Tokens:
        """All sequences of `parts`, in order."""
        sizes = torch.cat([part.sizes for part in parts])
        spans = [slice(int(part.offsets[0]), int(part.offsets[-1])) for part in parts]

        def all_of(name: str) -> Tensor:
            return torch.cat([getattr(part, name)[span] for part, span in zip(parts, spans, strict=True)])

        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        return cls(all_of("ids"), offsets, all_of("starts"), all_of("learn"), settings)


def tokenize(
    texts: Sequence[str] | Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    pack: bool = True,
    bos: bool = True,
    chat: bool = False,
    completion_only: bool = False,
    minimum: int | None = None,
    seed: int | None = None,
) -> Tokens:
    """Documents (or, with `chat`, conversations through the chat template) as sequences of `length`.

    pack: documents end to end, cut where a sequence is full, the last incomplete one dropped. Otherwise each
    document is cut in pieces of `length` and pieces shorter than `minimum` (default `length`) are dropped; nothing
    is padded. Every piece of a cut document starts with the first token again: models trained with one have not
    seen text without. completion_only: learn the assistant's turns alone. seed: shuffle the documents before packing
    (None: as given). Raises InputError where there is too little text for one sequence.
    """
    if length < 2:
        raise InputError(f"data.length {length} is too short: a sequence needs at least 2 tokens")
    if completion_only and not chat:
        raise InputError("data.completion_only needs data.chat: plain text has no turns")
    first = first_token(tokenizer) if bos else None
    docs = _encode_chats(texts, tokenizer, completion_only) if chat else _encode(texts, tokenizer, first)
    if seed is not None:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        all_docs = list(docs)
        docs = iter([all_docs[i] for i in order])
    pieces = packed(docs, length, first) if pack else _cut(docs, length, first, length if minimum is None else minimum)
    settings = {"length": length, "pack": pack, "bos": first, "chat": chat, "completion_only": completion_only}
    tokens = assemble(pieces, settings | {"seed": seed})
    if tokens is None:
        raise InputError(f"the text is shorter than one sequence of {length} tokens: give more, or lower data.length")
    return tokens


def documents(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    bos: bool = True,
    cut: bool | None = None,
    limit: int | None = None,
) -> list[Tensor]:
    """One int64 tensor per document for evaluation: first token and text, the first `length` ids in all.

    cut: go on behind that, each further piece of `length` as a document of its own (starting with the first token
    again); None does so where there is one text only, a whole corpus in a file. limit: stop after so many documents.
    Those of fewer than two ids have nothing to predict and are left out. Raises InputError where none is left.
    """
    first = first_token(tokenizer) if bos else None
    docs = _encode(texts, tokenizer, first)
    if cut or (cut is None and len(texts) == 1):
        pieces = (ids for (ids, _), _ in _cut(docs, length, first, 2))
    else:
        pieces = (ids[:length] for ids, _ in docs if len(ids) > 1)
    found = [torch.from_numpy(ids.astype(np.int64)) for ids in islice(pieces, limit)]
    if not found:
        raise InputError("no document with at least two tokens to evaluate on: give more text")
    return found


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id a document starts with: BOS, or None where there is none, or where it only opens chat turns (the
    instruct models that declare <|im_start|> as BOS never saw a plain document behind it)."""
    bos: Any = tokenizer.bos_token_id
    if bos is None or not getattr(tokenizer, "chat_template", None):
        return bos
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    return None if tokenizer.apply_chat_template(turns, tokenize=False).count(tokenizer.bos_token) > 1 else bos


def check_length(length: int, config: PretrainedConfig, allow_longer: bool = False) -> None:
    """Raises InputError where sequences of `length` exceed the model's positions.

    allow_longer: the caller knows that positions do not bind (every layer linear without RoPE, or --allow-longer).
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit and not allow_longer:
        raise InputError(
            f"sequences of {length} tokens are longer than the model's {limit} positions: set data.length to at most "
            f"{limit}, or pass --allow-longer"
        )


def check_vocabulary(largest: int, config: PretrainedConfig) -> None:
    """Raises InputError where the id `largest` is not in the model's vocabulary."""
    size = config.get_text_config().vocab_size
    if largest >= size:
        raise InputError(
            f"the data holds token id {largest}, but the model knows ids below {size}: use the tokenizer that came "
            "with the model"
        )


# ------------------------------------------------------------------------------------------------ inner parts
Doc = tuple[np.ndarray, np.ndarray]  # ids int32, learn bool


def _encode(texts: Sequence[str], tokenizer: Any, first: int | None, chunk: int = 512) -> Iterator[Doc]:
    head = [] if first is None else [first]
    for at in range(0, len(texts), chunk):
        part = list(texts[at : at + chunk])
        for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            doc = np.array(head + ids, dtype=np.int32)
            yield doc, np.ones(len(doc), dtype=bool)


def _encode_chats(chats: Sequence[Any], tokenizer: Any, completion_only: bool) -> Iterator[Doc]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template: set data.chat: false, or use the instruct model's")
    for chat in chats:
        if isinstance(chat, str):
            raise InputError("data.chat needs conversations (lists of role and content), not plain text")
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        coded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=completion_only)
        ids = np.array(coded["input_ids"], dtype=np.int32)
        learn = np.full(len(ids), not completion_only)
        if completion_only:
            begin = np.array([start for start, _ in coded["offset_mapping"]])
            for start, stop in _completions(chat, text, tokenizer):
                learn |= (begin >= start) & (begin < stop)
        yield ids, learn


def _completions(chat: Chat, text: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Where in `text` the assistant's turns are, its end-of-turn mark included."""
    for place, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(chat[:place], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(chat[: place + 1], tokenize=False)
        if not (text.startswith(before) and text.startswith(after)):
            raise InputError(
                "this model's chat template rewrites earlier turns, so that completions cannot be told from it: set "
                "data.completion_only: false, or give conversations of one exchange"
            )
        yield len(before), len(after)


def packed(docs: Iterable[Doc], length: int, first: int | None) -> Iterator[tuple[Doc, bool]]:
    """Pieces that fill sequences of `length` exactly; the flag says whether a sequence ends after the piece."""
    room = length
    for ids, learn in docs:
        at = 0
        while at < len(ids):
            piece, at = _piece(ids, learn, at, room, first)
            room -= len(piece[0])
            yield piece, room == 0
            room = room or length


def _cut(docs: Iterable[Doc], length: int, first: int | None, minimum: int) -> Iterator[tuple[Doc, bool]]:
    for ids, learn in docs:
        at = 0
        while at < len(ids):
            piece, at = _piece(ids, learn, at, length, first)
            if len(piece[0]) >= max(minimum, 2):
                yield piece, True


def _piece(ids: np.ndarray, learn: np.ndarray, at: int, room: int, first: int | None) -> tuple[Doc, int]:
    """At most `room` ids from place `at` on, behind the first token where the document began with it."""
    again = at > 0 and first is not None and ids[0] == first
    stop = min(len(ids), at + room - again)
    part, mark = ids[at:stop], learn[at:stop].copy()
    if again:
        part, mark = np.concatenate([ids[:1], part]), np.concatenate([[False], mark])
    mark[0] = False
    return (part, mark), stop


def assemble(pieces: Iterable[tuple[Doc, bool]], settings: dict[str, Any]) -> Tokens | None:
    """Sequences out of pieces (each one document or part of one); None where no sequence is complete."""
    ids, learn, starts, ends, total = [], [], [], [0], 0
    for (part, mark), full in pieces:
        begin = np.zeros(len(part), dtype=bool)
        begin[0] = True
        ids.append(part)
        learn.append(mark)
        starts.append(begin)
        total += len(part)
        if full:
            ends.append(total)
    if len(ends) == 1:
        return None
    keep = ends[-1]
    flat = [torch.from_numpy(np.concatenate(part)[:keep].copy()) for part in (ids, starts, learn)]
    return Tokens(flat[0], torch.tensor(ends), flat[1], flat[2], settings)
