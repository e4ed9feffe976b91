"""Unlabelled text for encoders: sentences and passages of a text, mixed, a line each.

    python recipes/mixed_text.py --out mixed.txt TEXT [TEXT ...] [--words 350] [--passages 0.1] [--seed 0]

TEXT: a file of text or of documents (JSONL, ...), with "[0:180]" behind it for a part of its documents. Lines
are single sentences or, --passages of them, passages of at most --words words (0.1: half of the words in either).
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from linearize.data.text import read_texts
from linearize.storage import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--words", type=int, default=350)
    parser.add_argument("--passages", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    lines = [line for text in arguments.texts for line in mixed(text, arguments.words, arguments.passages)]
    random.shuffle(lines)
    write_atomic(arguments.out, "\n".join(lines) + "\n")
    print(f"{arguments.out}: {len(lines):,} lines, {sum(len(line.split()) for line in lines):,} words")


def mixed(source: str, words: int, passages: float) -> Iterator[str]:
    """Lines of one text."""
    name, bracket, part = source.partition("[")
    for document in read_texts(name, split=bracket + part or None):
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(document.split())) if len(s.split()) > 3]
        while sentences:
            if random.random() >= passages:
                yield sentences.pop(0)
                continue
            passage: list[str] = []
            wanted = random.randint(words // 4, words)
            while sentences and sum(len(s.split()) for s in passage) < wanted:
                passage.append(sentences.pop(0))
            yield " ".join(passage)


if __name__ == "__main__":
    main()
