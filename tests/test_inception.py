"""The FID network against the list of the published file's weights and an arithmetic written out a second time, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unidad.errors import DataError, ModelError
from unidad.metrics import weights as files
from unidad.metrics.evaluate import evaluate, table
from unidad.metrics.extractors import load_extractor
from unidad.metrics.inception import InceptionFid

STEM = """
Conv2d_1a_3x3 32 3 3 3
Conv2d_2a_3x3 32 32 3 3
Conv2d_2b_3x3 64 32 3 3
Conv2d_3b_1x1 80 64 1 1
Conv2d_4a_3x3 192 80 3 3"""
# {c} channels in, {p} channels after the pool
A = """
{b}.branch1x1 64 {c} 1 1
{b}.branch5x5_1 48 {c} 1 1
{b}.branch5x5_2 64 48 5 5
{b}.branch3x3dbl_1 64 {c} 1 1
{b}.branch3x3dbl_2 96 64 3 3
{b}.branch3x3dbl_3 96 96 3 3
{b}.branch_pool {p} {c} 1 1"""
B = """
Mixed_6a.branch3x3 384 288 3 3
Mixed_6a.branch3x3dbl_1 64 288 1 1
Mixed_6a.branch3x3dbl_2 96 64 3 3
Mixed_6a.branch3x3dbl_3 96 96 3 3"""
C = """
{b}.branch1x1 192 768 1 1
{b}.branch7x7_1 {w} 768 1 1
{b}.branch7x7_2 {w} {w} 1 7
{b}.branch7x7_3 192 {w} 7 1
{b}.branch7x7dbl_1 {w} 768 1 1
{b}.branch7x7dbl_2 {w} {w} 7 1
{b}.branch7x7dbl_3 {w} {w} 1 7
{b}.branch7x7dbl_4 {w} {w} 7 1
{b}.branch7x7dbl_5 192 {w} 1 7
{b}.branch_pool 192 768 1 1"""
D = """
Mixed_7a.branch3x3_1 192 768 1 1
Mixed_7a.branch3x3_2 320 192 3 3
Mixed_7a.branch7x7x3_1 192 768 1 1
Mixed_7a.branch7x7x3_2 192 192 1 7
Mixed_7a.branch7x7x3_3 192 192 7 1
Mixed_7a.branch7x7x3_4 192 192 3 3"""
E = """
{b}.branch1x1 320 {c} 1 1
{b}.branch3x3_1 384 {c} 1 1
{b}.branch3x3_2a 384 384 1 3
{b}.branch3x3_2b 384 384 3 1
{b}.branch3x3dbl_1 448 {c} 1 1
{b}.branch3x3dbl_2 384 448 3 3
{b}.branch3x3dbl_3a 384 384 1 3
{b}.branch3x3dbl_3b 384 384 3 1
{b}.branch_pool 192 {c} 1 1"""
LIST = (
    STEM
    + "".join(A.format(b=b, c=c, p=p) for b, c, p in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)))
    + B
    + "".join(C.format(b=b, w=w) for b, w in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)))
    + D
    + "".join(E.format(b=b, c=c) for b, c in (("Mixed_7b", 1280), ("Mixed_7c", 2048)))
)
CONVOLUTIONS = {row.split()[0]: tuple(int(n) for n in row.split()[1:]) for row in LIST.split("\n") if row}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """All 566 entries of the file: a convolution and a batch norm 94 times over, and the head of 1008 classes."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in CONVOLUTIONS.items():
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.bn.{key}": shape[:1] for key in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in published_shapes().items():
        fan = torch.Size(shape[1:]).numel()
        values = (
            torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
            if len(shape) == 4
            else torch.rand(shape, generator=generator)
        )
        weights[key] = values + 0.5 if key.endswith(("running_var", "bn.weight")) else values
    return weights


