"""The plain cycle that ours is timed against computes the same numbers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture
def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "plain_cycle.py"
    spec = importlib.util.spec_from_file_location("plain_cycle", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    sys.modules["plain_cycle"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(method):
    pictures = torch.linspace(-1, 1, 2 * 3 * tiny.SHAPE[-1] ** 2).view(2, *tiny.SHAPE)
    return [{k: v.item() for k, v in phase.loss(pictures).items()} for phase in method.phases]


@pytest.mark.parametrize("waste", ["run_whole_network", "unfuse_attention"])
def test_the_plain_cycle_has_the_same_losses(benchmark, waste):
    ours, plain = tiny.unidad(shared_forward=False), tiny.unidad(shared_forward=False)
    getattr(benchmark, waste)(plain)
    for expected, found in zip(losses(ours), losses(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_plain_cycle_has_the_same_gradients(benchmark):
    found = []
    for plain in (False, True):
        method = tiny.unidad(shared_forward=False)
        if plain:
            benchmark.run_whole_network(method)
            benchmark.unfuse_attention(method)
        method.networks["student"].requires_grad_(True)
        method.phases[0].loss(torch.empty(0))["total"].backward()
        found.append(torch.cat([p.grad.flatten() for p in method.networks["student"].parameters()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6 * found[0].abs().max().item())


@pytest.mark.slow
def test_the_plain_cycle_computes_attention_twice(benchmark, tmp_path):
    """Its FLOPs: each phase that learns has the attention of one more forward, and a look of the heads the decoder."""
    small = {"batch_size": 1, "steps": 1, "fake_updates": 1, "shared_forward": False}
    counted = {}
    for waste in ([], ["attention"], ["decoder"]):
        cycle = benchmark.plain(benchmark.Cycle.build("avatars", small, tmp_path / "".join(waste)), waste)
        counted["".join(waste)] = cycle.flops()
    forward = cycle.forward_flops()
    assert counted["attention"]["target_teacher"] > counted[""]["target_teacher"]
    assert counted["decoder"]["target_teacher"] == counted[""]["target_teacher"]
    for phase, looks in (("student", 1), ("fake_teacher", 2)):
        assert 0.5 * looks * forward < counted["decoder"][phase] - counted[""][phase] < 0.9 * looks * forward
