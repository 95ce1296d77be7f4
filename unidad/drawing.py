"""One flat drawing as colours and how much of each is in every pixel, so that it can be given other colours. Ours, not the paper's.

A drawing is a few flat colours, darker shades of them, and mixtures at its edges. The larger it is, the fewer its mixed pixels and the surer
its weights, so drawings are taken apart as large as they are given, not at a model's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ALIKE = 14  # colours as near as this in every channel count as one (of 255)
PURE = 10  # pixels as near as this to a flat colour are of it ...
CERTAIN = 4  # ... and as near as this of nothing else
SMALLEST = 0.001  # of a picture that a flat colour covers
LARGE = 0.02  # of a picture that a colour with its shades covers which is replaced by others
DARKEST, LIGHTEST, HUE = 0.6, 0.95, 4.0  # a colour's shade is so many times the colour, but for so many levels
BLACK_AND_WHITE = np.array([[0.0, 0, 0], [255, 255, 255]])  # shades and eyes: may be in any mixture, and are never replaced
FAR, SHADE = 1500.0, 1000.0  # what a colour costs in a mixture that does not lie nearby, or that is black or white; squared levels
RINGING = 0.1  # how far below 0 the weight of a colour nearby may be: resizing makes edges darker beside light, lighter beside dark
ROUNDS = 400  # of the search for weights


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
    def shades(self) -> dict[int, tuple[int, float]]:
        """Colour -> (the colour that it is a shade of, how many times that one it is)."""
        found: dict[int, tuple[int, float]] = {}
        for b, dark in enumerate(self.colours):
            misses = {}
            for a, light in enumerate(self.colours):
                times = float(light @ dark / max(light @ light, 1.0))
                if a != b and a not in found and DARKEST <= times <= LIGHTEST:
                    misses[a] = (float(np.abs(dark - times * light).max()), times)
            if misses and min(misses.values())[0] < HUE:
                a = min(misses, key=lambda a: misses[a])
                found[b] = (a, misses[a][1])
        return found

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
        weights = np.zeros((height, width, len(palette)))
        if not len(self.colours):
            return weights
        mixed = self._distance.min(-1) >= CERTAIN
        np.put_along_axis(weights, self._distance.argmin(-1)[..., None], 1.0, -1)
        weights[mixed] = self._mixtures(self.pixels[mixed], palette, self._nearby[mixed])
        return weights

    def _mixtures(self, x: Array, palette: Array, nearby: NDArray[np.bool_]) -> Array:
        """The weights, [N, P + 2], of pixels x, [N, 3]."""
        price = np.concatenate([FAR * ~nearby, np.full((len(x), 2), SHADE)], -1)
        least = np.concatenate([-RINGING * nearby, np.zeros((len(x), 2))], -1)
        weights = np.eye(len(palette))[(((x[:, None] - palette) ** 2).sum(-1) + price).argmin(1)]
        gram = palette @ palette.T
        step, pull = 1 / np.linalg.eigvalsh(gram)[-1], x @ palette.T - price / 2
        ahead, pace = weights, 1.0
        for _ in range(ROUNDS):  # Beck and Teboulle 2009 (FISTA)
            moved = nearest_weights(ahead - step * (ahead @ gram - pull), least)
            faster = (1 + np.sqrt(1 + 4 * pace * pace)) / 2
            weights, ahead, pace = moved, moved + (pace - 1) / faster * (moved - weights), faster
        return weights

    @cached_property
    def parts(self) -> list[int]:
        """Which of its colours are large enough, with their shades, to be replaced."""
        area = self.weights.mean((0, 1))
        for shade, (colour, _) in self.shades.items():
            area[colour] += area[shade]
        return [k for k in range(len(self.colours)) if area[k] >= LARGE and k not in self.shades]

    def shape(self, k: int) -> Array:
        """How much of colour k and its shades is in each pixel, [H, W]."""
        return np.asarray(self.weights[..., [k, *(b for b, (a, _) in self.shades.items() if a == k)]].sum(-1))

    def change(self, new: dict[int, Array]) -> Array:
        """By how much each of its colours changes, [P + 2, 3], where some are replaced and their shades follow."""
        change = np.zeros((len(self.colours) + 2, 3))
        for k, colour in new.items():
            change[k] = colour - self.colours[k]
        for shade, (base, times) in self.shades.items():
            if shade not in new:
                change[shade] = times * change[base]
        return change

    def recoloured(self, new: dict[int, Array]) -> Array:
        """The picture, [H, W, 3] in 0..255, with other colours in the place of some; what no mixture explains stays as it is."""
        return np.clip(self.pixels + self.weights @ self.change(new), 0, 255)

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
