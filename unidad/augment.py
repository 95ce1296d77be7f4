"""Differentiable augmentation of what the discriminator sees, against its learning ten pictures by heart: DiffAugment (arXiv 2006.10738),
or as much of it as is needed (ADA, arXiv 2006.06676). And of what a teacher learns from at high noise, against its learning whole
pictures by heart: parts of two in one (CutMix, arXiv 1905.04899).

For the discriminator, real pictures and student samples go through the same law, and gradients flow back to the student, so that the student is not taught
to draw augmented pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PICTURES = 5000  # real ones that the heads see while the share of augmented pictures goes from none to all, or back
REACH = 1 / 8  # of the side: how far "translate" moves a picture
HOLE = 1 / 2  # of the side: the square that "cutout" blanks


def augment(x: Tensor, kinds: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Each picture of x, [B, C, H, W] in [-1, 1], changed by each of `kinds` in turn; differentiable in x.

    Raises:
        KeyError: for an unknown kind.
    """
    for kind in kinds:
        x = AUGMENTATIONS[kind](x, generator)
    return x


class Augmentation:
    """`augment` for some pictures only, whose share p is learnt from the heads (ADA, arXiv 2006.06676, section 3.1).

    Args:
        kinds: as `parse_kinds` takes them.
        target: r_t = E[sign(logits of real pictures)], between 0 (the heads know nothing) and 1 (they know each), above which p rises
            and below which it falls; 0 augments every picture.
        device: of p.

    Attributes:
        p: share of pictures that each kind is applied to, in [0, 1]; a tensor, so that nothing waits for a device.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(self, kinds: str, target: float = 0.0, device: torch.device | str = "cpu"):
        self.kinds, self.target = parse_kinds(kinds), target
        self.p = torch.full((), 0.0 if target else 1.0, device=device)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x, [B, C, H, W] in [-1, 1], with each kind applied to each picture with probability p."""
        if not self.target:
            return augment(x, self.kinds, generator)
        for kind in self.kinds:
            x = torch.where(_uniform(x, generator, 0, 1) < self.p, augment(x, (kind,), generator), x)
        return x

    def adapt(self, signs: Tensor, seen: Tensor) -> Tensor:
        """Move p by `seen` pictures' worth, given the sum of the signs of their logits; returns p as it was for them."""
        before = self.p
        self.p = (before + (signs / seen - self.target).sign() * seen / PICTURES).clamp(0, 1)
        return before

    def carried(self) -> list[Tensor]:
        """p, where it is learnt, for a checkpoint."""
        return [self.p] if self.target else []

    def restore(self, carried: list[Tensor]) -> list[Tensor]:
        """Take back what `carried` gave from the end of a list; returns the rest."""
        if not self.target:
            return carried
        self.p = carried[-1].to(self.p)
        return carried[:-1]


@dataclass(frozen=True)
class CutMix:
    """Pieces pictures together at high noise: layouts are learnt from composites, and everything finer from whole pictures.

    Ours, after arXiv 1905.04899. Composites have seams, which noise above `above` hides, and a denoiser at less noise mends. It suits
    targets whose pictures share a layout, as faces cut alike do.

    Args:
        pixels: [N, C, H, W] uint8, to take parts from, on the device of what is pieced together.
        above: timestep from which on.
    """

    pixels: Tensor
    above: float

    def __call__(self, x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """x, [B, C, H, W] in [-1, 1], in which, where t, [B] int64, is at least `above`, a part may come from another picture: with a third
        of the chance each nothing, all below a line, or a rectangle.
        """
        others = torch.randint(0, len(self.pixels), (len(x),), generator=generator, device=x.device)
        kind = torch.randint(0, 3, (len(x), 1, 1, 1), generator=generator, device=x.device)
        rows, columns = (torch.arange(n, device=x.device) + 0.5 for n in x.shape[-2:])
        inside = _span(x, generator, rows).unsqueeze(-1) & _span(x, generator, columns).unsqueeze(-2)
        below = (rows > len(rows) * _uniform(x, generator, 0.25, 0.8).squeeze(-1)).unsqueeze(-1)
        taken = ((kind == 1) & below | (kind == 2) & inside) & (t >= self.above).view(-1, 1, 1, 1)
        return torch.where(taken, self.pixels[others].float() / 127.5 - 1, x)


def _span(x: Tensor, generator: torch.Generator, places: Tensor) -> Tensor:
    """Which of a side's places, [n], lie in a stretch of 1/4 to 3/5 of it, for each of x: [B, 1, n] bool."""
    length = _uniform(x, generator, 0.25, 0.6).squeeze(-1) * len(places)
    start = _uniform(x, generator, 0, 1).squeeze(-1) * (len(places) - length)
    return (places > start) & (places < start + length)


def parse_kinds(text: str) -> tuple[str, ...]:
    """ "flip,translate" -> ("flip", "translate"); "none" -> ().

    Raises:
        ValueError: naming the kind that is not known.
    """
    kinds = tuple(part for part in text.replace(" ", "").split(",") if part not in ("", "none"))
    for kind in kinds:
        if kind not in AUGMENTATIONS:
            raise ValueError(kind)
    return kinds


def _uniform(x: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand((len(x), 1, 1, 1), generator=generator, device=x.device)


def _flip(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(_uniform(x, generator, 0, 1) < 0.5, x.flip(-1), x)


def _translate(x: Tensor, generator: torch.Generator) -> Tensor:
    """Whole pixels, up to REACH of the side in each direction; the border repeats its last pixel."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (w_reach := max(1, int(w * REACH)), w_reach, h_reach := max(1, int(h * REACH)), h_reach), mode="replicate")

    def places(side: int, reach: int) -> Tensor:
        start = torch.randint(0, 2 * reach + 1, (len(x), 1), generator=generator, device=x.device)
        return start + torch.arange(side, device=x.device)

    rows, columns = places(h, h_reach), places(w, w_reach)
    batch = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _colour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness by up to 0.5, saturation by a factor 0..2, contrast by a factor 0.5..1.5, in this order."""
    x = x + _uniform(x, generator, -0.5, 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + _uniform(x, generator, 0, 2) * (x - grey)
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    return level + _uniform(x, generator, 0.5, 1.5) * (x - level)


def _cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    """Zero in a square of HOLE of the side, whose centre is anywhere in the picture."""
    h, w = x.shape[-2:]
    dy = torch.arange(h, device=x.device).view(1, 1, h, 1) + 0.5 - _uniform(x, generator, 0, h)
    dx = torch.arange(w, device=x.device).view(1, 1, 1, w) + 0.5 - _uniform(x, generator, 0, w)
    inside = (dy.abs() < h * HOLE / 2) & (dx.abs() < w * HOLE / 2)
    return x.masked_fill(inside, 0.0)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "flip": _flip,
    "translate": _translate,
    "colour": _colour,
    "cutout": _cutout,
}
