"""LPIPS v0.1 (Zhang et al. 2018) as features: the squared euclidean distance between two pictures' features is their LPIPS.

The paper's distance is sum over layers of the spatial mean of w_c (f_c - g_c)^2, with f and g scaled to length 1 over the channels
at each place. With sqrt(w_c / (H W)) f_c as features that is |x - y|^2, so that a set needs one forward pass a picture, not a pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unidad.errors import DataError, ModelError
from unidad.metrics.distances import INTRA_MODES, IntraDiversity, IntraMode, Nearest
from unidad.metrics.features import check_pixels, in_batches

Net = Literal["vgg", "alex"]
Conv = tuple[int, int, int, int, int]  # place in torchvision's `features`, channels out, kernel, stride, padding


def _threes(*places: int, out: int) -> tuple[Conv, ...]:
    return tuple((place, out, 3, 1, 1) for place in places)


# "pool" comes before the next convolution; "tap" marks a layer that LPIPS compares, after its ReLU.
_VGG16: tuple[Conv | str, ...] = (
    *_threes(0, 2, out=64),
    *("tap", "pool"),
    *_threes(5, 7, out=128),
    *("tap", "pool"),
    *_threes(10, 12, 14, out=256),
    *("tap", "pool"),
    *_threes(17, 19, 21, out=512),
    *("tap", "pool"),
    *_threes(24, 26, 28, out=512),
    "tap",
)
_ALEXNET: tuple[Conv | str, ...] = (
    (0, 64, 11, 4, 2),
    *("tap", "pool"),
    (3, 192, 5, 1, 2),
    *("tap", "pool"),
    (6, 384, 3, 1, 1),
    "tap",
    (8, 256, 3, 1, 1),
    "tap",
    (10, 256, 3, 1, 1),
    "tap",
)
LAYERS: dict[Net, tuple[Conv | str, ...]] = {"vgg": _VGG16, "alex": _ALEXNET}
_POOL = {"vgg": 2, "alex": 3}  # windows; the stride is 2
LEAST_SIDE = 32
# Mean and deviation of ImageNet, for inputs in [-1, 1]; published with the method.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def weight_shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights: `features.N.weight` and `.bias` as torchvision has them, `linN.model.1.weight` as LPIPS has."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels, taps = 3, 0
    for layer in LAYERS[net]:
        if layer == "tap":
            shapes[f"lin{taps}.model.1.weight"] = (1, channels, 1, 1)
            taps += 1
        elif not isinstance(layer, str):
            place, out, kernel, _, _ = layer
            shapes[f"features.{place}.weight"], shapes[f"features.{place}.bias"] = (out, channels, kernel, kernel), (out,)
            channels = out
    return shapes


class Lpips:
    """Features [N, D] whose squared euclidean distances are LPIPS; D grows with the pictures (8 million for VGG at 256 pixels).

    Args:
        net: "vgg" (VGG16, the one few-shot papers report) or "alex".
        state: the weights by name, see `weight_shapes`; those of the classifier (`classifier.*`) are passed over.
        digest: sha256 over the files they came from.
        batch_size: pictures at a time.
        device: where the network runs and distances are taken.

    Raises:
        ModelError: if a weight is missing, unknown, of another shape, or a linear weight is negative.
    """

    resize = "none"

    def __init__(
        self, net: Net, state: Mapping[str, Tensor], digest: str, batch_size: int = 16, device: torch.device | str = "cpu"
    ):
        self.name, self.net = f"lpips-{net}", net
        self.digest, self.batch_size, self.device = digest, batch_size, torch.device(device)
        shapes = weight_shapes(net)
        used = {key: value for key, value in state.items() if not key.startswith("classifier.")}
        wrong = [key for key in {*shapes, *used} if key not in used or key not in shapes or used[key].shape != shapes[key]]
        if wrong:
            raise ModelError(
                f"These are not the weights of LPIPS with '{net}': '{min(wrong)}' is missing, unknown or of another shape."
            )
        self._weights = {key: used[key].to(self.device).float() for key in shapes}
        self._roots = [self._weights[f"lin{i}.model.1.weight"] for i in range(5)]
        if any(bool((root < 0).any()) for root in self._roots):
            raise ModelError("LPIPS' linear weights must not be negative: without that it is no distance.")
        self._roots = [root.sqrt() for root in self._roots]

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8, H and W at least 32 -> [N, D] float32 on the CPU: 0.12 million numbers at 32 pixels, 8 at 256."""
        self._check(pixels)
        return in_batches(self._features, pixels, self.batch_size)

    def batches(self, pixels: Tensor, low: float = -1.0) -> Iterator[Tensor]:
        """The same a batch at a time, [B, D] float32 on `device`, with 0..255 taken to [low, 1]; LPIPS is made for low = -1."""
        self._check(pixels)
        for batch in pixels.split(self.batch_size):
            with torch.inference_mode():
                features = self._features(batch, low)
            yield features

    def _check(self, pixels: Tensor) -> None:
        check_pixels(pixels)
        if min(pixels.shape[-2:]) < LEAST_SIDE:
            raise DataError(f"LPIPS needs pictures of {LEAST_SIDE} pixels or more, not {pixels.shape[-1]}x{pixels.shape[-2]}.")

    def _features(self, pixels: Tensor, low: float = -1.0) -> Tensor:
        x = pixels.to(self.device).float() / 255 * (1 - low) + low
        shift, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        parts = []
        for root, tapped in zip(self._roots, self._taps((x - shift) / scale), strict=True):
            unit = tapped / (tapped.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            parts.append((unit * root / (tapped.shape[-1] * tapped.shape[-2]) ** 0.5).flatten(1))
        return torch.cat(parts, dim=1)

    def _taps(self, x: Tensor) -> Iterator[Tensor]:
        for layer in LAYERS[self.net]:
            if layer == "tap":
                yield x
            elif layer == "pool":
                x = F.max_pool2d(x, _POOL[self.net], stride=2)
            elif not isinstance(layer, str):
                place, _, _, stride, padding = layer
                weight, bias = (self._weights[f"features.{place}.{kind}"] for kind in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))


