from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from unidad import checkpoint
from unidad.config import TrainSettings, build_settings
from unidad.data import PictureStream, load_folder
from unidad.errors import CheckpointError, NonFiniteError
from unidad.log import Log
from unidad.methods.base import Method, Phase
from unidad.run import Lock, RunFolder, check_folder, open_run
from unidad.signals import Stopped
from unidad.train import SKIPS_IN_A_ROW, Trainer

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


# -- resuming, RELIABILITY cases 1 and 2 ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, picture_folder) -> tuple[Trainer, list[tuple]]:
    trainer = make(tmp_path_factory.mktemp("whole"), picture_folder)
    seen = record(trainer)
    trainer.fit()
    return trainer, seen


@pytest.mark.parametrize("stop_in_update", [1, 2, 3, 4, 7])
def test_resume_is_bit_equal(stop_in_update, whole_run, tmp_path, picture_folder):
    """A cycle is student, fake teacher, fake teacher, target teacher: 1, 2, 3 stop in mid cycle, 1 with a batch carried over."""
    first = make(tmp_path, picture_folder)
    before = record(first, stop_in_update)
    with pytest.raises(Stopped) as stopped:
        first.fit()
    assert stopped.value.code == 143
    assert len(before) == stop_in_update

    name, snapshot = checkpoint.latest(tmp_path / "checkpoints")
    place = snapshot.counters["place"]
    assert place["cycle"] * 4 + [0, 1, 3][place["phase"]] + place["repeat"] == stop_in_update
    assert len(snapshot.tensors["carried"]) == (1 if stop_in_update == 1 else 0)

    second = make(tmp_path, picture_folder, tiny.unidad(seed=99))  # nothing may come from the fresh generator
    for network in second.method.networks.values():
        if network is not second.method.source_teacher:
            nn.init.zeros_(next(network.parameters()))  # nor from the fresh weights
    second.restore(snapshot)
    after = record(second)
    second.fit()
    whole, seen = whole_run
    assert before + after == seen
    assert_same_state(second, whole)
    assert checkpoint.names(tmp_path / "checkpoints")[-1] == "00000003"
    assert name < "00000003"


@pytest.mark.parametrize("stop_in_update", [1, 2, 4])
def test_resume_with_a_warmed_up_target_teacher(stop_in_update, tmp_path, picture_folder):
    """Two cycles of the target teacher alone, one update each, then a whole one of four."""
    runs = {}
    for name, stop in (("whole", None), ("parts", stop_in_update)):
        trainer = make(tmp_path / name, picture_folder, tiny.unidad(warmup=2), cycles=3)
        seen = record(trainer, stop)
        if stop:
            with pytest.raises(Stopped):
                trainer.fit()
            trainer = make(tmp_path / name, picture_folder, tiny.unidad(warmup=2, seed=99), cycles=3)
            trainer.restore(checkpoint.latest(tmp_path / name / "checkpoints")[1])
            after = record(trainer)
            trainer.fit()
            seen += after
        else:
            trainer.fit()
        runs[name] = trainer, seen
    assert [n for n, _ in runs["whole"][1]][:3] == ["target_teacher", "target_teacher", "student"]
    assert runs["parts"][1] == runs["whole"][1]
    assert runs["whole"][0].place.updates["target_teacher"] == 3
    assert_same_state(runs["parts"][0], runs["whole"][0])


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


@pytest.mark.parametrize("stop_in_update", [1, 2, 5])
def test_resume_with_an_anchor_to_the_teacher(stop_in_update, tmp_path, picture_folder):
    numbers = {"anchor_weight": 5.0, "anchor": "teacher", "anchor_pool": 8, "anchor_steps": 1}
    assert_resumes(stop_in_update, tmp_path, picture_folder, lambda **seed: tiny.unidad(**numbers, **seed), cycles=2)


