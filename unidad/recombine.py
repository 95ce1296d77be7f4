"""More pictures of a few flat drawings, for `recombine`: their colours and parts, put together anew.

Ours, not the paper's. Ten avatars are learnt by heart long before their lines are sharp, while the colours and parts that they show make
thousands of pictures of the same domain. Five steps, none of which learns anything:

1. Each drawing is taken apart into colours and how much of each is in every pixel (drawing.py).
2. Colours of two pictures that cover the same places play the same part ("hair"), so one can be given the other's colour.
3. Two pictures in the same colours differ in shapes alone: each connected region where they do is a part that can be exchanged, and in
   large ones, where several things touch (a beard, hair at the back, clothes), each place in which one colour takes another's.
4. A new picture is a walk: in random parts, the piece of a random picture that agrees with what is around takes the place of what is there.
5. One that comes out nearly as one of the given pictures is made anew: what is seen too often is learnt by heart.

It suits drawings that share a layout. Photos have no flat colours and are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unidad.data import PictureSet, load_folder, smallest_side
from unidad.drawing import ALIKE, Array, Drawing

Mask = NDArray[np.bool_]
FEW = 40  # pictures at the most; more are variety enough, and all pairs are compared
LOOKED_AT, DIFFERENT = 200, 0.67  # of the first so many made, this share must be different pictures
FLAT = 0.6  # of a picture's pixels must be of its flat colours, on average
SAME_PART = 0.3  # overlap (intersection over union) of colours that play the same part in two pictures
DIFFER = 30  # levels in the worst channel by which pixels differ that belong to a part
TINY = 0.0005  # of a picture that a part covers at the least
SEAM = 20.0  # how much two pictures may differ on a part's border, on average, in levels
SEVERAL = 0.2  # of a picture that a part covers in which several things may touch
PIECE = 0.005  # of a picture that a piece of such a part covers at the least
LOOSE = 40.0  # SEAM for such a piece, whose border runs through the part
FINE = 128  # pixels a side at which drawings are taken apart, where they are so large
STEPS = 60  # of the walk
NEW = 0.5  # of how much the two most alike of the pictures differ, so much a new one must differ from each of them
TRIES = 3  # at a picture that does
ENOUGH = 256  # pixels of a part to judge by


@dataclass(frozen=True)
class Region:
    """A part's place, as flat indices: pixels inside it that are not alike in all pictures, some on its border, some inside; the share of
    the latter in which two pictures are alike, [N, N]; and how much two may differ on its border.
    """

    inside: NDArray[np.int64]
    border: NDArray[np.int64]
    sample: NDArray[np.int64]
    alike: Array
    seam: float = SEAM


@dataclass(frozen=True)
class Drawings:
    """A few pictures, [N, 3, H, W] uint8, whose colours and parts go well together."""

    pictures: Tensor
    drawings: list[Drawing] = field(init=False)

    def __post_init__(self) -> None:
        pixels = self.pictures.permute(0, 2, 3, 1).cpu().numpy().astype(np.float64)
        object.__setattr__(self, "drawings", [Drawing(picture) for picture in pixels])

    @property
    def fit(self) -> bool:
        """Whether these are at least two flat drawings, at least two of which have a part in common."""
        return float(np.mean([drawing.flat for drawing in self.drawings])) >= FLAT and bool(self.same)

    @cached_property
    def same(self) -> dict[tuple[int, int, int], int]:
        """(i, j, k) -> l: colour l of picture j plays the part that colour k plays in picture i."""
        return {(i, j, k): played[j] for (i, k), played in self._roles.items() for j in played if j != i}

    @cached_property
    def _roles(self) -> dict[tuple[int, int], dict[int, int]]:
        """(i, k) -> which colour, in each picture that has one, plays the part that colour k plays in picture i."""
        role = {(i, k): {i: k} for i, drawing in enumerate(self.drawings) for k in drawing.parts}
        for overlap, one, other in sorted(self._overlaps(), reverse=True):
            a, b = role[one], role[other]
            if overlap >= SAME_PART and not a.keys() & b.keys():  # a picture has one colour for each part
                a |= b
                role |= dict.fromkeys(b.items(), a)
        return role

    def _overlaps(self) -> list[tuple[float, tuple[int, int], tuple[int, int]]]:
        """Intersection over union of any two pictures' colours, with their shades: (overlap, (i, k), (j, l)), i < j."""
        found = []
        shapes = [[(k, drawing.shape(k)) for k in drawing.parts] for drawing in self.drawings]
        for i, one in enumerate(shapes):
            for j, other in enumerate(shapes[i + 1 :], i + 1):
                for k, a in one:
                    for m, b in other:
                        both = float(np.minimum(a, b).sum())
                        found.append((both / float(a.sum() + b.sum() - both), (i, k), (j, m)))
        return found

    def draw(self, n: int, seed: int, size: int | None = None) -> Tensor:
        """n new pictures, [n, 3, size, size] uint8, or as large as these; the same for the same pictures and seed."""
        rng = np.random.default_rng(seed)
        made = np.stack([_resized(self._new(rng), size) for _ in range(n)])
        return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()

    def _new(self, rng: np.random.Generator) -> Array:
        """One that is no near copy, if some tries find any."""
        for _ in range(TRIES):
            made = self._one(rng)
            if min(unlike(made, old.pixels) for old in self.drawings) >= self._least:
                break
        return made

    @cached_property
    def _least(self) -> float:
        return NEW * min(unlike(one.pixels, other.pixels) for one, other in combinations(self.drawings, 2))

    def _one(self, rng: np.random.Generator) -> Array:
        first = int(rng.integers(len(self.drawings)))
        worn = self._other_colours(first, rng)
        where = np.full(len(self._differ), first)
        for _ in range(STEPS if self._regions else 0):
            where = self._exchanged(where, self._regions[int(rng.integers(len(self._regions)))], rng)
        pixels = np.empty((len(where), 3))
        for j in np.unique(where):
            pixels[where == j] = self.drawings[j].recoloured(self._as_worn(worn, first, j)).reshape(-1, 3)[where == j]
        return pixels.reshape(self.drawings[0].pixels.shape)

    def _other_colours(self, i: int, rng: np.random.Generator) -> dict[int, Array]:
        """For each part of picture i a colour that it has in one of the pictures, each as likely, however many have it."""
        new = {}
        for k in self.drawings[i].parts:
            seen = [self.drawings[i].colours[k]]
            for j, other in enumerate(self.drawings):
                if (i, j, k) in self.same:
                    colour = other.colours[self.same[i, j, k]]
                    if all(np.abs(colour - known).max() > ALIKE for known in seen):
                        seen.append(colour)
            new[k] = seen[int(rng.integers(len(seen)))]
        return new

    def _as_worn(self, worn: dict[int, Array], i: int, j: int) -> dict[int, Array]:
        """Colours of picture i's parts, for the same parts of picture j."""
        return worn if i == j else {self.same[i, j, k]: colour for k, colour in worn.items() if (i, j, k) in self.same}

    def _exchanged(self, where: NDArray[np.int64], region: Region, rng: np.random.Generator) -> NDArray[np.int64]:
        """Which picture each pixel is from, [H * W], after one step in a region: of the pieces that fit and the one that is there, one at
        random, less likely the more alike others are.
        """
        seams = np.add.reduce(self._differ[region.border, where[region.border]], 0, np.int64)
        fits = np.flatnonzero(seams < region.seam * len(region.border))
        there = (self._differ[region.sample, where[region.sample]][:, fits] <= DIFFER).mean(0)
        alike = np.ones((len(fits) + 1, len(fits) + 1))
        alike[1:, 1:], alike[0, 1:], alike[1:, 0] = region.alike[fits[:, None], fits], there, there
        likely = (1 / alike.sum(0) ** 2).cumsum()
        chosen = int(likely.searchsorted(rng.random() * likely[-1], side="right"))
        if chosen:
            where = where.copy()
            where[region.inside] = fits[chosen - 1]
        return where

    @cached_property
    def _differ(self) -> NDArray[np.uint8]:
        """[H * W, N, N]: by how much two pictures differ in shape, in levels: the most that they do in the colours of any of the pictures."""
        n = len(self.drawings)
        most = np.zeros((n, n, self.drawings[0].pixels[..., 0].size), np.uint8)
        for i, one in enumerate(self.drawings):
            worn = {k: one.colours[k] for k in one.parts}
            alike = [
                other.recoloured(self._as_worn(worn, i, j)).reshape(-1, 3).astype(np.int16) for j, other in enumerate(self.drawings)
            ]
            for a in range(n):
                for b in range(a + 1, n):
                    most[a, b] = np.maximum(most[a, b], np.abs(alike[a] - alike[b]).max(-1))
        return np.ascontiguousarray((most + most.transpose(1, 0, 2)).transpose(2, 0, 1))

    @cached_property
    def _shown(self) -> NDArray[np.int64]:
        """[N, H, W]: what each pixel mostly shows: a number for each part that colours play, and one for every other colour of a picture."""
        numbers: dict[object, int] = {}
        shown = []
        for i, drawing in enumerate(self.drawings):
            names = []
            for k in range(drawing.weights.shape[-1]):
                base = drawing.shades.get(k, (k, 1.0))[0]
                played = self._roles.get((i, base))
                name = (i, base) if played is None else min(played.items())
                names.append(numbers.setdefault(name, len(numbers)))
            shown.append(np.array(names)[drawing.weights.argmax(-1)])
        return np.stack(shown)

    @cached_property
    def _regions(self) -> list[Region]:
        """Where any two pictures differ: each connected region, together with those that touch its mirror image; of large ones the pieces
        too in which one part takes the place of one other.
        """
        height, width, _ = self.drawings[0].pixels.shape
        found: dict[bytes, tuple[Mask, float]] = {}
        for a in range(len(self.drawings)):
            for b in range(a + 1, len(self.drawings)):
                differ = (self._differ[:, a, b] > DIFFER).reshape(height, width)
                for mask in connected(differ):
                    if wider(mask).all():  # all of a picture has no border to fit
                        continue
                    found[mask.tobytes()] = mask, SEAM
                    if mask.sum() > SEVERAL * mask.size:
                        found |= {piece.tobytes(): (piece, LOOSE) for piece in self._pieces(mask, a, b)}
        return [self._region(mask, seam) for mask, seam in found.values() if mask.sum() >= max(4, TINY * mask.size)]

    def _pieces(self, mask: Mask, a: int, b: int) -> list[Mask]:
        """The connected pieces of a region in which one part takes the place of one other between pictures a and b."""
        low, high = np.minimum(self._shown[a], self._shown[b]), np.maximum(self._shown[a], self._shown[b])
        change = low * (int(self._shown.max()) + 1) + high
        pieces = [piece for kind in np.unique(change[mask]) for piece in connected(mask & (change == kind))]
        return [piece for piece in pieces if piece.sum() >= PIECE * piece.size]

    def _region(self, mask: Mask, seam: float = SEAM) -> Region:
        inside, border = np.flatnonzero(wider(mask)), np.flatnonzero(wider(wider(mask)) & ~mask)
        varied = inside[(self._differ[inside] > DIFFER).any((1, 2))]
        sample = thinned(varied)
        return Region(varied, thinned(border), sample, (self._differ[sample] <= DIFFER).mean(0), seam)


