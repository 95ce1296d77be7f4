"""`offload_optimizer`: moments copied away and back change no bit. From one place of a CPU's memory to another; no GPU was there to try."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from loop import assert_same_state, make, record
from test_plan import settings, sources  # noqa: F401  # the fixture

from unidad import checkpoint
from unidad import plan as planning
from unidad.cli import main
from unidad.config import LoopSettings, TrainSettings, build_settings
from unidad.errors import SettingsError
from unidad.methods.base import Method
from unidad.offload import HostMoments, refuse_useless_offload
from unidad.optimizers import make_optimizer
from unidad.signals import Stopped
from unidad.train import Trainer

AWAY = {"offload_optimizer": True}


def places(optimizer: torch.optim.Optimizer) -> list[int]:
    """Where each moment lies."""
    return [t.data_ptr() for slot in optimizer.state.values() for t in slot.values() if t.ndim]


def run(path: Path, folder: Path, method: Method | None = None, **values: object) -> Trainer:
    trainer = make(path, folder, method or tiny.unidad(), cycles=2, **values)
    trainer.fit()
    return trainer


def test_the_same_bits_as_without(tmp_path, picture_folder):
    plain, away = run(tmp_path / "plain", picture_folder), run(tmp_path / "away", picture_folder, **AWAY)
    assert_same_state(plain, away)


def test_moments_in_channels_last_layout(tmp_path, picture_folder):
    runs = []
    for name, values in (("plain", {}), ("away", AWAY)):
        method = tiny.unidad()
        for network in ("student", "fake_teacher", "target_teacher"):
            method.networks[network].to(memory_format=torch.channels_last)
        runs.append(run(tmp_path / name, picture_folder, method, **values))
    assert_same_state(*runs)
    moments = [t for slot in runs[1].optimizers["student"].state.values() for t in slot.values() if t.ndim == 4 and t.shape[2] > 1]
    assert any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in moments)


@pytest.mark.parametrize("stop_in_update", [1, 3])
def test_resume_is_bit_equal(stop_in_update, tmp_path, picture_folder):
    whole = run(tmp_path / "whole", picture_folder)
    first = make(tmp_path / "parts", picture_folder, cycles=2, **AWAY)
    record(first, stop_in_update)
    with pytest.raises(Stopped):
        first.fit()
    second = make(tmp_path / "parts", picture_folder, tiny.unidad(seed=99), cycles=2, **AWAY)
    second.restore(checkpoint.latest(tmp_path / "parts" / "checkpoints")[1])
    second.fit()
    assert_same_state(second, whole)


def test_only_the_network_that_steps_has_its_moments_at_hand(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, **AWAY)
    for phase in trainer.method.cycle_phases(0):  # the first step makes the moments
        trainer.update(phase)
    homes = {name: places(optimizer) for name, optimizer in trainer.optimizers.items()}
    assert all(homes.values())
    seen = []

    def look(stepping: torch.optim.Optimizer, *_: object) -> None:
        moved = [name for name, optimizer in trainer.optimizers.items() if not set(places(optimizer)) & set(homes[name])]
        kept = [name for name, optimizer in trainer.optimizers.items() if places(optimizer) == homes[name]]
        assert [trainer.optimizers[name] for name in moved] == [stepping]
        assert len(kept) == len(homes) - 1
        seen.extend(moved)

    for optimizer in trainer.optimizers.values():
        optimizer.register_step_pre_hook(look)  # after the one that fetches
    for phase in trainer.method.cycle_phases(0):
        trainer.update(phase)
    assert seen == ["student", "fake_teacher", "heads", "target_teacher"]
    assert {name: places(optimizer) for name, optimizer in trainer.optimizers.items()} == homes


def test_on_a_gpu_memory_is_page_locked_once_and_waited_for(monkeypatch):
    locked, waits = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor) or tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.AdamW(weights, fused=True)
    HostMoments(optimizer, torch.device("cuda"))
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert sorted(tuple(t.shape) for t in locked) == [(3, 2), (3, 2), (4,), (4,)]
    assert waits == [torch.device("cuda")] * 3
    assert places(optimizer) == [t.data_ptr() for t in locked]
    optimizer.load_state_dict(optimizer.state_dict())
    assert places(optimizer) == [t.data_ptr() for t in locked]
    assert len(waits) == 4


def test_off_by_default():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([weight], LoopSettings(), 0.1)
    found = []
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
        found.append(places(optimizer))
    assert found[0] == found[1]
    assert not optimizer._optimizer_step_pre_hooks


def test_refused_where_it_is_of_no_use(source: Path, picture_folder: Path, tmp_path, capsys):
    assert main(tiny.words(source, picture_folder, tmp_path / "run", "--set", "offload_optimizer=true")) == 2
    assert capsys.readouterr().err == (
        "unidad: 'offload_optimizer' moves moments out of an NVIDIA GPU's memory, and this run is on cpu. Leave it off.\n"
    )
    assert not (tmp_path / "run").exists()
    refuse_useless_offload(LoopSettings(**AWAY), torch.device("cuda"))
    refuse_useless_offload(LoopSettings(), torch.device("cpu"))
    with pytest.raises(SettingsError, match="plain AdamW only"):
        build_settings(TrainSettings, AWAY, {"optimizer": "adamw8bit"})


def test_the_plan_of_a_gpu_has_one_network_s_moments_at_a_time(sources, monkeypatch):  # noqa: F811
    on_cpu = planning.plan(settings(sources, "adm", **AWAY))
    monkeypatch.setattr(planning, "pick_device", lambda name: torch.device("cuda"))
    plain, away = planning.plan(settings(sources, "adm")), planning.plan(settings(sources, "adm", **AWAY))
    assert plain.optimizer == away.offloaded == on_cpu.optimizer > 0
    assert (away.optimizer, plain.offloaded, on_cpu.offloaded) == (0, 0, 0)
    assert away.stepping == 2 * plain.weights["student"] == on_cpu.stepping
    assert plain.total - away.total == plain.optimizer - max(0, away.stepping - max(plain.activations.values()))
    monkeypatch.setattr(planning, "room", lambda device: None)
    rows = dict(line.rsplit(maxsplit=1) for line in planning.memory_text(away, settings(sources, "adm", **AWAY)).splitlines()[1:])
    assert rows["  optimizer, kept off the device"] == f"{away.offloaded / 1e9:.3f}"
    assert rows["  optimizer, while it steps"] == f"{away.stepping / 1e9:.3f}"
    assert rows["  optimizer"] == "0.000"
    with pytest.raises(SettingsError, match="offload_optimizer=true"):
        planning.refuse_too_large(plain, settings(sources, "adm"), 1)
