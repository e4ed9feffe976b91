"""The teacher writes its own training data: batched sampling, seeded shard by shard, resumable at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.data.text import Chat, Tokens, assemble, check_length, first_token, packed
from linearize.progress import bar
from linearize.seams.cache import growing_cache
from linearize.storage import write_atomic
from linearize.types import InputError, StageReport, StorageError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
#: seconds of each shard, beside the index: no part of the data
TIMES = "seconds.json"
#: Parameter names of what surgery and LoRA added: not the teacher's.
ADDED = ("linearize_mixer", "lora_")


def selfgen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    *,
    seed: int = 0,
    batch: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompts: Sequence[str] | Sequence[Chat] | None = None,
    completion_only: bool = False,
    allow_longer: bool = False,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> Tokens:
    """At least `tokens` ids sampled from `model`, as sequences of `length`.

    Without prompts each sequence starts with the first token (where there is none: with a frequent one, drawn by the
    seed) and is sampled to the end; behind an end of text a new document begins in the same sequence. With prompts
    (texts, or conversations that end with the user) each is completed once per round, prompts and completions are
    packed, and `completion_only` masks the prompts in the labels.

    Shard i is drawn from the seed and i alone, so the same call writes the same bytes, and asking for more tokens
    continues where a smaller call ended. folder: shards are kept there (`shard-00000.safetensors`, `index.json`) and
    found again after an interruption; it must belong to this model and these settings. progress: None shows a bar if
    stderr is a terminal. Run it with the mixers off (`surgery.teacher()`). Raises InputError, StorageError.
    """
    if tokens < 1 or batch < 1 or temperature <= 0 or not 0 < top_p <= 1:
        raise InputError("self-generated data needs tokens and batch of at least 1, temperature > 0, 0 < top_p <= 1")
    check_length(length, model.config, allow_longer)
    asked = None if prompts is None else _prompt_ids(prompts, tokenizer, length)
    settings = {
        "version": VERSION,
        "model": fingerprint(model),
        "seed": seed,
        "batch": batch,
        "length": length,
        "temperature": temperature,
        "top_p": top_p,
        "prompts": None if asked is None else _hash(json.dumps(asked).encode()),
        "completion_only": completion_only,
    }
    store = Store(folder, settings)
    writer = _Writer(model, tokenizer, settings, asked)
    shards: list[Tokens] = []
    with bar("the teacher writes its data", tokens, progress) as advance:
        while (have := sum(shard.tokens for shard in shards)) < tokens:
            shard = store.read(len(shards))
            if shard is None:
                start = time.perf_counter()
                shard = writer.shard(len(shards))
                store.write(len(shards), shard, time.perf_counter() - start)
            shards.append(shard)
            advance(min(shard.tokens, tokens - have))
    data = Tokens.join(shards, settings)
    enough = int((data.offsets < tokens).sum())  # whole sequences, the last one reaching `tokens`
    taken = data.take(0, enough)
    taken.made = store.made(len(shards), taken.tokens)
    return taken


class _Writer:
    """Makes shard i, whatever was made before."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], asked: list[list[int]] | None) -> None:
        self.model, self.settings, self.asked = model, settings, asked
        self.first = first_token(tokenizer)
        self.ends = end_tokens(model, tokenizer)
        if asked is None and self.first is None:
            self.openers = frequent_tokens(tokenizer)

    def shard(self, number: int) -> Tokens:
        # Not seed + number: neighbouring seeds would share shards.
        mixed = int.from_bytes(hashlib.sha256(f"{self.settings['seed']}/{number}".encode()).digest()[:7], "big")
        if self.asked is None:
            return self._free(mixed)
        return self._completed(number, mixed)

    def _free(self, seed: int) -> Tokens:
        rows, length, first = self.settings["batch"], self.settings["length"], self.first
        if first is None:
            opening = torch.tensor(random.Random(seed).choices(self.openers, k=rows))[:, None]
        else:
            opening = torch.full((rows, 1), first)
        ids = self._sample(opening, None, length - 1, seed, stop=False).int()
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 0] = True
        if first is not None:
            starts |= ids == first
        else:  # nothing stands between the end of one text and the next
            starts[:, 1:] |= torch.isin(ids[:, :-1], torch.tensor(self.ends, dtype=ids.dtype))
        offsets = torch.arange(0, ids.numel() + 1, length)
        return Tokens(ids.flatten(), offsets, starts.flatten(), ~starts.flatten(), {})

    def _completed(self, number: int, seed: int) -> Tokens:
        assert self.asked is not None
        length, size = self.settings["length"], self.settings["batch"]
        order = list(range(len(self.asked)))
        turn, at = divmod(number * size, len(order))
        chosen: list[int] = []
        while len(chosen) < size:  # each round goes through all prompts, in an order of its own
            random.Random(f"{self.settings['seed']}/{turn}").shuffle(order)
            chosen += order[at : at + size - len(chosen)]
            order, turn, at = list(range(len(order))), turn + 1, 0
        given = [self.asked[i] for i in chosen]
        width = max(map(len, given))
        pad = self.ends[0] if self.ends else 0
        padded = torch.tensor([[pad] * (width - len(g)) + g for g in given])
        mask = torch.tensor([[0] * (width - len(g)) + [1] * len(g) for g in given])
        out = self._sample(padded, mask, length - min(map(len, given)), seed, stop=True)
        docs = []
        for row, prompt in zip(out.tolist(), given, strict=True):
            answer = row[width : width + length - len(prompt)]
            stop = next((i + 1 for i, token in enumerate(answer) if token in self.ends), len(answer))
            ids = np.array(prompt + answer[:stop], dtype=np.int32)
            learn = np.ones(len(ids), dtype=bool)
            learn[: len(prompt)] = not self.settings["completion_only"]
            docs.append((ids, learn))
        shard = assemble(packed(iter(docs), length, self.first), {})
        if shard is None:
            raise InputError(
                f"{size} completions are shorter than one sequence of {length} tokens: raise the batch or lower "
                "data.length"
            )
        return shard

    def _sample(self, ids: Tensor, mask: Tensor | None, new: int, seed: int, *, stop: bool) -> Tensor:
        settings = self.settings
        processors = []
        if not stop and self.first is not None and self.first not in self.ends:
            processors.append(_Restart(self.ends, self.first))
        return sample(
            self.model,
            ids,
            mask,
            new,
            seed=seed,
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            ends=self.ends if stop else [],
            processors=processors,
        )