def test_resume_from_a_saved_cycle(whole_run, tmp_path, picture_folder):
    first = make(tmp_path, picture_folder, save_every=1, keep=5)
    first.fit()
    assert checkpoint.names(tmp_path / "checkpoints") == ["00000001", "00000002", "00000003"]
    second = make(tmp_path, picture_folder)
    second.restore(checkpoint.load(tmp_path / "checkpoints" / "00000002"))
    second.fit()
    assert_same_state(second, whole_run[0])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["cycle"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(("accumulation", "cycles", "stop"), [(1, 7, 2), (2, 4, 3)], ids=["mid cycle", "mid accumulation"])
def test_the_next_twenty_losses_are_equal(accumulation, cycles, stop, tmp_path, picture_folder):
    """RELIABILITY case 2. In mid accumulation the update under way is finished first."""
    told = {"accumulation": accumulation, "cycles": cycles}
    whole, first = (make(tmp_path / name, picture_folder, **told) for name in ("whole", "parts"))
    seen, before = record(whole), record(first, stop)
    whole.fit()
    with pytest.raises(Stopped):
        first.fit()
    second = make(tmp_path / "parts", picture_folder, tiny.unidad(seed=99), **told)
    second.restore(checkpoint.latest(tmp_path / "parts" / "checkpoints")[1])
    after = record(second)
    second.fit()
    assert len(after) >= 20
    assert before + after == seen


def test_resume_in_mid_cycle_with_accumulation(tmp_path, picture_folder):
    runs = {}
    for name, stop in (("whole", None), ("parts", 3)):
        trainer = make(tmp_path / name, picture_folder, accumulation=2, cycles=2)
        record(trainer, stop)
        if stop:
            with pytest.raises(Stopped):
                trainer.fit()
            trainer = make(tmp_path / name, picture_folder, tiny.unidad(seed=99), accumulation=2, cycles=2)
            trainer.restore(checkpoint.latest(tmp_path / name / "checkpoints")[1])
        trainer.fit()
        runs[name] = trainer
    assert_same_state(runs["parts"], runs["whole"])


def test_carried_batches_of_an_accumulated_student_update(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, accumulation=2)
    record(trainer, 2)
    with pytest.raises(Stopped):
        trainer.fit()
    assert len(checkpoint.latest(tmp_path / "checkpoints")[1].tensors["carried"]) == 2


def test_a_finished_run_resumes_to_itself(whole_run, tmp_path, picture_folder):
    first = make(tmp_path, picture_folder)
    first.fit()
    second = make(tmp_path, picture_folder)
    second.restore(checkpoint.latest(tmp_path / "checkpoints")[1])
    second.fit()
    assert_same_state(second, whole_run[0])


@pytest.mark.parametrize("change", ["network", "optimizer", "ema", "missing", "widths"])
def test_a_checkpoint_of_something_else_is_refused(change, tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, cycles=1)
    trainer.fit()
    snapshot = trainer.snapshot()
    if change == "network":
        del snapshot.tensors["network.fake_teacher"]["unet.conv_in.bias"]
    elif change == "optimizer":
        snapshot.tensors["optimizer.heads"]["0.exp_avg"] = torch.zeros(1)
    elif change == "ema":
        del snapshot.tensors["ema"]
    elif change == "missing":
        del snapshot.tensors["network.heads"]
    else:
        snapshot.tensors["network.student"]["unet.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
    with pytest.raises(CheckpointError, match="does not fit"):
        make(tmp_path, picture_folder).restore(snapshot)


# -- updates ----------------------------------------------------------------------------------------------------------


def test_every_network_has_its_number_of_updates(whole_run):
    trainer, seen = whole_run
    assert trainer.place.updates == {"student": 3, "fake_teacher": 6, "heads": 6, "target_teacher": 3}
    assert [name for name, _ in seen[:4]] == ["student", "fake_teacher", "fake_teacher", "target_teacher"]
    assert trainer.stream.drawn == 3 * (2 + 2 + 2)  # the student's phase looks at no picture


def test_source_teacher_is_untouched(whole_run):
    trained, fresh = whole_run[0].method, tiny.unidad()
    for name in fresh.networks:
        moved = any(
            not torch.equal(a, b)
            for a, b in zip(trained.networks[name].parameters(), fresh.networks[name].parameters(), strict=True)
        )
        assert moved == (name != "source_teacher")


def test_no_gradients_are_left(whole_run):
    assert all(p.grad is None for network in whole_run[0].method.networks.values() for p in network.parameters())


def test_accumulated_micro_batches_are_one_update(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, accumulation=3, cycles=1)
    seen = record(trainer)
    trainer.fit()
    assert len(seen) == 12
    assert trainer.place.updates == {"student": 1, "fake_teacher": 2, "heads": 2, "target_teacher": 1}


class Brightness(Method):
    """Learns one number from pictures, without randomness: |w - mean picture|^2."""

    product = "number"

    def __init__(self) -> None:
        self.number = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.number.weight, 0.5)
        self.networks = {"number": self.number}
        self.phases = [Phase("number", ("number",), 1, self.loss)]

    def loss(self, pictures: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"total": ((pictures.mean(dim=(1, 2, 3)) - self.number.weight) ** 2).mean()}


def test_accumulation_equals_one_batch(tmp_path, picture_folder):
    weights = []
    for batch, n in ((8, 1), (2, 4)):
        method = Brightness()
        make(tmp_path / str(n), picture_folder, method, batch_size=batch, accumulation=n, cycles=20).fit()
        weights.append(method.number.weight.item())
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)
    assert weights[0] != 0.5


