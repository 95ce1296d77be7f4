"""A training loop on tiny networks, what happens in it, and what it leaves."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator

from unidad import checkpoint
from unidad.config import TrainSettings, build_settings
from unidad.data import PictureStream, load_folder
from unidad.log import Log
from unidad.methods.base import Method, Phase
from unidad.run import RunFolder
from unidad.signals import Stopped
from unidad.train import Trainer

BASE = {
    "batch_size": 2,
    "lr": 1e-3,
    "warmup": 3,
    "cycles": 3,
    "log_every": 1,
    "sample_every": 0,
    "save_every": 0,
    "tracker": "none",
}


def make(path: Path, folder: Path, method: Method | None = None, accelerator: object = None, **settings: object) -> Trainer:
    method = method or tiny.unidad()
    s = build_settings(TrainSettings, BASE, settings)
    path.mkdir(parents=True, exist_ok=True)
    run, accelerator = RunFolder(path), accelerator or Accelerator(cpu=True)
    stream = PictureStream(load_folder(folder, 16).pixels, hflip=True, seed=3)
    generator = getattr(method, "generator", torch.Generator())
    return Trainer(method, stream, s, run, Log(run, accelerator), generator, accelerator, rates={"heads": 5e-3})


def record(trainer: Trainer, stop_in_update: int | None = None, poison: tuple[str, float] | None = None) -> list[tuple]:
    """Note the losses of every micro-batch; ask for a stop from within one of them, or spoil a phase's total."""
    seen: list[tuple] = []

    def wrap(phase: Phase) -> Phase:
        def loss(pictures: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
            losses = phase.loss(pictures, labels)
            seen.append((phase.name, {k: v.item() for k, v in losses.items()}))
            if len(seen) == stop_in_update:
                trainer._stop = signal.SIGTERM
            if poison and phase.name == poison[0]:
                losses["total"] = losses["total"] * poison[1]
            return losses

        return dataclasses.replace(phase, loss=loss)

    trainer.method.phases = [wrap(p) for p in trainer.method.phases]
    return seen


def assert_same_state(a: Trainer, b: Trainer) -> None:
    one, two = a.snapshot(), b.snapshot()
    assert one.tensors.keys() == two.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == two.tensors[group].keys()
        different = [k for k, t in tensors.items() if not torch.equal(t, two.tensors[group][k])]
        assert different == [], group
    for counters in (one.counters, two.counters):
        counters["place"] = {k: v for k, v in counters["place"].items() if k != "seconds"}
    assert one.counters == two.counters


def assert_resumes(stop_in_update, tmp_path, picture_folder, method, **settings):
    """A run of `method()` that is stopped in this update goes on, with another seed in memory, to the bits of one that is not."""
    whole = make(tmp_path / "whole", picture_folder, method(), **settings)
    expected = record(whole)
    whole.fit()
    parts = make(tmp_path / "parts", picture_folder, method(), **settings)
    seen = record(parts, stop_in_update)
    with pytest.raises(Stopped):
        parts.fit()
    again = make(tmp_path / "parts", picture_folder, method(seed=99), **settings)
    again.restore(checkpoint.latest(tmp_path / "parts" / "checkpoints")[1])
    after = record(again)
    again.fit()
    assert seen + after == expected
    assert_same_state(again, whole)


def poisoned(trainer: Trainer, updates: set[int]) -> None:
    """Make the losses of those updates, counted from 1, nan."""
    seen = []

    def wrap(phase: Phase) -> Phase:
        def loss(pictures: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
            seen.append(phase.name)
            losses = phase.loss(pictures, labels)
            return losses | {"total": losses["total"] * (math.nan if len(seen) in updates else 1.0)}

        return dataclasses.replace(phase, loss=loss)

    trainer.method.phases = [wrap(p) for p in trainer.method.phases]