class _Restart:
    """A logits processor: behind an end of text, the first token."""

    def __init__(self, ends: list[int], first: int) -> None:
        self.ends, self.first = torch.tensor(ends, dtype=torch.long), first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        over = torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        return torch.where(over[:, None], _only(scores, self.first), scores) if over.any() else scores


class _Draw:
    """A logits processor that draws the next token by one uniform number per row, and leaves nothing to choose.

    generate's own sampling draws one number per row and piece: at 32,000 pieces that is 40 % of a small model's time.
    And this one depends on no global random state.
    """

    def __init__(self, seed: int, temperature: float, top_p: float) -> None:
        self.numbers = torch.Generator().manual_seed(seed)
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chance = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            high, order = chance.sort(-1, descending=True)
            beyond = high.cumsum(-1) - high >= self.top_p  # the piece that crosses top_p stays
            chance = chance.scatter(-1, order, high.masked_fill(beyond, 0))
        cumulated = chance.cumsum(-1)
        at = torch.rand(len(scores), 1, generator=self.numbers).to(scores.device)
        drawn = torch.searchsorted(cumulated, at * cumulated[:, -1:], right=True)
        return _only(scores, drawn.clamp(max=scores.shape[-1] - 1))


def _only(scores: Tensor, token: Tensor | int) -> Tensor:
    """Scores that leave `token` alone: an id, or ids [B, 1]."""
    index = torch.full_like(scores[:, :1], token, dtype=torch.long) if isinstance(token, int) else token
    return torch.full_like(scores, -torch.inf).scatter(-1, index, 0.0)