def test_first_update_of_adamw_by_hand(tmp_path, picture_folder):
    """AdamW's first step is lr (sign of the gradient) + lr wd w; warm-up over 3 updates makes the rate a third."""
    method = Brightness()
    trainer = make(tmp_path, picture_folder, method, cycles=1)
    target = trainer.stream.pixels.float().mean().item() / 127.5 - 1
    trainer.fit()
    sign = math.copysign(1, 0.5 - target)
    assert method.number.weight.item() == pytest.approx(0.5 - 1e-3 / 3 * (sign + 0.01 * 0.5), abs=1e-7)


def test_rates(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, warmup=4, lr_decay="cosine", cycles=10)
    rates = []
    for updates, cycle in ((0, 0), (1, 0), (3, 0), (100, 5), (100, 10)):
        trainer.place.updates["student"], trainer.place.cycle = updates, cycle
        rates.append(trainer._rate("student"))
    assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 5e-4, 0.0])
    assert trainer._rate("heads") == pytest.approx(0.0)
    trainer.place.updates["heads"], trainer.place.cycle = 100, 0
    assert trainer._rate("heads") == pytest.approx(5e-3)


def test_the_rate_falls_to_zero_over_the_cycles_in_which_a_network_learns(tmp_path, picture_folder):
    method = tiny.unidad(warmup=2, target_cycles=6)
    trainer = make(tmp_path, picture_folder, method, warmup=1, lr=1e-3, lr_decay="cosine", cycles=10)

    def rates(name: str) -> list[float]:
        found = []
        for cycle in (2, 4, 6, 10):
            trainer.place.cycle = cycle
            found.append(trainer._rate(name))
        return found

    assert rates("target_teacher") == pytest.approx([7.5e-4, 2.5e-4, 0.0, 0.0])
    assert rates("student") == pytest.approx([1e-3, 1e-3 * 0.5 * (1 + 0.5**0.5), 5e-4, 0.0])


def test_the_target_teacher_is_frozen_after_its_cycles(tmp_path, picture_folder):
    method = tiny.unidad(warmup=1, target_cycles=2)
    trainer = make(tmp_path, picture_folder, method, cycles=3)
    phases = [[phase.name for phase in method.cycle_phases(cycle)] for cycle in range(3)]
    assert phases == [["target_teacher"], ["student", "fake_teacher", "target_teacher"], ["student", "fake_teacher"]]
    trainer.fit()
    assert trainer.place.updates == {"student": 2, "fake_teacher": 4, "target_teacher": 2, "heads": 4}


