"""A run holds no more after many cycles than after few."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import tiny
import torch
from loop import make

from unidad.device import keep_freed_memory
from unidad.train import Trainer

ANCHORED = {"anchor": "teacher", "anchor_weight": 1.0, "anchor_pool": 8, "augment": "flip"}


def alive() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def graphs() -> dict[int, torch.Tensor]:
    """The tensors that hold a graph, by id; held here, so that an id stays one tensor's."""
    return {id(x): x for x in alive() if x.grad_fn is not None}


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
    of_other_tests = graphs()
    trainer = make(tmp_path, picture_folder, tiny.unidad(**numbers), ema=0.9)
    assert held(trainer, 2) == held(trainer, cycles)
    assert graphs().keys() <= of_other_tests.keys()


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
def test_what_is_freed_is_there_for_the_next_pass_without_asking_the_system() -> None:
    import resource

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2 << 20) for _ in range(16)]  # 8 MB each, 32,768 pages in all
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    new_pages()
    assert new_pages() < 32768 / 4
