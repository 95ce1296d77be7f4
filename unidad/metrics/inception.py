"""Inception-v3 as Frechet Inception Distances are made with it: the TensorFlow graph of 2015-12-05, its pool3 layer, 2048 numbers.

Szegedy et al. 2016, with the departures of that graph: average pools that do not count their padding, a max pool in the last
block, batch norms with eps 1e-3, no auxiliary head; the head of 1008 classes is not used. The names of the weights are those of
the file `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad.errors import ModelError
from unidad.metrics.features import at_a_time, in_batches

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, channels out, kernel
Branch = Sequence[Layer | tuple[Layer, Layer]]  # one layer after the other; a pair of layers forks, its halves lie side by side


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU. `padded` keeps the size; otherwise only whole windows count."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches over one input, laid side by side; each name in `branches` is that of a `ConvUnit`.

    Args:
        channels: of the input.
        branches: the order of the output's channels. In a block that halves the size, their last layers stride by 2.
        pool: "average" or "max", and the channels of the 1x1 layer `branch_pool` after it, which comes last; None in a block
            that halves the size, where the bare max pool comes last.
    """

    def __init__(self, channels: int, branches: Sequence[Branch], pool: tuple[str, int] | None):
        super().__init__()
        self.pool_kind = None if pool is None else pool[0]
        self.names: list[list[tuple[str, ...]]] = []
        for branch in branches:
            width, names = channels, []
            for i, step in enumerate(branch):
                halves = pool is None and i == len(branch) - 1
                layers: tuple[Layer, ...] = (step,) if isinstance(step[0], str) else step
                for name, out, kernel in layers:
                    self.add_module(name, ConvUnit(width, out, kernel, 2 if halves else 1, padded=not halves))
                names.append(tuple(name for name, _, _ in layers))
                width = sum(out for _, out, _ in layers)
            self.names.append(names)
        if pool is not None:
            self.branch_pool = ConvUnit(channels, pool[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.names:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool_kind is None:
            return F.max_pool2d(x, 3, stride=2)
        if self.pool_kind == "max":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _block_35(channels: int, pool: int) -> Block:
    """At 35x35: 64 + 64 + 96 + pool channels."""
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Block(channels, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)], double], ("average", pool))


def _block_17(width: int) -> Block:
    """At 17x17: 768 channels in and out, `width` inside; the 7x7 kernels are factorised."""
    row, column = (1, 7), (7, 1)
    once: Branch = [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)]
    twice: Branch = [
        ("branch7x7dbl_1", width, 1),
        ("branch7x7dbl_2", width, column),
        ("branch7x7dbl_3", width, row),
        ("branch7x7dbl_4", width, column),
        ("branch7x7dbl_5", 192, row),
    ]
    return Block(768, [[("branch1x1", 192, 1)], once, twice], ("average", 192))


def _block_8(channels: int, pool: str) -> Block:
    """At 8x8: 2048 channels out."""
    row, column = (1, 3), (3, 1)
    once: Branch = [("branch3x3_1", 384, 1), (("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column))]
    twice: Branch = [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        (("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)),
    ]
    return Block(channels, [[("branch1x1", 320, 1)], once, twice], (pool, 192))


class Inception(nn.Module):
    """[N, 3, 299, 299] in [-1, 1] -> [N, 2048], never negative."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = Block(288, [[("branch3x3", 384, 3)], double], None)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_17(width) for width in (128, 160, 160, 192))
        seven: Branch = [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        ]
        self.Mixed_7a = Block(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], seven], None)
        self.Mixed_7b, self.Mixed_7c = _block_8(1280, "average"), _block_8(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean(dim=(2, 3))


class InceptionFid:
    """pool3 features of `Inception`: the only ones in which a Frechet distance is an FID (Heusel et al. 2017).

    Pictures are scaled to 0..1, resized to 299 pixels by bilinear interpolation without antialiasing (corners not aligned) and
    taken to [-1, 1], as pytorch-fid does it, whose numbers are the ones usually published.

    Args:
        state: the weights by name; those of the class head (`fc.*`) are passed over.
        digest: sha256 of the file they came from.
        batch_size: pictures at a time; `at_a_time` unless given.
        device: where the network runs.

    Raises:
        ModelError: if a weight is missing, unknown, or of another shape.
    """

    name = "inception-fid"
    resize = "bilinear to 299x299, not antialiased"

    def __init__(self, state: Mapping[str, Tensor], digest: str, batch_size: int | None = None, device: torch.device | str = "cpu"):
        self.digest, self.batch_size, self.device = digest, batch_size or at_a_time(device), torch.device(device)
        self._network = Inception()
        # a plain dict: without the version that a state dict carries, absent counters `num_batches_tracked` are no error
        used = {key: value for key, value in state.items() if not key.startswith("fc.")}
        try:
            self._network.load_state_dict(used, strict=True)
        except RuntimeError as error:
            raise ModelError(
                f"These are not the weights of the FID's Inception-v3: {' '.join(str(error).split())[:300]}."
            ) from None
        self._network.eval().requires_grad_(False).to(self.device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, 2048] float32 on the CPU. Raises DataError for anything else."""
        return in_batches(self._features, pixels, self.batch_size)

    def _features(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.device).float() / 255
        if x.shape[-2:] != (299, 299):
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self._network(2 * x - 1)