def test_gradients_are_clipped_per_network(tmp_path, picture_folder):
    method = Brightness()
    trainer = make(tmp_path, picture_folder, method, cycles=1, clip=1e-3)
    norms = []
    original = trainer.optimizers["number"].step

    def spy() -> None:
        norms.append(method.number.weight.grad.norm().item())
        original()

    trainer.optimizers["number"].step = spy
    trainer.fit()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_average_by_hand(tmp_path, picture_folder):
    """The first cycle copies; then the decay is (1+n)/(10+n), here 2/11 and 3/12, as long as that is below `ema`."""
    method = Brightness()
    trainer = make(tmp_path, picture_folder, method, cycles=3, ema=0.9)
    values = []
    original = trainer._after_cycle
    trainer._after_cycle = lambda: (values.append(method.number.weight.item()), original())[1]
    trainer.fit()
    expected = values[0]
    for value, decay in zip(values[1:], (2 / 11, 3 / 12), strict=True):
        expected = decay * expected + (1 - decay) * value
    assert trainer.product.weight.item() == pytest.approx(expected, abs=1e-7)


def test_without_averaging_the_product_is_the_network(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, ema=0.0)
    assert trainer.product is trainer.method.student
    assert "ema" not in trainer.snapshot().tensors


def test_batch_larger_than_the_set(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, Brightness(), batch_size=23, cycles=2)
    trainer.fit()
    assert trainer.stream.drawn == 46


# -- not a number, RELIABILITY case 7 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["student", "fake_teacher", "target_teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(phase, value, tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder)
    record(trainer, poison=(phase, value))
    phases = trainer.method.cycle_phases(0)
    index = [p.name for p in phases].index(phase)
    for earlier in phases[:index]:
        trainer.update(earlier)
    before = {
        g: {k: t.clone() for k, t in ts.items()} for g, ts in trainer.snapshot().tensors.items() if g not in ("random", "carried")
    }
    updates = dict(trainer.place.updates)
    with pytest.raises(NonFiniteError, match=f"'total' of phase '{phase}'.*cycle 0"):
        trainer.update(phases[index])
    after = trainer.snapshot().tensors
    assert all(torch.equal(t, after[g][k]) for g, ts in before.items() for k, t in ts.items())
    assert trainer.place.updates == updates
    assert checkpoint.names(tmp_path / "checkpoints") == []


def test_a_gradient_that_is_not_finite(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder)
    method, phase = trainer.method, tiny.phase(trainer.method, "fake_teacher")

    def loss(pictures, labels):
        losses = phase.loss(pictures, labels)
        losses["total"] = losses["total"] + (method.heads.heads[0].weight * 0).abs().sqrt().sum()  # value 0, slope nan
        return losses

    before = {n: [p.clone() for p in method.networks[n].parameters()] for n in ("fake_teacher", "heads")}
    with pytest.raises(NonFiniteError, match="gradient of 'heads' in phase 'fake_teacher'"):
        trainer.update(dataclasses.replace(phase, loss=loss))
    for name, parameters in before.items():
        assert all(torch.equal(a, b) for a, b in zip(parameters, method.networks[name].parameters(), strict=True))
        assert all(p.grad is None for p in method.networks[name].parameters())


def test_a_bad_micro_batch_leaves_no_gradient_of_the_good_one(tmp_path, picture_folder):
    method, calls = Brightness(), []
    trainer = make(tmp_path, picture_folder, method, accumulation=2)

    def loss(pictures, labels):
        calls.append(1)
        return {"total": method.loss(pictures)["total"] * (math.nan if len(calls) == 2 else 1.0)}

    with pytest.raises(NonFiniteError):
        trainer.update(dataclasses.replace(method.phases[0], loss=loss))
    assert method.number.weight.grad is None


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


