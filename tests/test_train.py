"""What an update does, and what happens to numbers that are not finite (RELIABILITY case 7)."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import tiny
import torch
from accelerate import Accelerator
from loop import make, poisoned, record
from rich.console import Console
from torch import nn

from unidad import checkpoint
from unidad.errors import NonFiniteError
from unidad.log import Log
from unidad.methods.base import Method, Phase
from unidad.run import RunFolder
from unidad.train import SKIPS_IN_A_ROW

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


def test_the_time_left_counts_what_is_still_to_come(tmp_path):
    """Cycles of a target teacher that learns alone cost a seventh of those with the student."""
    method, text = tiny.unidad(warmup=60, target_cycles=60, fake_updates=1), io.StringIO()
    assert [method.work(cycles) for cycles in (0, 60, 61, 100)] == [0, 60, 66, 300]
    log = Log(RunFolder(tmp_path), Accelerator(cpu=True), Console(file=text, force_terminal=False))
    with log.progress(0, 100, work=method.work):
        for cycle, seconds in ((10, 10.0), (40, 40.0), (70, 120.0)):
            log.add("phase", {"total": torch.tensor(0.5)})
            log.flush(cycle, seconds, {})
    told = [line.split("  ")[0] for line in text.getvalue().splitlines()]
    assert told == ["cycle 10 of 100", "cycle 40 of 100, about 4 min left", "cycle 70 of 100, about 3 min left"]


def test_no_grid_is_drawn_of_a_student_that_has_not_begun(tmp_path, picture_folder):
    trainer, drawn = make(tmp_path, picture_folder, tiny.unidad(warmup=4), cycles=7, sample_every=2), []
    trainer.sampler = lambda _: drawn.append(trainer.place.cycle) or torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    trainer.fit()
    assert drawn == [0, 6, 7]


def test_the_average_begins_with_the_student(tmp_path, picture_folder):
    """Cycles in which it does not learn yet leave no trace of the weights it begins with."""
    trainer = make(tmp_path, picture_folder, tiny.unidad(warmup=2), cycles=4, ema=0.9)
    trainer.fit(until=2)
    assert trainer.ema.n_averaged.item() == 0
    trainer.fit(until=3)
    assert trainer.ema.n_averaged.item() == 1
    now, averaged = trainer.method.networks["student"].state_dict(), trainer.product.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in now.items())


@pytest.mark.parametrize(("every", "drawn"), [(0, [3]), (2, [0, 2, 3])])
def test_when_sample_grids_are_drawn(every, drawn, tmp_path, picture_folder):
    trainer = make(tmp_path, picture_folder, sample_every=every)
    trainer.sampler = lambda _: torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    trainer.fit()
    assert sorted(int(path.stem) for path in (tmp_path / "samples").iterdir()) == drawn
