"""`optimizer=adamw8bit`, with bitsandbytes where it is installed and with a small stand-in of the same shape where not."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from loop import assert_resumes, make, record
from test_plan import settings, sources  # noqa: F401  # the fixture

from unidad import optimizers
from unidad import plan as planning
from unidad import train as loop
from unidad.cli import main
from unidad.config import LoopSettings, TrainSettings, build_settings
from unidad.errors import CheckpointError, SettingsError

EIGHT = {"optimizer": "adamw8bit"}


class StandIn(torch.optim.Optimizer):
    """AdamW that keeps its moments as bitsandbytes 0.50 does: the same names, types and sizes, a whole number of steps, shared maps."""

    NESTED = "__bnb_optimizer_quant_state__"

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, min_8bit_size: int):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        self.least, self.map = min_8bit_size, torch.linspace(-1, 1, 256) ** 3  # denser towards 0

    def _read(self, slot: dict[str, Any], which: str) -> torch.Tensor:
        codes = slot[f"state{which}"]
        if codes.dtype == torch.float32:
            return codes
        scale = slot[f"absmax{which}"].repeat_interleave(256)[: codes.numel()].view_as(codes)
        return slot[f"qmap{which}"][codes.long()] * scale

    def _write(self, slot: dict[str, Any], which: str, value: torch.Tensor) -> None:
        if value.numel() < self.least:
            slot[f"state{which}"] = value
            return
        blocks = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % 256)).view(-1, 256)
        scale = blocks.abs().amax(dim=1).clamp_min(1e-30)
        parts = blocks / scale[:, None]
        codes = ((parts.sign() * parts.abs() ** (1 / 3) + 1) * 127.5).round().to(torch.uint8)
        slot[f"state{which}"] = codes.flatten()[: value.numel()].view_as(value)
        slot |= {f"absmax{which}": scale, f"qmap{which}": self.map}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                slot = self.state[p]
                if not slot:
                    slot["step"] = 0
                    self._write(slot, "1", torch.zeros_like(p))
                    self._write(slot, "2", torch.zeros_like(p))
                slot["step"] += 1
                (one, two), n = group["betas"], slot["step"]
                first = self._read(slot, "1").lerp(p.grad, 1 - one)
                second = self._read(slot, "2").lerp(p.grad**2, 1 - two)
                self._write(slot, "1", first)
                self._write(slot, "2", second)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (first / (1 - one**n)) / ((second.clamp_min(0) / (1 - two**n)).sqrt() + group["eps"]))

    def state_dict(self) -> dict[str, Any]:
        plain = super().state_dict()
        for i, slot in plain["state"].items():
            plain["state"][i] = {"step": slot["step"], self.NESTED: {k: v for k, v in slot.items() if k != "step"}}
        return plain

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, slot in state_dict["state"].items():
            assert isinstance(slot["step"], int)
            self.state[parameters[i]] = dict(slot)


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def eight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(optimizers, "LEAST", 256)  # else nine tenths of these small networks would keep float32
    if request.param == "stand-in":
        package, inner = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
        package.__spec__, inner.AdamW8bit = ModuleSpec("bitsandbytes", None), StandIn
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", inner)
    return request.param


def moments(trainer: loop.Trainer) -> dict[str, torch.Tensor]:
    groups = trainer.snapshot().tensors
    return {f"{g}.{k}": t.clone() for g, ts in groups.items() if g.startswith("optimizer") for k, t in ts.items()}


@pytest.mark.parametrize("stop_in_update", [1, 3])
def test_resume_is_bit_equal(stop_in_update, eight, tmp_path, picture_folder):
    assert_resumes(stop_in_update, tmp_path, picture_folder, tiny.unidad, cycles=2, **EIGHT)


def test_moments_are_held_in_eight_bits_and_counted(eight, tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, cycles=1, **EIGHT)
    trainer.fit()
    found = {k: t for k, t in moments(trainer).items() if ".qmap" not in k and not k.endswith(".step")}
    assert {t.dtype for t in found.values()} == {torch.uint8, torch.float32}
    networks = [trainer.method.networks[name] for name in trainer.method.trained()]
    counted = sum(optimizers.moment_bytes(n.parameters(), trainer.settings) for n in networks)
    assert sum(t.numel() * t.element_size() for t in found.values()) == counted
    assert all(t.max() < optimizers.LEAST for t in [torch.tensor(t.numel()) for t in found.values() if t.dtype == torch.float32])


def test_learns_as_adamw_does(eight, tmp_path, picture_folder):
    """After twelve updates every network's change of weights points where AdamW's does (cosine above 0.98) and is as long to 5 %."""
    start = tiny.unidad().networks
    changes = []
    for name, values in (("plain", {}), ("eight", EIGHT)):
        trainer = make(tmp_path / name, picture_folder, cycles=3, warmup=0, ema=0, **values)
        trainer.fit()
        after = trainer.method.networks
        changes.append(
            {
                n: torch.cat([(p - q).flatten() for p, q in zip(after[n].parameters(), start[n].parameters(), strict=True)])
                for n in after
            }
        )
    for name in trainer.method.trained():
        plain, eighth = (change[name].detach() for change in changes)
        assert float(torch.cosine_similarity(plain, eighth, dim=0)) > 0.98, name
        assert float(eighth.norm() / plain.norm()) == pytest.approx(1, abs=0.05), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_changes_nothing(value, eight, tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, non_finite="skip", **EIGHT)
    first, second, *_ = trainer.method.cycle_phases(0)
    trainer.update(first)
    trainer.update(second)
    record(trainer, poison=("fake_teacher", value))
    before = moments(trainer), {n: [p.clone() for p in net.parameters()] for n, net in trainer.method.networks.items()}
    trainer.update(trainer.method.cycle_phases(0)[1])
    assert trainer.place.skipped == 1
    after = moments(trainer)
    assert before[0].keys() == after.keys()
    assert all(torch.equal(t, after[k]) for k, t in before[0].items())
    for name, network in trainer.method.networks.items():
        assert all(torch.equal(p, q) for p, q in zip(before[1][name], network.parameters(), strict=True)), name


class OnGpu:
    """An accelerator that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self._real = Accelerator(cpu=True)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