def test_skipped_updates_are_counted_and_change_nothing(tmp_path, picture_folder):
    """A cycle is student, fake teacher, fake teacher, target teacher: the 2nd and 8th updates are left out."""
    trainer = make(tmp_path, picture_folder, non_finite="skip")
    poisoned(trainer, {2, 8})
    trainer.fit()
    assert trainer.place.skipped == 2
    assert trainer.place.updates == {"student": 3, "fake_teacher": 5, "heads": 5, "target_teacher": 2}
    rows = [json.loads(line) for line in trainer.run.log.read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [1, 2, 2]
    assert all(math.isfinite(value) for row in rows for value in row["losses"].values())
    assert checkpoint.load(tmp_path / "checkpoints" / "00000003").counters["place"]["skipped"] == 2


def test_a_run_that_only_skips_stops(tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, non_finite="skip", cycles=100)
    poisoned(trainer, {3, *range(6, 1000)})
    with pytest.raises(NonFiniteError, match="in cycle 3"):
        trainer.fit()
    assert trainer.place.skipped == 1 + SKIPS_IN_A_ROW


@pytest.mark.parametrize("group", ["network.fake_teacher", "optimizer.heads", "ema"])
def test_a_checkpoint_that_is_not_finite_is_not_written(group, tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, cycles=1)
    trainer.fit()
    first = next(t for t in trainer.snapshot().tensors[group].values() if t.is_floating_point() and t.ndim)
    with torch.no_grad():
        first.view(-1)[0] = math.inf
    trainer.place.cycle = 2
    with pytest.raises(NonFiniteError, match=f"'{group}'.*last checkpoint is '.*00000001'"):
        trainer.save()
    assert checkpoint.names(tmp_path / "checkpoints") == ["00000001"]


# -- signals, RELIABILITY case 6 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_after_the_update_under_way(signum, code, tmp_path, picture_folder, request):
    if signal.getsignal(signum) == signal.SIG_IGN:  # under nohup, which the loop respects
        request.addfinalizer(lambda: signal.signal(signum, signal.SIG_IGN))
        signal.signal(signum, signal.SIG_DFL)
    trainer = make(tmp_path, picture_folder)
    handler, phase = signal.getsignal(signum), trainer.method.phases[1]

    def loss(pictures, labels):
        os.kill(os.getpid(), signum)
        return phase.loss(pictures, labels)

    trainer.method.phases[1] = dataclasses.replace(phase, loss=loss)
    with pytest.raises(Stopped, match=signal.Signals(signum).name) as stopped:
        trainer.fit()
    assert stopped.value.code == code
    assert stopped.value.place.startswith("in cycle 0 of 3")
    assert checkpoint.names(tmp_path / "checkpoints") == ["00000000-1-0000000001"]
    assert signal.getsignal(signum) == handler


def test_a_second_signal_ends_at_once():
    code = """import os, signal
from unidad.signals import passing_on
with passing_on(print):
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), signum)
        print("alive", flush=True)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.split() == ["15", "alive"]


def test_what_is_ignored_stays_ignored():
    """`nohup` ignores SIGHUP for the program it starts."""
    code = """import os, signal
from unidad.signals import passing_on
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with passing_on(print):
    os.kill(os.getpid(), signal.SIGHUP)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# -- whose folder it is, RELIABILITY cases 9 and 11 -------------------------------------------------------------------


def test_lock_refuses_a_second_holder_and_frees(tmp_path):
    with Lock(tmp_path):
        with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on {socket.gethostname()}"), Lock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # the refused one took nothing away
    with Lock(tmp_path):
        pass
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_refuses_another_process(tmp_path):
    code = "import sys; from pathlib import Path; from unidad.run import Lock\nwith Lock(Path(sys.argv[1])): pass"
    with Lock(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"in use by process {os.getpid()}" in done.stderr


def test_stale_lock_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    (tmp_path / ".lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_is_freed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Lock(tmp_path):
        raise ZeroDivisionError
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


FACTS = {"kind": "train", "settings": {"steps": 3, "a": 0.25, "cycles": 10}, "hashes": {"pictures": "abc"}}


def test_open_run(tmp_path):
    with open_run(tmp_path / "deep" / "run", FACTS, resume=False) as run:
        assert run.read() == FACTS
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"), open_run(run.path, FACTS, resume=True):
            pass
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume"), open_run(run.path, FACTS, resume=False):
        pass
    longer = FACTS | {"settings": FACTS["settings"] | {"cycles": 99}}
    with open_run(run.path, longer, resume=True) as again:  # a longer run is the same run
        assert again.read() == longer


def test_the_length_is_part_of_a_run_whose_rate_falls_towards_its_end(tmp_path):
    facts = FACTS | {"settings": FACTS["settings"] | {"lr_decay": "cosine"}}
    with open_run(tmp_path / "run", facts, resume=False):
        pass
    longer = facts | {"settings": facts["settings"] | {"cycles": 99}}
    with pytest.raises(CheckpointError, match="cycles: was 10, now 99"), open_run(tmp_path / "run", longer, resume=True):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"steps": 2, "a": 0.25, "cycles": 10}}, "steps: was 3, now 2"),
        ({"settings": {"steps": 3, "a": 0.25, "cycles": 10, "lr": 1}}, "lr: was .*, now 1"),
        ({"settings": {"a": 0.25, "cycles": 10}}, "steps: was 3, now None"),
        ({"hashes": {"pictures": "xyz"}}, "pictures: was abc, now xyz"),
        ({"kind": "pretrain"}, "holds a train run, not a pretrain run"),
    ],
)
def test_another_run_is_refused_with_the_difference(change, words, tmp_path):
    with open_run(tmp_path / "run", FACTS, resume=False):
        pass
    with pytest.raises(CheckpointError, match=words), open_run(tmp_path / "run", FACTS | change, resume=True):
        pass


