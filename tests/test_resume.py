"""Stopped runs go on to the same bits: RELIABILITY cases 1 and 2."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from loop import assert_resumes, assert_same_state, make, record
from torch import nn

from unidad import checkpoint
from unidad.errors import CheckpointError
from unidad.signals import Stopped
from unidad.train import Trainer


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
