"""A run holds no more after many cycles than after few."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import tiny
import torch
from test_train import make

from unidad.train import Trainer

ANCHORED = {"anchor": "teacher", "anchor_weight": 1.0, "anchor_pool": 8, "augment": "flip"}


def alive() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def held(trainer: Trainer, cycles: int) -> tuple[int, int]:
    """Tensors and their bytes, after so many cycles more."""
    for _ in range(cycles):
        trainer._cycle()
        trainer._after_cycle()
    tensors = alive()
    return len(tensors), sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("cycles", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("numbers", [{}, ANCHORED], ids=["plain", "anchored"])
def test_no_tensor_and_no_graph_is_left_behind_by_a_cycle(cycles: int, numbers: dict, tmp_path: Path, picture_folder: Path) -> None:
    trainer = make(tmp_path, picture_folder, tiny.unidad(**numbers), ema=0.9)
    assert held(trainer, 2) == held(trainer, cycles)
    assert not [x for x in alive() if x.grad_fn is not None]