def test_a_run_from_before_a_setting_existed_had_its_default(tmp_path):
    with open_run(tmp_path / "run", FACTS, resume=False):
        pass
    for value, fits in ((0.0, True), (1.0, False)):
        now = FACTS | {"settings": FACTS["settings"] | {"transfer": value}}
        with nullcontext() if fits else pytest.raises(CheckpointError, match=r"transfer: was 0\.0, now 1\.0"):
            check_folder(tmp_path / "run", now, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_folders_are_refused(resume, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not empty"), open_run(tmp_path, FACTS, resume):
        pass
    with pytest.raises(CheckpointError, match="is a file"), open_run(tmp_path / "letters.txt", FACTS, resume):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_damaged_run_json_is_refused(tmp_path):
    for text in ("{", "[]", '{"kind": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json"), open_run(tmp_path, FACTS, resume=True):
            pass


def test_the_time_left_is_told_at_the_pace_of_the_last_lines(tmp_path):
    """The cycles of a warm-up are cheap; an average over all of them would promise too much."""
    text = io.StringIO()
    log = Log(RunFolder(tmp_path), Accelerator(cpu=True), Console(file=text, force_terminal=False))
    with log.progress(0, 100):
        for cycle, seconds in ((10, 1.0), (40, 20.0), (50, 80.0)):
            log.add("phase", {"total": torch.tensor(0.5)})
            log.flush(cycle, seconds, {})
    lines = text.getvalue().splitlines()
    told = ["cycle 10 of 100", "cycle 40 of 100, about 1 min left", "cycle 50 of 100, about 5 min left"]
    assert [line.split("  ")[0] for line in lines] == told, "the first at once, for whoever wonders whether anything happens"


def test_weights_with_channels_innermost_resume_to_the_same_bits(tmp_path, picture_folder):
    """A checkpoint holds them as usual, and loading keeps the layout of the network that takes them."""

    def innermost(name: str) -> Trainer:
        method = tiny.unidad()
        for network in method.networks.values():
            network.to(memory_format=torch.channels_last)
        return make(tmp_path / name, picture_folder, method)

    whole, broken = innermost("whole"), innermost("broken")
    whole.fit()
    broken.fit(until=1)
    again = innermost("broken")
    found = checkpoint.latest(tmp_path / "broken" / "checkpoints")
    assert found is not None
    again.restore(found[1])
    again.fit()
    mine, theirs = again.snapshot().tensors, whole.snapshot().tensors
    assert all(torch.equal(t, mine[g][k]) for g, ts in theirs.items() for k, t in ts.items())
