"""More pictures of a few flat drawings, for `recombine`: their colours and parts, put together anew.

Ours, not the paper's. Ten avatars are learnt by heart long before their lines are sharp, while the colours and parts that they show make
thousands of pictures of the same domain. Three steps, none of which learns anything:

1. A drawing is a few flat colours and mixtures of them at its edges; so each pixel gets weights over the picture's colours.
2. Colours of two pictures that cover the same places play the same part ("hair"), so one can be given the other's colour.
3. A picture that was given another's colours differs from it in shapes alone, and a rectangle on whose border the two agree moves
   from one to the other without a seam.

It suits drawings that share a layout. Photos have no flat colours and are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidad.data import PictureSet

Array = NDArray[np.float64]
FEW = 40  # pictures at the most; more are variety enough, and all pairs are compared
LOOKED_AT, DIFFERENT = 200, 0.67  # of the first so many made, this share must be different pictures
FLAT = 0.6  # of a picture's pixels must be of its flat colours, on average
ALIKE = 14  # colours as near as this in every channel count as one (of 255)
PURE = 10  # pixels as near as this to a flat colour are of it
SMALLEST = 0.005  # of a picture that a flat colour covers
LARGE = 0.02  # of a picture that a colour covers which is replaced by others
SAME_PART = 0.3  # overlap (intersection over union) of colours that play the same part in two pictures
BLACK_AND_WHITE = np.array([[0.0, 0, 0], [255, 255, 255]])  # shades and eyes: may be in any mixture, and are never replaced
FAR, SHADE = 300.0, 1000.0  # what a colour costs in a mixture that does not lie nearby, or that is black or white; squared levels
RINGING = 0.1  # how far below 0 the weight of a colour nearby may be: resizing makes edges darker beside light, lighter beside dark
ROUNDS = 400  # of the search for weights
PARTS = 6  # tried for each picture, from as many others
RECTANGLES = 60  # tried for each part
SEAM, WORST_SEAM = 12.0, 80.0  # how much two pictures may differ on a rectangle's border, on average and anywhere


@dataclass(frozen=True)
class Drawing:
    """One picture as flat colours: `pixels` [H, W, 3] in 0..255."""

    pixels: Array

    @cached_property
    def colours(self) -> Array:
        """Its flat colours, [P, 3], the most frequent first."""
        found, counts = np.unique(self.pixels.reshape(-1, 3), axis=0, return_counts=True)
        least = max(5.0, SMALLEST * counts.sum())
        kept: list[Array] = []
        for i in np.argsort(-counts, kind="stable"):
            if counts[i] >= least and all(np.abs(found[i] - colour).max() > ALIKE for colour in kept):
                kept.append(found[i])
        return np.array(kept).reshape(-1, 3)

    @cached_property
    def flat(self) -> float:
        """Share of its pixels that are of one of its flat colours."""
        return float((self._distance.min(-1) < PURE).mean()) if len(self.colours) else 0.0

    @cached_property
    def weights(self) -> Array:
        """How much of each of its colours, then of black and of white, is in each pixel: [H, W, P + 2], summing to 1; none is below 0 but
        those of colours nearby, down to -RINGING.

        The least squares of the mixture's error, with a price on colours that do not lie nearby and on black and white.
        """
        height, width, _ = self.pixels.shape
        palette = np.concatenate([self.colours, BLACK_AND_WHITE])
        x = self.pixels.reshape(-1, 3)
        price = np.concatenate([FAR * ~self._nearby, np.full((height, width, 2), SHADE)], -1).reshape(len(x), -1)
        least = np.concatenate([-RINGING * self._nearby, np.zeros((height, width, 2))], -1).reshape(len(x), -1)
        start = ((x[:, None] - palette) ** 2).sum(-1) + price
        weights = np.eye(len(palette))[start.argmin(1)]
        gram = palette @ palette.T
        step, pull = 1 / np.linalg.eigvalsh(gram)[-1], x @ palette.T - price / 2
        ahead, pace = weights, 1.0
        for _ in range(ROUNDS):  # Beck and Teboulle 2009 (FISTA)
            moved = nearest_weights(ahead - step * (ahead @ gram - pull), least)
            faster = (1 + np.sqrt(1 + 4 * pace * pace)) / 2
            weights, ahead, pace = moved, moved + (pace - 1) / faster * (moved - weights), faster
        return weights.reshape(height, width, -1)

    @cached_property
    def parts(self) -> list[int]:
        """Which of its colours are large enough to be replaced."""
        area = self.weights.mean((0, 1))
        return [k for k in range(len(self.colours)) if area[k] >= LARGE]

    def recoloured(self, new: dict[int, Array]) -> Array:
        """The picture, [H, W, 3] in 0..255, with other colours in the place of some; what no mixture explains stays as it is."""
        change = np.zeros_like(self.colours)
        for k, colour in new.items():
            change[k] = colour - self.colours[k]
        return np.clip(self.pixels + self.weights[..., : len(change)] @ change, 0, 255)

    @cached_property
    def _distance(self) -> Array:
        """Of each pixel from each flat colour, [H, W, P], in its worst channel."""
        return np.abs(self.pixels[:, :, None] - self.colours).max(-1)

    @cached_property
    def _nearby(self) -> NDArray[np.bool_]:
        """[H, W, P]: whether a pixel of that colour lies within a sixteenth of the side."""
        height, width, _ = self.pixels.shape
        reach = max(1, height // 16)
        pure = (self._distance < PURE) & (self._distance == self._distance.min(-1, keepdims=True))
        corner = np.pad(pure.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
        top, left = (np.clip(np.arange(n) - reach, 0, n) for n in (height, width))
        bottom, right = (np.clip(np.arange(n) + reach + 1, 0, n) for n in (height, width))
        inside = corner[bottom][:, right] - corner[top][:, right] - corner[bottom][:, left] + corner[top][:, left]
        return np.asarray(inside > 0)


def nearest_weights(v: Array, least: Array) -> Array:
    """The nearest weights to each row of v, [N, K]: none below its `least`, summing to 1 (Duchi et al. 2008)."""
    room = v - least
    falling = -np.sort(-room, 1)
    over = falling.cumsum(1) - (1 - least.sum(1, keepdims=True))
    last = (falling > over / np.arange(1, v.shape[1] + 1)).sum(1)
    return np.maximum(room - (over[np.arange(len(v)), last - 1] / last)[:, None], 0) + least


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
        found = {}
        for i, one in enumerate(self.drawings):
            for j, other in enumerate(self.drawings):
                if i == j or not one.parts or not other.parts:
                    continue
                a, b = one.weights[..., one.parts], other.weights[..., other.parts]
                both = np.array([[np.minimum(a[..., k], b[..., m]).sum() for m in range(b.shape[-1])] for k in range(a.shape[-1])])
                overlap = both / (a.sum((0, 1))[:, None] + b.sum((0, 1)) - both)
                for k, m in enumerate(overlap.argmax(1)):
                    if overlap[k, m] >= SAME_PART and overlap[:, m].argmax() == k:
                        found[i, j, one.parts[k]] = other.parts[int(m)]
        return found

    def draw(self, n: int, seed: int) -> Tensor:
        """n new pictures, [n, 3, H, W] uint8; the same for the same pictures and seed."""
        rng = np.random.default_rng(seed)
        made = np.stack([self._one(rng) for _ in range(n)]).round().astype(np.uint8)
        return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()

    def _one(self, rng: np.random.Generator) -> Array:
        i = int(rng.integers(len(self.drawings)))
        colours = self._other_colours(i, rng)
        made = self.drawings[i].recoloured(colours)
        worn = {k: colours.get(k, self.drawings[i].colours[k]) for k in self.drawings[i].parts}
        for _ in range(PARTS):
            j = int(rng.integers(len(self.drawings)))
            if j != i:
                given = {self.same[i, j, k]: colour for k, colour in worn.items() if (i, j, k) in self.same}
                made = with_part(made, self.drawings[j].recoloured(given), rng)
        return made

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


def with_part(picture: Array, other: Array, rng: np.random.Generator) -> Array:
    """The picture, [H, W, 3], with a rectangle of another in it: one at random of those tried that change
    something and leave no seam.
    """
    height, width, _ = picture.shape
    tall = rng.integers(max(1, height // 8), max(2, 5 * height // 8), RECTANGLES)
    wide = rng.integers(max(1, width // 4), width + 1, RECTANGLES)
    top = (rng.random(RECTANGLES) * (height - tall + 1)).astype(int)
    left = np.where(rng.random(RECTANGLES) < 0.5, (width - wide) // 2, (rng.random(RECTANGLES) * (width - wide + 1)).astype(int))
    differ = np.abs(picture - other)
    of_pixels = np.stack([differ.mean(-1), differ.max(-1) >= WORST_SEAM, np.ones((height, width))])
    sums = np.pad(of_pixels.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))

    def inside(margin: int) -> Array:
        """Sums over each rectangle that is so much larger on all sides: of the difference, of pixels that differ too much, of pixels."""
        y0, x0 = np.maximum(top - margin, 0), np.maximum(left - margin, 0)
        y1, x1 = np.maximum(np.minimum(top + tall + margin, height), y0), np.maximum(np.minimum(left + wide + margin, width), x0)
        return np.asarray(sums[:, y1, x1] - sums[:, y0, x1] - sums[:, y1, x0] + sums[:, y0, x0])

    border, change = inside(1) - inside(-1), inside(0)[0]
    seam, bad = border[0] / border[2], border[1]
    good = (seam < SEAM) & (bad < 0.5) & (change > 2 * tall * wide)
    if not good.any():
        return picture
    best = int(np.where(good, rng.random(RECTANGLES), -1).argmax())
    there = slice(top[best], top[best] + tall[best]), slice(left[best], left[best] + wide[best])
    picture = picture.copy()
    picture[there] = other[there]
    return picture


def with_more(pictures: PictureSet, count: int, seed: int) -> PictureSet:
    """The set with `count` more pictures made of its colours and parts; with a note instead where that cannot be or is not needed."""
    if count == 0:
        return pictures
    more, why = more_or_why_not(pictures, count, seed)
    note = f"These pictures {why}, so that none is made of their colours and parts ('recombine')."
    if more is not None:
        note = f"{count} more pictures are made of the colours and parts of these; recombine=0 learns from these alone."
    return replace(pictures, more=more, notes=[*pictures.notes, note])


def more_or_why_not(pictures: PictureSet, count: int, seed: int) -> tuple[Tensor | None, str]:
    """`count` pictures made of these, [count, 3, H, W] uint8, or what it is about these that none can be or need be."""
    if pictures.masks is not None:
        return None, "have masks"
    if len(pictures) > FEW:
        return None, f"are more than {FEW}"
    drawings = Drawings(pictures.pixels)
    if not drawings.fit:
        return None, "are no flat drawings with parts in the same places"
    more = drawings.draw(count, seed)
    first = more[:LOOKED_AT].flatten(1)
    if len(torch.unique(first, dim=0)) < DIFFERENT * len(first):
        return None, "have too few colours and parts to exchange"
    return more, ""
