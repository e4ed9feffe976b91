"""Texts that hide something and ask for it: passkey, S-NIAH-1, -2 and -3, MQAR.

Passkey: Mohtashami and Jaggi (2305.16300). MQAR: Zoology (2312.04927), pairs first and every question once. S-NIAH:
RULER (2404.06654), niah_single_1 to _3: one needle, of a word as key and a value. 1: a number of seven digits in noise;
2: such a number in an essay; 3: a UUID (version 4) in an essay. RULER's essays are Paul Graham's, always from their
beginning; here they are the user's text, from a random place. Its keys are an adjective and a noun; here they are names
of two syllables that no text holds. The wording is ours and shorter.

Answers are marked by their place in the text, so that one forward pass says whether greedy decoding would give them:
each token of an answer is then the likeliest after the ones before. All of it is plain text and works with any fast
tokenizer. A seed and the settings decide everything.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from linearize.types import InputError

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_TEXT = (
    "road tree river house stone window table letter garden winter summer morning evening music paper silver golden "
    "little great under over through between after before never always people children water light story world "
    "mountain forest village bridge horse train ship island ocean desert market school church tower castle king "
    "queen soldier farmer doctor teacher walked found gave took went looked turned opened closed carried followed"
)
WORDS = tuple(_TEXT.split())
_SYLLABLES = (
    "ba do fe gu hi jo ku la mi no pe ri su ta vo zu",
    "bi da fo ge hu ja ko li mu na po re si tu va ze",
    "bor dan fin gul hem jik kos lum",
)
_FIRST, _SECOND, _LAST = (line.split() for line in _SYLLABLES)
#: what MQAR pairs: names of two syllables that are no hexadecimal numbers, and values of a third kind
KEYS = tuple(a + b for a in _FIRST for b in _SECOND if set(a + b) - set("abcdef"))
VALUES = tuple(a + b for a in _SECOND for b in _LAST)

#: noise: five sentences over and over; words: drawn at random; text: a real one
Haystack = Literal["noise", "words", "text"]
LONGEST = 40  # words of a sentence of real text: without full stops a needle would have no depth


@dataclass(frozen=True)
class Quiz:
    """What a text holds beside its haystack: `head` opens it, `needle` is hidden in it, questions stand at its end,
    each followed by its answer."""

    head: str
    needle: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trial:
    """One text as tokens. answers: the columns [start, stop) of each answer."""

    ids_T: Tensor
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Task:
    """A kind of text. write(rng, pairs) makes what is hidden; haystack: what it is hidden in. pairs: how many key-value
    pairs, where that can be chosen."""

    name: str
    write: Callable[[random.Random, int], Quiz]
    haystack: Haystack
    pairs: int = 1


def _passkey(rng: random.Random, pairs: int) -> Quiz:
    key = f"{rng.randrange(10**5):05d}"
    return Quiz(
        " Find the pass key in this text.",
        f" The pass key is {key}. Remember it. {key} is the pass key.",
        ((" What is the pass key? The pass key is", f" {key}"),),
    )


def _niah(kind: str, value: Callable[[random.Random], str]) -> Callable[[random.Random, int], Quiz]:
    def write(rng: random.Random, pairs: int) -> Quiz:
        name, found = rng.choice(KEYS), value(rng)
        said = f"The special magic {kind} for {name} is"
        question = f" What is the special magic {kind} for {name}? {said}:"
        return Quiz(f" Remember the special magic {kind}s.", f" {said}: {found}.", ((question, f" {found}"),))

    return write


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _mqar(rng: random.Random, pairs: int) -> Quiz:
    if not 1 <= pairs <= len(KEYS):
        raise InputError(f"mqar takes 1 to {len(KEYS)} pairs, not {pairs}")
    known = [(key, rng.choice(VALUES)) for key in rng.sample(KEYS, pairs)]
    asked = rng.sample(known, pairs)
    return Quiz("", "".join(f"\n{k} {v}" for k, v in known), tuple((f"\n{k}", f" {v}") for k, v in asked))


TASKS = {
    task.name: task
    for task in (
        Task("passkey", _passkey, "noise"),
        Task("s-niah-1", _niah("number", _number), "noise"),
        Task("s-niah-2", _niah("number", _number), "text"),
        Task("s-niah-3", _niah("uuid", _uuid), "text"),
        Task("niah-words", _niah("number", _number), "words"),  # as 2 and 3 where no text is at hand
        Task("niah-words-uuid", _niah("uuid", _uuid), "words"),
        Task("mqar", _mqar, "noise", pairs=16),
    )
}
#: other names of the same
ALIASES = {"needle": "s-niah-2"}


# ------------------------------------------------------------------------------------------------- haystacks
def sentences(text: str) -> list[str]:
    """The sentences of a real text, blanks made single; those of more than LONGEST words in pieces."""
    found = (sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text))
    return [" ".join(words[at : at + LONGEST]) for words in found for at in range(0, len(words), LONGEST)]


def _straw(kind: Haystack, rng: random.Random, text: Sequence[str]) -> Callable[[int], str]:
    """The n-th sentence of a haystack; real text begins at a random place and goes round."""
    if kind == "noise":
        return lambda n: NOISE[n % len(NOISE)]
    if kind == "text":
        start = rng.randrange(len(text))
        return lambda n: text[(start + n) % len(text)]
    return lambda n: " ".join(rng.choices(WORDS, k=rng.randint(5, 9))).capitalize() + "."


def _sizes(sentences: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens of each sentence; the few sentences of a noise haystack are counted once."""
    distinct = list(dict.fromkeys(sentences))
    coded = tokenizer([" " + sentence for sentence in distinct], add_special_tokens=False, verbose=False)["input_ids"]
    known = dict(zip(distinct, map(len, coded), strict=True))
    return [known[sentence] for sentence in sentences]


