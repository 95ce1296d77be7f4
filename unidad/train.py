"""The loop: which network learns when, optimizers, averaging, saving, resuming, stopping. It knows methods only as phases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unidad import checkpoint
from unidad.config import LoopSettings
from unidad.data import PictureStream
from unidad.device import use_bf16
from unidad.distributed import Ranks
from unidad.errors import CheckpointError, NonFiniteError
from unidad.guards import DeferredGuard, not_finite
from unidad.log import Log
from unidad.methods.base import Method, Phase, only_training
from unidad.optimizers import make_optimizer, moment_bytes, optimizer_tensors, restore_optimizer
from unidad.run import RunFolder
from unidad.sharding import in_full, is_shared_out, load_whole, share_out, whole_state
from unidad.signals import STOPPING, Stopped, passing_on

Sampler = Callable[[nn.Module], Tensor]
SKIPS_IN_A_ROW = 10  # with non_finite=skip: after so many the run stops, for it will not recover


@dataclass
class Place:
    """Where a run stands: `phase` and `repeat` say which update of the current cycle comes next, `skipped` how many were not finite."""

    cycle: int = 0
    phase: int = 0
    repeat: int = 0
    seconds: float = 0.0
    updates: dict[str, int] = field(default_factory=dict)
    skipped: int = 0


class Trainer:
    """Runs a method's phases for `settings.cycles` cycles.

    Args:
        method: networks already on the device; trained in place.
        stream: real pictures.
        settings: rates, lengths, intervals.
        run: where checkpoints, samples and the log go.
        log: shows and stores losses.
        generator: the method's source of randomness; saved and restored with the run.
        sampler: averaged product -> pictures [N, 3, H, W] uint8 for the sample grids, or None.
        rates: learning rate of each trained network where it differs from `settings.lr`.
        shard: share the networks out over the processes (`unidad.sharding`).
    """

    def __init__(
        self,
        method: Method,
        stream: PictureStream,
        settings: LoopSettings,
        run: RunFolder,
        log: Log,
        generator: torch.Generator,
        accelerator: Accelerator,
        sampler: Sampler | None = None,
        rates: dict[str, float] | None = None,
        shard: bool = False,
    ):
        self.method, self.stream, self.settings, self.run = method, stream, settings, run
        self.log, self.generator, self.sampler, self.accelerator = log, generator, sampler, accelerator
        self.place = Place(updates=dict.fromkeys(method.trained(), 0))
        self.rates = {name: (rates or {}).get(name) or settings.lr for name in method.trained()}
        self.ema = AveragedModel(method.networks[method.product], multi_avg_fn=self._ramped_average) if settings.ema else None
        self.ranks, self.shard = Ranks(accelerator), shard
        if shard:  # before the optimizers, whose moments lie as the weights do
            share_out([*method.networks.values(), *([self.ema.module] if self.ema is not None else [])], accelerator.device)
        self.optimizers = {n: make_optimizer(method.networks[n].parameters(), settings, rate) for n, rate in self.rates.items()}
        # Several processes hear of each other's losses in every update anyway, and 8-bit AdamW knows no flag.
        waits = accelerator.device.type == "cuda" and self.ranks.count == 1 and settings.optimizer == "adamw"
        self.guard = DeferredGuard(accelerator.device, [p.name for p in method.phases]) if waits else None
        self._asked: int | None = None  # by a signal to this process
        self._stop: int | None = None  # the same, once all processes know
        self._skips_in_a_row = 0
        self._saved: str | None = None
        self._saving: dict[str, float] = {}
        device = stream.pixels.device
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(settings.precision, device))

    @property
    def product(self) -> nn.Module:
        """The network the run is for: averaged weights where averaging is on."""
        return self.ema.module if self.ema is not None else self.method.networks[self.method.product]

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self, until: int | None = None) -> None:
        """Train to the last cycle from wherever the run stands, saving as the settings say.

        Args:
            until: stop, saved, after this cycle although the settings name a later one; None goes to the last.

        Raises:
            Stopped: after SIGINT, SIGTERM or SIGHUP, saved.
            NonFiniteError: a loss or gradient was not finite; that update was not applied.
            CheckpointError: the disk has no room for the checkpoints, or refuses one.
        """
        s = self.settings
        last = s.cycles if until is None else min(until, s.cycles)
        self._refuse_full_disk()
        started = time.monotonic() - self.place.seconds
        session = time.monotonic()
        limit = s.max_minutes and s.max_minutes + self.place.seconds / 60
        with passing_on(self._ask), self.log.progress(self.place.cycle, s.cycles, limit, self.method.work):
            if s.sample_every and self.place.cycle == 0:
                self._sample()
            while self.place.cycle < last:
                self._cycle()
                self.place.seconds = time.monotonic() - started
                self._after_cycle()
                if s.max_minutes and any(self.ranks.total([time.monotonic() - session > 60 * s.max_minutes])):
                    self.log.say(f"Stopped by max_minutes={s.max_minutes:g} in cycle {self.place.cycle} of {s.cycles}.")
                    break
            self._stop_if_asked()
            if self.log.pending:
                self.write_log()
            self.save()
            if not s.sample_every or self.place.cycle % s.sample_every:
                self._sample()

    def _cycle(self) -> None:
        if (self.place.phase, self.place.repeat) == (0, 0) and self.method.product in self.method.start_cycle(self.place.cycle):
            self._restart_average()
        phases = self.method.cycle_phases(self.place.cycle)
        while self.place.phase < len(phases):
            phase = phases[self.place.phase]
            while self.place.repeat < phase.repeats:
                self._stop_if_asked()
                self.update(phase)
                self.place.repeat += 1
            self.place.phase, self.place.repeat = self.place.phase + 1, 0
        self.place.cycle, self.place.phase = self.place.cycle + 1, 0
        if self.ema is not None and any(self.method.product in phase.trains for phase in phases):
            self.ema.update_parameters(self.method.networks[self.method.product])

    @torch.no_grad()
    def _ramped_average(self, averaged: Any, current: Any, _count: Any) -> None:
        """EMA whose decay rises as (1 + n) / (10 + n) up to `ema`, so that early weights are soon forgotten."""
        assert self.ema is not None
        n = float(self.ema.n_averaged)  # which lies on the host; the count that is handed in has been moved to the device
        torch._foreach_lerp_(averaged, current, 1.0 - min(self.settings.ema, (1 + n) / (10 + n)))

    def _restart_average(self) -> None:
        if self.ema is not None:
            self.ema.module.load_state_dict(self.method.networks[self.method.product].state_dict())
            self.ema.n_averaged.zero_()

    def _ask(self, signum: int) -> None:
        self._asked = signum
        if self.ranks.count == 1:
            self._stop = signum

    def _stop_if_asked(self) -> None:
        if self._stop is not None:
            self.save()
            minutes = self.place.seconds / 60
            raise Stopped(
                self._stop, f"in cycle {self.place.cycle} of {self.settings.cycles}, after {minutes:.1f} minutes of training"
            )

    def update(self, phase: Phase) -> None:
        """One update of the networks that `phase` trains, from `accumulation` micro-batches.

        Raises:
            NonFiniteError: naming the loss or network; nothing was changed. With non_finite=skip only after many in a row.
        """
        try:
            with only_training(self.method.networks, phase.trains), self._no_leftovers(phase):
                self._agree(phase, self._accumulate(phase))
                trained = [self.method.networks[name] for name in phase.trains]
                self.ranks.average_gradients(network for network in trained if not is_shared_out(network))
                self._step(phase)
        except NonFiniteError:
            self.place.skipped += 1
            self._skips_in_a_row += 1
            if self.settings.non_finite == "stop" or self._skips_in_a_row == SKIPS_IN_A_ROW:
                raise
        else:
            self._skips_in_a_row = 0

    def _accumulate(self, phase: Phase) -> NonFiniteError | None:
        """Gradients of this process's rows; what is wrong with them is returned, not raised, for the others wait to hear of it."""
        n = self.settings.accumulation
        for _ in range(n):
            wanted = self.ranks.count * self.settings.batch_size if phase.needs_data else 0
            pictures, labels, masks = (self.ranks.rows(x) if x is not None else None for x in self.stream.batch(wanted))
            assert pictures is not None
            with self._autocast, self.ranks.draws(self.generator):
                losses = phase.loss(pictures, labels) if masks is None else phase.loss(pictures, labels, masks)
            shown = losses if self.guard is None else self.guard.see(losses)
            bad = not_finite(losses) if self.guard is None else None
            error = self._non_finite(f"the loss '{bad}' of phase '{phase.name}' became {losses[bad].item()}") if bad else None
            if self.shard:  # they go backward together, or not at all
                self._agree(phase, error)
            elif error is not None:
                return error
            (losses["total"] / n).backward()
            self.log.add(phase.name, shown)
        return None

    def _agree(self, phase: Phase, error: NonFiniteError | None) -> None:
        """All processes leave an update out, or stop after it, if one must."""
        if self.ranks.count > 1:
            bad, *asked = self.ranks.total([error is not None, *(self._asked == s for s in STOPPING)])
            self._stop = next((s for s, n in zip(STOPPING, asked, strict=True) if n), None)
            if bad and error is None:
                raise self._non_finite(f"a loss of phase '{phase.name}' in another process became nan or infinite")
        if error is not None:
            raise error

    def _non_finite(self, what: str) -> NonFiniteError:
        there = checkpoint.names(self.run.checkpoints)
        last = f"the last checkpoint is '{self.run.checkpoints / there[-1]}'" if there else "there is no checkpoint yet"
        where = f" (process {self.ranks.rank} of {self.ranks.count})" if self.ranks.count > 1 else ""
        return NonFiniteError(f"{what} in cycle {self.place.cycle}{where}; {last}")

    def _step(self, phase: Phase) -> None:
        norms = {}
        for name in phase.trains:
            parameters = self.method.networks[name].parameters()
            norms[name] = in_full(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip))
            if self.guard is None and not torch.isfinite(norms[name]):
                raise self._non_finite(f"the gradient of '{name}' in phase '{phase.name}' became {norms[name].item()}")
        shown = norms if self.guard is None else self.guard.see(norms)
        for name in phase.trains:
            optimizer = self.optimizers[name]
            if self.guard is not None:
                optimizer.found_inf = self.guard.flag  # type: ignore[attr-defined]  # what fused AdamW looks for
            for group in optimizer.param_groups:
                group["lr"] = self._rate(name)
            optimizer.step()
            self.place.updates[name] += 1
        if self.guard is not None:
            self.guard.close(phase.name)
        self.log.add(phase.name, {f"norm_{name}": norm for name, norm in shown.items()})

    def _read_guard(self) -> None:
        """What a deferred guard has left out.

        Raises:
            NonFiniteError: if anything, or with non_finite=skip too much in a row.
        """
        if self.guard is None:
            return
        found, longest = self.guard.read()
        self.place.skipped += sum(found.values())
        if found and (self.settings.non_finite == "stop" or longest >= SKIPS_IN_A_ROW):
            where = " and ".join(f"'{name}' ({n} updates)" for name, n in found.items())
            raise self._non_finite(f"losses or gradients of phase {where} became nan or infinite since the last log line, seen")

    @contextmanager
    def _no_leftovers(self, phase: Phase) -> Iterator[None]:
        """However the block ends, no gradient is left behind."""
        try:
            yield
        finally:
            for name in phase.trains:
                self.optimizers[name].zero_grad(set_to_none=True)

    def _rate(self, name: str) -> float:
        s = self.settings
        rate = self.rates[name] * min(1.0, (self.place.updates[name] + 1) / max(1, s.warmup))
        if s.lr_decay == "cosine":
            first, end = self._span(name)
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, (self.place.cycle - first) / (end - first))))
        return rate

    def _span(self, name: str) -> tuple[int, int]:
        """The first cycle in which a network learns, and the one after the last."""
        phases = [p for p in self.method.phases if name in p.trains]
        ends = [self.settings.cycles if p.ends is None else min(p.ends, self.settings.cycles) for p in phases]
        return min(p.begins for p in phases), max(ends)

    def _after_cycle(self) -> None:
        s, cycle = self.settings, self.place.cycle
        if cycle % s.log_every == 0:
            self.write_log()
        if s.save_every and cycle % s.save_every == 0 and cycle < s.cycles:
            self.save()
        if s.sample_every and cycle % s.sample_every == 0 and cycle > self._span(self.method.product)[0]:
            self._sample()

    def write_log(self) -> None:
        """One line of means since the last one; with a deferred guard the only place in a cycle that reads numbers back."""
        self._read_guard()
        skipped = {"skipped": self.place.skipped} if self.place.skipped else {}
        self.log.flush(self.place.cycle, self.place.seconds, dict(self.place.updates), **skipped, **self._saving)
        self._saving = {}

    def _sample(self) -> None:
        if self.sampler is not None and (self.ranks.first or self.shard):
            was_training = self.product.training
            pixels = self.sampler(self.product.eval())
            self.product.train(was_training)
            if self.ranks.first:
                self.log.picture(self.place.cycle, pixels)

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def snapshot(self) -> checkpoint.Snapshot:
        """Everything that decides how the run goes on; of networks that are shared out only in the process that writes."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in self.method.trained():
            tensors[f"network.{name}"] = whole_state(self.method.networks[name].state_dict(), self.ranks.first)
            tensors[f"optimizer.{name}"] = whole_state(optimizer_tensors(self.optimizers[name]), self.ranks.first)
        if self.ema is not None:
            tensors["ema"] = whole_state(self.ema.state_dict(), self.ranks.first)
        tensors["random"] = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        rows = self.method.carried_rows()
        carried = [self.ranks.whole(t) if i < rows else t for i, t in enumerate(self.method.carried())]
        tensors["carried"] = {str(i): t for i, t in enumerate(carried)}
        counters: dict[str, Any] = {"place": vars(self.place), "drawn": self.stream.drawn, "carried_rows": rows}
        return checkpoint.Snapshot(tensors, counters)

    def save(self) -> Path:
        """Write a checkpoint, then delete old ones; returns its path. Where this place is saved already, nothing is written."""
        name = _checkpoint_name(self.place)
        if name != self._saved:
            began = time.monotonic()
            self._read_guard()
            snapshot = self.snapshot()
            self._refuse_non_finite(snapshot)
            if self.ranks.first:
                self.log.flush_files()
                checkpoint.save(self.run.checkpoints, name, snapshot)
                checkpoint.prune(self.run.checkpoints, self.settings.keep, name)
            self.ranks.wait()
            self._saved = name
            self._saving = {"save_seconds": round(time.monotonic() - began, 3), "save_bytes": snapshot.size}
        return self.run.checkpoints / name

    def _refuse_non_finite(self, snapshot: checkpoint.Snapshot) -> None:
        finite = {g: all(bool(torch.isfinite(t).all()) for t in ts.values()) for g, ts in snapshot.tensors.items()}
        bad = next((group for group, fine in finite.items() if not fine), None)
        if any(self.ranks.total([bad is not None])):
            raise self._non_finite(f"a number in '{bad or 'the checkpoint'}' became infinite or nan")

    def _refuse_full_disk(self) -> None:
        """Before hours of training: is there room for the checkpoints to keep and the one being written?"""
        trained = [self.method.networks[name] for name in self.method.trained()]
        numbers = sum(_bytes(network) + moment_bytes(network.parameters(), self.settings) for network in trained)
        one = numbers + (_bytes(self.ema) if self.ema is not None else 0)
        more = max(1, self.settings.keep + 1 - len(checkpoint.names(self.run.checkpoints)))
        checkpoint.refuse_full_disk(self.run.checkpoints, one * more, f"The run's checkpoints (keep={self.settings.keep})")

    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Put a snapshot back; afterwards training goes on as if it had never stopped.

        Raises:
            CheckpointError: if networks, optimizers or counters are not exactly those of this run.
        """
        try:
            for name in self.method.trained():
                load_whole(self.method.networks[name], snapshot.tensors[f"network.{name}"])
                restore_optimizer(self.optimizers[name], snapshot.tensors[f"optimizer.{name}"])
            if self.ema is not None:
                load_whole(self.ema, snapshot.tensors["ema"])
            self.generator.set_state(snapshot.tensors["random"]["generator"])
            torch.set_rng_state(snapshot.tensors["random"]["torch"])  # for dropout, where a network has it, on a CPU
            device = self.stream.pixels.device
            carried = snapshot.tensors["carried"]
            rows = snapshot.counters.get("carried_rows", 0)
            tensors = [carried[str(i)].to(device) for i in range(len(carried))]
            self.method.restore([self.ranks.rows(t) if i < rows else t for i, t in enumerate(tensors)])
            self.place = Place(**snapshot.counters["place"])
            self.stream.drawn = snapshot.counters["drawn"]
            if self.place.updates.keys() != self.optimizers.keys():
                raise KeyError("updates")
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"The checkpoint does not fit this run: {reason}") from error
        self._saved = _checkpoint_name(self.place)
        self.log.rewind(self.place.cycle)


def _checkpoint_name(place: Place) -> str:
    within = f"-{place.phase}-{place.repeat:010d}" if place.phase or place.repeat else ""
    return f"{place.cycle:08d}{within}"


def _bytes(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())
