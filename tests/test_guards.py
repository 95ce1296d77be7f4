"""Guards that wait for the next log line instead of looking at every loss."""

import math

import pytest
import torch
from loop import make, poisoned
from torch.utils._python_dispatch import TorchDispatchMode

from unidad import checkpoint
from unidad.errors import NonFiniteError
from unidad.guards import DeferredGuard
from unidad.train import SKIPS_IN_A_ROW, Trainer


def deferred(trainer: Trainer) -> Trainer:
    trainer.guard = DeferredGuard(torch.device("cpu"), [p.name for p in trainer.method.phases])
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"{g}.{k}": t.clone() for g, ts in trainer.snapshot().tensors.items() if g[:3] in ("net", "opt") for k, t in ts.items()}


class Looks(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which the host waits where the tensor is on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_cycle_reads_no_number_back(tmp_path, picture_folder):
    trainer, plain = deferred(make(tmp_path / "a", picture_folder)), make(tmp_path / "b", picture_folder)
    counts = []
    for one in (trainer, plain):
        with Looks() as looks:
            for phase in one.method.cycle_phases(0):
                one.update(phase)
        counts.append(looks.count)
    assert counts[0] == 0
    assert counts[1] > 0


def test_the_same_bits_as_looking_at_every_loss(tmp_path, picture_folder):
    trainer, plain = deferred(make(tmp_path / "a", picture_folder)), make(tmp_path / "b", picture_folder)
    trainer.fit()
    plain.fit()
    other = weights(plain)
    assert all(torch.equal(t, other[k]) for k, t in weights(trainer).items())


def test_a_bad_update_is_left_out_on_the_device_and_told_at_the_log_line(tmp_path, picture_folder):
    trainer = deferred(make(tmp_path, picture_folder, log_every=3))
    poisoned(trainer, {2})
    first, second, *_ = trainer.method.cycle_phases(0)
    trainer.update(first)
    before = weights(trainer)
    trainer.update(second)
    after = weights(trainer)
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    assert all(after[k] == 0 for k in after.keys() - before.keys() if k.endswith(".step"))
    with pytest.raises(NonFiniteError, match=r"phase 'fake_teacher' \(1 updates\)"):
        trainer.fit()
    assert checkpoint.names(tmp_path / "checkpoints") == []


def test_skipping_counts_and_gives_up_after_a_row(tmp_path, picture_folder):
    trainer = deferred(make(tmp_path / "a", picture_folder, non_finite="skip"))
    poisoned(trainer, {2, 8})
    trainer.fit()
    assert trainer.place.skipped == 2
    assert all(torch.isfinite(t).all() for t in weights(trainer).values())
    trainer = deferred(make(tmp_path / "b", picture_folder, non_finite="skip", cycles=100))
    poisoned(trainer, {3, *range(6, 1000)})
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert SKIPS_IN_A_ROW <= trainer.place.skipped - 1 < SKIPS_IN_A_ROW + 4  # it is only looked at after each cycle of 4 updates
    assert math.isfinite(trainer.place.seconds)