# -------------------------------------------------------------------------------------------------- the texts
def trial(
    task: Task,
    tokenizer: Any,
    length: int,
    *,
    depth: float = 0.5,
    pairs: int | None = None,
    seed: int = 0,
    text: Sequence[str] = (),
    first: int | None = None,
) -> Trial:
    """One text of at most `length` tokens, as near to it as whole sentences allow, in real text whole words.

    depth: where the needle stands in its haystack, 0 to 1. text: the sentences of a real haystack. first: an id every
    text begins with. Raises InputError where nothing fits into `length`, the haystack does not fill it, or the
    tokenizer cannot tell places in a text.
    """
    if task.haystack == "text" and not text:
        raise InputError(f"{task.name} hides its needle in real text: name a file of it (--haystack)")
    rng = random.Random(f"{task.name} {length} {depth} {pairs} {seed}")
    quiz = task.write(rng, task.pairs if pairs is None else pairs)
    straw, hay = _straw(task.haystack, rng, text), []
    ids, spans = _coded(quiz, hay, depth, tokenizer, first)
    room = length - len(ids)
    if room < 0:
        raise InputError(f"{task.name} needs at least {len(ids)} tokens beside its haystack: {length} are too few")
    while room > 0:
        more = [straw(len(hay) + n) for n in range(room // 8 + 1)]
        for sentence, size in zip(more, _sizes(more, tokenizer), strict=True):
            if size > room and task.haystack == "text":  # cut to fit, as RULER cuts its essays
                words = sentence.split()
                sentence = " ".join(words[: len(words) * room // size])
            room -= size
            if room >= 0 or (task.haystack == "text" and sentence):
                hay.append(sentence)
            if room < 0:
                break
    while hay:  # a sentence in its place may need a token more than alone
        ids, spans = _coded(quiz, hay, depth, tokenizer, first)
        if len(ids) <= length:
            break
        hay.pop()
    if task.haystack == "text" and len(ids) < length * 3 // 4:
        raise InputError(f"{task.name}: {len(ids)} of {length} tokens filled; give --haystack text with blanks in it")
    return Trial(torch.tensor(ids), spans)


def _coded(
    quiz: Quiz, hay: Sequence[str], depth: float, tokenizer: Any, first: int | None
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    before = round(depth * len(hay))
    parts = [quiz.head, *(" " + s for s in hay[:before]), quiz.needle, *(" " + s for s in hay[before:])]
    text, places = "".join(parts).lstrip(), []
    for question, answer in quiz.questions:
        text += question
        places.append((len(text) + 1, len(text) + len(answer)))  # the blank may be a token of its own
        text += answer
    try:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        raise InputError("recall needs a fast tokenizer, which knows where in the text its tokens stand") from None
    head = [] if first is None else [first]
    spans, at = [], 0
    for start, stop in places:
        columns = []
        while at < len(coded["offset_mapping"]) and coded["offset_mapping"][at][0] < stop:
            if coded["offset_mapping"][at][1] > start:
                columns.append(at)
            at += 1
        spans.append((columns[0] + len(head), columns[-1] + 1 + len(head)))
    return head + coded["input_ids"], tuple(spans)