def combined_digest(digests: list[str]) -> str:
    """One sha256 for weights that came from several files."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _assigned(x: Tensor, targets: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's nearest target, the difference to it [B, D], and its squared length, exact even where it is 0."""
    index = (norms - 2 * (x @ targets.T)).argmin(dim=1)
    difference = x - targets[index]
    return index, difference, difference.square().sum(dim=1)


def nearest_lpips(extractor: Lpips, queries: Tensor, among: Tensor) -> Nearest:
    """For each picture of `queries` its nearest of `among` (few), both [*, 3, H, W] uint8; `distance` is LPIPS itself."""
    return intra_lpips(extractor, queries, among)[1]


@torch.inference_mode()
def intra_lpips(
    extractor: Lpips, fake: Tensor, targets: Tensor, max_per_cluster: int = 100, mode: IntraMode = "correct"
) -> tuple[IntraDiversity, Nearest]:
    """`distances.intra_diversity` in LPIPS without holding the features: Intra-LPIPS (Ojha et al. 2021), one pass over the fakes.

    A cluster keeps the sum of its members' differences d_i from its target and of their squares, for
    mean |x_i - x_j|^2 over pairs = 2 / (n - 1) * (sum |d_i|^2 - |sum d_i|^2 / n). Memory: 2 (M + batch_size) feature vectors.

    Args:
        fake: [N, 3, H, W] uint8.
        targets: [M, 3, H, W] uint8, the few training pictures.
        max_per_cluster: at least 2; the first members count.
        mode: "correct", or "paper", which repeats the public code: the fakes enter the network in [0, 1] but the training
            pictures in [-1, 1], and a cluster with fewer than 2 members scores 0.

    Returns:
        The score, and each fake's nearest target with its LPIPS, as this mode sees them.

    Raises:
        ValueError: for an unknown mode or `max_per_cluster` < 2.
        DataError: if the pictures differ in size or are too small.
    """
    if mode not in INTRA_MODES or max_per_cluster < 2:
        raise ValueError(f"mode must be one of {', '.join(INTRA_MODES)} and max_per_cluster at least 2")
    if fake.shape[1:] != targets.shape[1:]:
        raise DataError(f"LPIPS compares pictures of one size, not {list(fake.shape[-2:])} with {list(targets.shape[-2:])}.")
    y = torch.cat(list(extractor.batches(targets)))
    norms = y.square().sum(dim=1)
    sums, squares, counts = torch.zeros_like(y), [0.0] * len(y), [0] * len(y)
    indices, distances = [], []
    for x in extractor.batches(fake, low=-1.0 if mode == "correct" else 0.0):
        index, difference, squared = _assigned(x, y, norms)
        indices.append(index.cpu())
        distances.append(squared.cpu().double())
        for cluster in indices[-1].unique().tolist():
            members = (index == cluster).nonzero()[: max_per_cluster - counts[cluster], 0]
            sums[cluster] += difference[members].sum(dim=0)
            squares[cluster] += float(squared[members].sum())
            counts[cluster] += len(members)
    scores = [
        max(0.0, 2 / (n - 1) * (square - float(total.square().sum()) / n))
        for n, square, total in zip(counts, squares, sums, strict=True)
        if n >= 2
    ]
    counted = len(y) if mode == "paper" else len(scores)
    value = sum(scores) / counted if counted else float("nan")
    return IntraDiversity(value, counted, len(y) - len(scores)), Nearest(torch.cat(indices), torch.cat(distances))