def sample(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
    new: int,
    *,
    seed: int | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    ends: Sequence[int] = (),
    processors: Sequence[Any] = (),
) -> Tensor:
    """`ids` [B, T] (padded on the left where `mask` is 0) and `new` further ids each: int64 [B, T + new], on the CPU.

    seed None: greedy. Nothing of the model's own generation settings is used, and no random state is touched. ends:
    ids that end a row; it is filled up with the first of them.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    draw = [] if seed is None else [_Draw(seed, temperature, top_p)]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with _own_settings(model), torch.no_grad():
            out = model.generate(
                ids.to(device),
                attention_mask=(torch.ones_like(ids) if mask is None else mask).to(device),
                generation_config=settings,
                past_key_values=growing_cache(model.config),
                logits_processor=LogitsProcessorList([*processors, *draw]),
            )
    finally:
        model.train(training)
    return torch.nn.functional.pad(out.cpu(), (0, ids.shape[1] + new - out.shape[1]), value=ends[0] if ends else 0)


@contextlib.contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Empty generation defaults: generate would fill in the model's (top_k, eos, repetition penalty) where ours are
    unset."""
    from transformers import GenerationConfig

    kept: GenerationConfig = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the tokenizer's, and those the model's generation settings name."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def frequent_tokens(tokenizer: PreTrainedTokenizerBase, count: int = 500) -> list[int]:
    """Ids of common words to begin a text with: the first ones merged, since BPE numbers pieces by frequency."""
    special, found = set(tokenizer.all_special_ids), []
    for token in range(len(tokenizer)):
        text = str(tokenizer.decode([token])).strip()
        if token not in special and len(text) > 1 and text.isalpha():
            found.append(token)
            if len(found) == count:
                break
    if not found:
        raise InputError("this tokenizer has no BOS and no word to begin with: give prompts to complete")
    return found


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and a sample of each of the teacher's parameters: cheap, and enough to tell whether
    data on disk is of this model. What surgery or LoRA added does not count."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ADDED):
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)][:64].float().cpu().contiguous()
            total.update(f"{name.replace('.base_layer', '')}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return total.hexdigest()[:32]


def _prompt_ids(prompts: Sequence[str] | Sequence[Chat], tokenizer: Any, length: int) -> list[list[int]]:
    """Ids of each prompt; a text starts with the first token. Raises InputError where none leaves room to complete."""
    if not prompts:
        raise InputError("no prompts to complete: give some, or none at all to let the model write freely")
    first = first_token(tokenizer)
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = ([] if first is None else [first]) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        elif not getattr(tokenizer, "chat_template", None):
            raise InputError("this tokenizer has no chat template: give prompts as plain text")
        else:
            turns = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if 0 < len(ids) <= length // 2:
            found.append(ids)
    if not found:
        raise InputError(f"every prompt is empty or longer than half of data.length ({length}): raise data.length")
    return found


# -------------------------------------------------------------------------------------------------- on disk
class Store:
    """Shards in a folder with an index of their hashes, or nowhere; beside it, since the same data take another time on
    another day, how long each shard took."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings, self.hashes = settings, []
        self.seconds: list[float | None] = []
        if self.folder is None:
            return
        index = self.folder / "index.json"
        if not index.exists():
            own = ("shard-00000.", ".shard-00000.", ".index.json.")  # of a call that was killed before its first index
            if self.folder.exists() and any(not path.name.startswith(own) for path in self.folder.iterdir()):
                raise InputError(f"{self.folder} is not empty and holds no self-generated data: choose another folder")
            return
        try:
            found = json.loads(index.read_text())
            kept, self.hashes = found["settings"], found["shards"]
            times = self.folder / TIMES
            self.seconds = list(json.loads(times.read_text())) if times.is_file() else []
        except (OSError, ValueError, KeyError, TypeError):
            raise StorageError(f"{index} is not readable: delete {self.folder} and run again") from None
        if kept != settings:
            other = ", ".join(key for key in settings if kept.get(key) != settings[key])
            raise InputError(f"{self.folder} holds data made otherwise ({other}): choose another folder, or delete it")

    @classmethod
    def found(cls, folder: str | Path) -> Store:
        """What is in a folder, whatever it was made with. Raises InputError where nothing is."""
        try:
            settings = json.loads((Path(folder) / "index.json").read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} holds no self-generated data: make some with linearize selfgen") from None
        return cls(folder, settings)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"shard-{number:05d}.safetensors"

    def _whole(self, number: int) -> Path | None:
        """The file of shard `number`; None where it has to be made (it was not, or is not what the index says)."""
        if self.folder is None or number >= len(self.hashes):
            return None
        path = self._path(number)
        return path if path.is_file() and _hash(path.read_bytes()) == self.hashes[number] else None

    def read(self, number: int) -> Tokens | None:
        """Shard `number` of text, or None where it has to be made."""
        path = self._whole(number)
        return None if path is None else Tokens.open(path)

    def tensors(self, number: int) -> dict[str, Tensor] | None:
        """Shard `number`, or None where it has to be made."""
        from safetensors.torch import load

        path = self._whole(number)
        return None if path is None else load(path.read_bytes())

    def write(self, number: int, shard: Tokens, seconds: float) -> None:
        """The shard first, then the index that vouches for it and says in how many seconds it was made."""
        if self.folder is not None:
            shard.save(self._path(number))
        self._vouch(number, seconds)

    def keep(self, number: int, shard: dict[str, Tensor], seconds: float) -> None:
        """The same of tensors."""
        from safetensors.torch import save

        if self.folder is not None:
            write_atomic(self._path(number), save(shard))
        self._vouch(number, seconds)

    def _vouch(self, number: int, seconds: float) -> None:
        self.seconds += [None] * (number - len(self.seconds))  # of shards older than this figure
        self.seconds[number : number + 1] = [round(seconds, 3)]
        if self.folder is None:
            return
        self.hashes[number : number + 1] = [_hash(self._path(number).read_bytes())]
        index = {"settings": self.settings, "shards": self.hashes}
        write_atomic(self.folder / "index.json", json.dumps(index, indent=1) + "\n")
        write_atomic(self.folder / TIMES, json.dumps(self.seconds) + "\n")

    def made(self, shards: int, tokens: int) -> StageReport:
        """What the first `shards` of them cost, this time or another: data are no training, and counted apart."""
        known = [seconds for seconds in self.seconds[:shards] if seconds is not None]
        if len(known) == shards:
            return StageReport("selfgen", shards, tokens, sum(known))
        note = f"how long {shards - len(known)} of {shards} shards took is not known"
        return StageReport("selfgen", shards, tokens, math.nan, notes=[note])


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