def test_on_a_gpu_it_is_looked_at_every_loss(eight, tmp_path, picture_folder, monkeypatch):
    """8-bit AdamW takes no flag that would leave an update out on the device."""
    monkeypatch.setattr(loop, "DeferredGuard", lambda *_: "deferred")
    assert make(tmp_path / "a", picture_folder, accelerator=OnGpu()).guard == "deferred"
    assert make(tmp_path / "b", picture_folder, accelerator=OnGpu(), **EIGHT).guard is None


def test_a_checkpoint_of_the_other_optimizer_does_not_fit(eight, tmp_path, picture_folder):
    plain, other = make(tmp_path / "a", picture_folder), make(tmp_path / "b", picture_folder, **EIGHT)
    for one in (plain, other):
        one.update(one.method.cycle_phases(0)[0])
    for one, snapshot in ((plain, other.snapshot()), (other, plain.snapshot())):
        with pytest.raises(CheckpointError, match="does not fit"):
            one.restore(snapshot)


def test_refused_without_the_library_before_anything_is_written(source: Path, picture_folder: Path, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else there(name, *a))
    assert main(tiny.words(source, picture_folder, tmp_path / "run", "--set", "optimizer=adamw8bit")) == 2
    words = ["pretrain", "--data", str(picture_folder), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*words, "--set", "optimizer=adamw8bit"]) == 2
    one, two = capsys.readouterr().err.splitlines()
    assert (
        one == two == "unidad: 'optimizer' adamw8bit needs bitsandbytes. Run: pip install 'unidad[8bit]', or set optimizer=adamw."
    )
    assert not (tmp_path / "run").exists()


def test_refused_combinations():
    with pytest.raises(SettingsError, match="not mps"):
        optimizers.refuse_missing_optimizer(LoopSettings(**EIGHT), torch.device("mps"))
    optimizers.refuse_missing_optimizer(LoopSettings(), torch.device("mps"))
    with pytest.raises(SettingsError, match="channels_last=false"):
        build_settings(TrainSettings, EIGHT, {"channels_last": True})


def test_the_plan_counts_eight_bits(sources):  # noqa: F811
    plain, eighth = planning.plan(settings(sources, "adm")), planning.plan(settings(sources, "adm", **EIGHT))
    assert 0.25 < eighth.optimizer / plain.optimizer < 0.4
    assert plain.total - eighth.total == plain.optimizer - eighth.optimizer
    assert eighth.weights == plain.weights
    with pytest.raises(SettingsError, match="optimizer=adamw8bit"):
        planning.refuse_too_large(plain, settings(sources, "adm"), 1)