class ByHand:
    """The network once more, as a list of calls; nothing is shared with the package."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], None, stride, pad)
        weight, bias, mean, var = (
            self.state[f"{name}.bn.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 0.001).sqrt() * weight + bias).clamp(min=0)

    def a(self, x: Tensor, b: str) -> Tensor:
        five = self.conv(self.conv(x, f"{b}.branch5x5_1"), f"{b}.branch5x5_2", pad=(2, 2))
        three = self.conv(self.conv(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2", pad=(1, 1))
        three = self.conv(three, f"{b}.branch3x3dbl_3", pad=(1, 1))
        return torch.cat([self.conv(x, f"{b}.branch1x1"), five, three, self.conv(average(x), f"{b}.branch_pool")], 1)

    def b(self, x: Tensor, b: str) -> Tensor:
        three = self.conv(self.conv(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2", pad=(1, 1))
        three = self.conv(three, f"{b}.branch3x3dbl_3", 2)
        return torch.cat([self.conv(x, f"{b}.branch3x3", 2), three, F.max_pool2d(x, 3, 2)], 1)

    def c(self, x: Tensor, b: str) -> Tensor:
        row, column = (0, 3), (3, 0)
        once = self.conv(self.conv(x, f"{b}.branch7x7_1"), f"{b}.branch7x7_2", pad=row)
        once = self.conv(once, f"{b}.branch7x7_3", pad=column)
        twice = self.conv(self.conv(x, f"{b}.branch7x7dbl_1"), f"{b}.branch7x7dbl_2", pad=column)
        twice = self.conv(self.conv(twice, f"{b}.branch7x7dbl_3", pad=row), f"{b}.branch7x7dbl_4", pad=column)
        twice = self.conv(twice, f"{b}.branch7x7dbl_5", pad=row)
        return torch.cat([self.conv(x, f"{b}.branch1x1"), once, twice, self.conv(average(x), f"{b}.branch_pool")], 1)

    def d(self, x: Tensor, b: str) -> Tensor:
        three = self.conv(self.conv(x, f"{b}.branch3x3_1"), f"{b}.branch3x3_2", 2)
        seven = self.conv(self.conv(x, f"{b}.branch7x7x3_1"), f"{b}.branch7x7x3_2", pad=(0, 3))
        seven = self.conv(self.conv(seven, f"{b}.branch7x7x3_3", pad=(3, 0)), f"{b}.branch7x7x3_4", 2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(self, x: Tensor, b: str, pooled: Tensor) -> Tensor:
        y = self.conv(x, f"{b}.branch3x3_1")
        once = [self.conv(y, f"{b}.branch3x3_2a", pad=(0, 1)), self.conv(y, f"{b}.branch3x3_2b", pad=(1, 0))]
        y = self.conv(self.conv(x, f"{b}.branch3x3dbl_1"), f"{b}.branch3x3dbl_2", pad=(1, 1))
        twice = [self.conv(y, f"{b}.branch3x3dbl_3a", pad=(0, 1)), self.conv(y, f"{b}.branch3x3dbl_3b", pad=(1, 0))]
        return torch.cat([self.conv(x, f"{b}.branch1x1"), *once, *twice, self.conv(pooled, f"{b}.branch_pool")], 1)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", pad=(1, 1)), 3, 2)
        x = F.max_pool2d(self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(x, name)
        x = self.b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.c(x, name)
        x = self.d(x, "Mixed_7a")
        x = self.e(x, "Mixed_7b", average(x))
        x = self.e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def average(x: Tensor) -> Tensor:
    """3x3 average that divides by the places inside the picture only."""
    inside = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1) / inside


def test_the_list_of_weights_is_that_of_the_published_file():
    shapes = published_shapes()
    assert len(CONVOLUTIONS) == 94
    assert len(shapes) == 566
    # four bytes a number and a few kB of names: the file has 95,628,359 bytes
    assert 0 < 95_628_359 - 4 * sum(torch.Size(s).numel() for s in shapes.values()) < 100_000


def test_it_takes_every_weight_and_agrees_with_the_arithmetic_by_hand(state):
    network = InceptionFid(state, "ab" * 32, batch_size=2)
    used = {key for key in state if not key.startswith("fc.")}
    assert set(network._network.state_dict()) == used
    pixels = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(pixels / 255.0, size=(299, 299), mode="bilinear", align_corners=False, antialias=False) * 2 - 1
    expected = ByHand(state)(x)
    ours = network(pixels)
    assert ours.shape == (3, 2048)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (network.name, network.digest) == ("inception-fid", "ab" * 32)


def test_other_weights_are_refused(state):
    without_counters = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    InceptionFid(without_counters, "")  # old files have no counters
    for change in (
        {"Mixed_6a.branch3x3.conv.weight": torch.zeros(384, 288, 3, 1)},
        {"AuxLogits.conv0.conv.weight": torch.zeros(1)},
    ):
        with pytest.raises(ModelError, match="not the weights"):
            InceptionFid(state | change, "")
    with pytest.raises(ModelError, match=r"Mixed_7c\.branch1x1\.bn\.bias"):
        InceptionFid({key: value for key, value in state.items() if key != "Mixed_7c.branch1x1.bn.bias"}, "")
    with pytest.raises(DataError, match="uint8"):
        InceptionFid(state, "")(torch.zeros(1, 3, 8, 8))


def test_by_name_it_reads_the_file_and_its_frechet_distance_is_an_fid(state, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    monkeypatch.setattr(files, "INCEPTION", replace(files.INCEPTION, sha256=files.sha256_of(path)))
    extractor = load_extractor("inception-fid", [path], batch_size=4)
    assert extractor.digest == files.sha256_of(path)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    scores = evaluate(pixels[:3], pixels[3:], None, extractor)
    assert f"FID {scores['frechet_distance']:>26.4f}" in table(scores)
    assert f"KID {scores['kernel_distance']:>26.4f}" in table(scores)