def unlike(one: Array, other: Array) -> float:
    """In what share of their pixels two pictures [H, W, 3] differ."""
    differ = np.abs(one - other) > DIFFER
    return float((differ[..., 0] | differ[..., 1] | differ[..., 2]).mean())


def thinned(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """So many of them, evenly spaced, as are enough to judge by."""
    return places[:: -(-len(places) // ENOUGH)] if len(places) > ENOUGH else places


def wider(mask: Mask) -> Mask:
    """A mask [H, W] with all pixels that touch it, corners included."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    wide = tall.copy()
    wide[:, 1:] |= tall[:, :-1]
    wide[:, :-1] |= tall[:, 1:]
    return wide


def connected(mask: Mask) -> list[Mask]:
    """The connected regions of a mask [H, W]; those that the mirror image of one touches belong to it, as a left eye to a right one."""
    left, found = mask.copy(), []
    while left.any():
        grown = np.zeros_like(mask)
        grown.flat[int(left.argmax())] = True
        while True:
            more = wider(grown | grown[:, ::-1]) & mask
            if np.array_equal(more, grown):
                break
            grown = more
        found.append(grown)
        left &= ~grown
    return found


def _resized(picture: Array, size: int | None) -> NDArray[np.uint8]:
    """As a picture file of that size would be read."""
    pixels = picture.round().astype(np.uint8)
    if size in (None, len(pixels)):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def with_more(pictures: PictureSet, count: int, seed: int, folder: Path | None = None) -> PictureSet:
    """The set with `count` more pictures made of its colours and parts; with a note instead where that cannot be or is not needed.

    Where the folder that they are from is given and holds them larger, they are taken apart there at up to FINE pixels a side.
    """
    if count == 0:
        return pictures
    more, why = more_or_why_not(pictures, count, seed, folder)
    note = f"These pictures {why}, so that none is made of their colours and parts ('recombine')."
    if more is not None:
        note = f"{count} more pictures are made of the colours and parts of these; recombine=0 learns from these alone."
    return replace(pictures, more=more, notes=[*pictures.notes, note])


def more_or_why_not(pictures: PictureSet, count: int, seed: int, folder: Path | None = None) -> tuple[Tensor | None, str]:
    """`count` pictures made of these, [count, 3, H, W] uint8, or what it is about these that none can be or need be."""
    if pictures.masks is not None:
        return None, "have masks"
    if len(pictures) > FEW:
        return None, f"are more than {FEW}"
    drawings = Drawings(pictures.pixels if folder is None else _larger(pictures, folder))
    if not drawings.fit:
        return None, "are no flat drawings with parts in the same places"
    more = drawings.draw(count, seed, pictures.size)
    first = more[:LOOKED_AT].flatten(1)
    if len(torch.unique(first, dim=0)) < DIFFERENT * len(first):
        return None, "have too few colours and parts to exchange"
    return more, ""


def _larger(pictures: PictureSet, folder: Path) -> Tensor:
    """The pictures, [N, 3, S, S] uint8, at the largest multiple of their size that is neither over FINE nor over the smallest of the files."""
    times = min(smallest_side(folder), FINE) // pictures.size
    return load_folder(folder, times * pictures.size).pixels if times > 1 else pictures.pixels
