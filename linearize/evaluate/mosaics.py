"""Mosaics: drawings of several pictures on a grid. Are their number and their places kept?

A classifier alone cannot count: shown an empty tile, noise or the corners of four shifted garments, it names a class as
surely as for a garment. So a tile shows something only where its frame is dark, its middle is not, and the classifier
is sure. Of 1,000 real garments of Fashion-MNIST the first two hold for all, of mosaics shifted by half a tile for none,
by a quarter for 12 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.types import InputError

#: mean brightness, 0 black and 1 white: of a tile's frame at most, of its middle at least
FRAME, MIDDLE = 0.05, 0.03
SURE = 0.5  # the classifier's own probability of the likeliest class
NOTHING = -1


@dataclass(frozen=True)
class Layout:
    """What stands where, a letter each: "ab/ba" is two rows of two. a: the class asked for; places of one other letter
    show one class, which nobody named."""

    text: str

    @property
    def rows(self) -> int:
        return self.text.count("/") + 1

    @property
    def columns(self) -> int:
        return len(self.letters) // self.rows

    @property
    def letters(self) -> str:
        return self.text.replace("/", "")

    @property
    def asked(self) -> list[int]:
        """Tiles of the class asked for."""
        return [i for i, letter in enumerate(self.letters) if letter == "a"]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Tiles that are to show one class, though the model is not told which."""
        alike = [i for i, letter in enumerate(self.letters) if letter != "a"]
        return [(i, j) for i in alike for j in alike if i < j and self.letters[i] == self.letters[j]]

    def tiles(self, images_NCHW: Tensor) -> Tensor:
        """[N, tiles, C, H / rows, W / columns], row by row. Raises InputError where the sides are no multiples."""
        height, width = images_NCHW.shape[-2:]
        if height % self.rows or width % self.columns:
            raise InputError(f"eval.mosaic: {self.text} does not divide drawings of {height} x {width} pixels")
        parts = [part for row in images_NCHW.chunk(self.rows, -2) for part in row.chunk(self.columns, -1)]
        return torch.stack(parts, 1)


def there(tiles_NC: Tensor, frame: int) -> Tensor:
    """bool [N]: whether something stands within pictures [N, C, H, W] in -1 ... 1 of dark frames `frame` wide."""
    light = (tiles_NC.double().clamp(-1, 1) + 1) / 2
    middle = light[..., frame : light.shape[-2] - frame, frame : light.shape[-1] - frame]
    around = (light.sum((1, 2, 3)) - middle.sum((1, 2, 3))) / (light[0].numel() - middle[0].numel())
    return (around <= FRAME) & (middle.mean((1, 2, 3)) >= MIDDLE)


def seen(tiles_NKCHW: Tensor, judge: Callable[[Tensor], tuple[Tensor, Tensor]], frame: int) -> tuple[Tensor, Tensor]:
    """(class seen in each tile, or NOTHING, int64 [N, K]; features [N, K, E]). judge: (logits, features) of pictures.
    Raises InputError without a frame: a picture that is cut off could not be told from a whole one."""
    if frame < 1:
        raise InputError("eval.crop: tiles are told apart by their dark frames: say how wide these are")
    flat = tiles_NKCHW.flatten(0, 1)
    logits, features = judge(flat)
    sure, kind = logits.softmax(-1).max(-1)
    kind = kind.masked_fill((sure < SURE) | ~there(flat, frame), NOTHING)
    return kind.unflatten(0, tiles_NKCHW.shape[:2]), features.unflatten(0, tiles_NKCHW.shape[:2])


def figures(own_NK: Tensor, known_NK: Tensor, layout: Layout, asked_N: Tensor | None) -> dict[str, Tensor]:
    """One number per mosaic, of the classes seen in its tiles and in the teacher's.

    tiles_seen: how many show something. count_kept: whether that is the teacher's number. placement_kept: of the tiles
    in which the teacher's show something, the share that show the same. Both are 0 where the teacher's show nothing:
    nothing was kept. pairs_alike: share of `layout.pairs` that show one class. top1: share of `layout.asked` that show
    the class asked for.
    """
    some, known = (own_NK != NOTHING).sum(1), (known_NK != NOTHING).sum(1)
    found = {
        "tiles_seen": some.double(),
        "count_kept": ((some == known) & (known > 0)).double(),
        "placement_kept": ((own_NK == known_NK) & (known_NK != NOTHING)).sum(1) / known.clamp(min=1).double(),
    }
    if layout.pairs:
        alike = [(own_NK[:, i] == own_NK[:, j]) & (own_NK[:, i] != NOTHING) for i, j in layout.pairs]
        found["pairs_alike"] = torch.stack(alike, 1).double().mean(1)
    if asked_N is not None and layout.asked:
        found["top1"] = (own_NK[:, layout.asked] == asked_N[:, None]).double().mean(1)
    return found
