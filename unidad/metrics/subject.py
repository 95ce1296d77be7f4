"""Scores of a subject drawn under many prompts: likeness to its photos, to the prompts, and variety. Pure maths on features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def image_likeness(samples: Tensor, photos: Tensor) -> float:
    """Mean cosine over all pairs of a sample and a photo (DINO and CLIP-I, DreamBooth, arXiv 2208.12242): [N, D], [M, D] -> -1..1."""
    return float((F.normalize(samples.double(), dim=1) @ F.normalize(photos.double(), dim=1).T).mean())


def prompt_likeness(samples: Tensor, texts: Tensor, prompt_of: Tensor) -> float:
    """Mean cosine of each sample with its own prompt (CLIP-T): [N, D], [P, D], rows of prompts [N] int64 -> -1..1."""
    return float(F.cosine_similarity(samples.double(), texts.double()[prompt_of], dim=1).mean())


@dataclass(frozen=True)
class Variety:
    """Mean squared distances between samples; None where there is no such pair."""

    intra: float | None
    inter: float | None


@dataclass
class _Pairs:
    """Of vectors x_i seen so far: n, sum x_i and sum |x_i|^2, from which the sum over pairs follows."""

    total: Tensor
    squares: float = 0.0
    n: int = 0

    def add(self, x: Tensor) -> None:
        self.total += x
        self.squares += float(x.double().square().sum())
        self.n += 1

    @property
    def count(self) -> int:
        return self.n * (self.n - 1) // 2

    @property
    def distances(self) -> float:
        """Sum of |x_i - x_j|^2 over unordered pairs, n sum |x_i|^2 - |sum x_i|^2."""
        return max(0.0, self.n * self.squares - float(self.total.double().square().sum()))


@torch.inference_mode()
def prompt_variety(batches: Iterable[Tensor], prompt_of: Tensor) -> Variety:
    """Variety in features whose squared euclidean distance is the distance meant (Intra- and Inter-LPIPS with `Lpips.batches`).

    Intra is the mean over pairs of one prompt, averaged over the prompts with two samples or more; inter the mean over all pairs of
    different prompts. One pass, three feature vectors held: no pair is ever formed.

    Args:
        batches: features [B, D] of the samples in order, those of one prompt together.
        prompt_of: [N] int64, never falling.

    Raises:
        ValueError: if samples of one prompt do not stand together, or the counts differ.
    """
    if bool((prompt_of.diff() < 0).any()):
        raise ValueError("samples of one prompt must stand together")
    groups: list[tuple[float, int]] = []
    origin, every, own, current = None, None, None, None
    rows = [int(p) for p in prompt_of]
    for prompt, x in zip(rows, (row for batch in batches for row in batch), strict=True):
        if origin is None:
            origin, every = x.clone(), _Pairs(torch.zeros_like(x))
        if own is None or prompt != current:
            groups += [(own.distances, own.count)] if own is not None else []
            own, current = _Pairs(torch.zeros_like(x)), prompt
        assert every is not None
        every.add(x - origin)
        own.add(x - origin)
    if own is None or every is None:
        return Variety(None, None)
    groups.append((own.distances, own.count))
    means = [distance / count for distance, count in groups if count]
    apart = every.count - sum(count for _, count in groups)
    between = max(0.0, every.distances - sum(distance for distance, _ in groups))
    return Variety(sum(means) / len(means) if means else None, between / apart if apart else None)
