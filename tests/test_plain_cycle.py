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


def test_the_plain_cycle_has_the_same_losses(benchmark):
    found = []
    for plain in (False, True):
        method = tiny.unidad(shared_forward=False)
        if plain:
            method._logits = benchmark.MethodType(benchmark.whole_forward_logits, method)
        pictures = torch.linspace(-1, 1, 2 * 3 * tiny.SHAPE[-1] ** 2).view(2, *tiny.SHAPE)
        found.append([{k: v.item() for k, v in phase.loss(pictures).items()} for phase in method.phases])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
