"""The loop: which network learns when, optimizers, averaging, saving, resuming, stopping. It knows methods only as phases."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unidad import checkpoint
from unidad.config import LoopSettings
from unidad.data import PictureStream
from unidad.device import use_bf16
from unidad.errors import CheckpointError, NonFiniteError
from unidad.log import Log
from unidad.methods.base import Method, Phase, only_training
from unidad.run import RunFolder

Sampler = Callable[[nn.Module], Tensor]


class Stopped(Exception):
    """The run was asked to stop by a signal; it is saved. `code` is the exit code a shell expects."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


@dataclass
class Place:
    """Where a run stands: `phase` and `repeat` say which update of the current cycle comes next."""

    cycle: int = 0
    phase: int = 0
    repeat: int = 0
    seconds: float = 0.0
    updates: dict[str, int] = field(default_factory=dict)


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
    ):
        self.method, self.stream, self.settings, self.run = method, stream, settings, run
        self.log, self.generator, self.sampler, self.accelerator = log, generator, sampler, accelerator
        self.place = Place(updates=dict.fromkeys(method.trained(), 0))
        self.rates = {name: (rates or {}).get(name) or settings.lr for name in method.trained()}
        self.optimizers = {name: self._optimizer(name) for name in method.trained()}
        self.ema = (
            AveragedModel(method.networks[method.product], multi_avg_fn=_ramped_average(settings.ema)) if settings.ema else None
        )
        self._stop: int | None = None
        self._saved: str | None = None
        self._autocast = torch.autocast(
            stream.pixels.device.type, torch.bfloat16, enabled=use_bf16(settings.precision, stream.pixels.device)
        )

    def _optimizer(self, name: str) -> torch.optim.AdamW:
        s = self.settings
        parameters = list(self.method.networks[name].parameters())
        return torch.optim.AdamW(
            parameters,
            lr=self.rates[name],
            betas=(s.beta1, s.beta2),
            weight_decay=s.weight_decay,
            fused=parameters[0].device.type != "mps",
        )

    @property
    def product(self) -> nn.Module:
        """The network the run is for: averaged weights where averaging is on."""
        return self.ema.module if self.ema is not None else self.method.networks[self.method.product]

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last cycle from wherever the run stands, saving as the settings say.

        Raises:
            Stopped: after SIGINT or SIGTERM, saved.
            NonFiniteError: a loss or gradient was not finite; that update was not applied.
        """
        s = self.settings
        started = time.monotonic() - self.place.seconds
        session = time.monotonic()
        with self._signals(), self.log.progress(self.place.cycle, s.cycles, s.max_minutes):
            if self.place.cycle == 0:
                self._sample()
            while self.place.cycle < s.cycles:
                self._cycle()
                self.place.seconds = time.monotonic() - started
                self._after_cycle()
                if s.max_minutes and time.monotonic() - session > 60 * s.max_minutes:
                    break
            self._stop_if_asked()
            if self.log.pending:
                self.log.flush(self.place.cycle, self.place.seconds, dict(self.place.updates))
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
        if self.ema is not None:
            self.ema.update_parameters(self.method.networks[self.method.product])

    def _restart_average(self) -> None:
        if self.ema is not None:
            self.ema.module.load_state_dict(self.method.networks[self.method.product].state_dict())
            self.ema.n_averaged.zero_()

    def _stop_if_asked(self) -> None:
        if self._stop is not None:
            self.save()
            raise Stopped(self._stop)

    def update(self, phase: Phase) -> None:
        """One update of the networks that `phase` trains, from `accumulation` micro-batches.

        Raises:
            NonFiniteError: naming the loss or network; nothing was changed.
        """
        n = self.settings.accumulation
        with only_training(self.method.networks, phase.trains), self._no_leftovers(phase):
            for _ in range(n):
                pictures, labels = self.stream.batch(self.settings.batch_size if phase.needs_data else 0)
                with self._autocast:
                    losses = phase.loss(pictures, labels)
                for name, value in losses.items():
                    if not torch.isfinite(value):
                        raise NonFiniteError(
                            f"the loss '{name}' of phase '{phase.name}' became {value.item()} in cycle {self.place.cycle}"
                        )
                (losses["total"] / n).backward()
                self.log.add(phase.name, losses)
            self._step(phase)

    def _step(self, phase: Phase) -> None:
        norms = {}
        for name in phase.trains:
            parameters = self.method.networks[name].parameters()
            norms[name] = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
            if not torch.isfinite(norms[name]):
                raise NonFiniteError(
                    f"the gradient of '{name}' in phase '{phase.name}' became {norms[name].item()} in cycle {self.place.cycle}"
                )
        for name in phase.trains:
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = self._rate(name)
            optimizer.step()
            self.place.updates[name] += 1
        self.log.add(phase.name, {f"norm_{name}": norm for name, norm in norms.items()})

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
            self.log.flush(cycle, self.place.seconds, dict(self.place.updates))
        if s.save_every and cycle % s.save_every == 0 and cycle < s.cycles:
            self.save()
        if s.sample_every and cycle % s.sample_every == 0:
            self._sample()

    def _sample(self) -> None:
        if self.sampler is not None:
            was_training = self.product.training
            self.log.picture(self.place.cycle, self.sampler(self.product.eval()))
            self.product.train(was_training)

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def snapshot(self) -> checkpoint.Snapshot:
        """Everything that decides how the run goes on."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in self.method.trained():
            tensors[f"network.{name}"] = dict(self.method.networks[name].state_dict())
            tensors[f"optimizer.{name}"] = _optimizer_tensors(self.optimizers[name])
        if self.ema is not None:
            tensors["ema"] = dict(self.ema.state_dict())
        tensors["random"] = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        tensors["carried"] = {str(i): t for i, t in enumerate(self.method.carried())}
        counters: dict[str, Any] = {"place": vars(self.place), "drawn": self.stream.drawn}
        return checkpoint.Snapshot(tensors, counters)

    def save(self) -> Path:
        """Write a checkpoint, then delete old ones; returns its path. Where this place is saved already, nothing is written."""
        name = _checkpoint_name(self.place)
        if name != self._saved:
            self.log.flush_files()
            checkpoint.save(self.run.checkpoints, name, self.snapshot())
            checkpoint.prune(self.run.checkpoints, self.settings.keep, name)
            self._saved = name
        return self.run.checkpoints / name

    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Put a snapshot back; afterwards training goes on as if it had never stopped.

        Raises:
            CheckpointError: if networks, optimizers or counters are not exactly those of this run.
        """
        try:
            for name in self.method.trained():
                self.method.networks[name].load_state_dict(snapshot.tensors[f"network.{name}"], strict=True)
                _restore_optimizer(self.optimizers[name], snapshot.tensors[f"optimizer.{name}"])
            if self.ema is not None:
                self.ema.load_state_dict(snapshot.tensors["ema"], strict=True)
            self.generator.set_state(snapshot.tensors["random"]["generator"])
            torch.set_rng_state(snapshot.tensors["random"]["torch"])  # dropout, where a network has it, draws from this one
            device = self.stream.pixels.device
            carried = snapshot.tensors["carried"]
            self.method.restore([carried[str(i)].to(device) for i in range(len(carried))])
            self.place = Place(**snapshot.counters["place"])
            self.stream.drawn = snapshot.counters["drawn"]
            if self.place.updates.keys() != self.optimizers.keys():
                raise KeyError("updates")
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"The checkpoint does not fit this run: {reason}") from error
        self._saved = _checkpoint_name(self.place)
        self.log.rewind(self.place.cycle)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop between updates; a second one ends the process at once."""

        def ask(signum: int, _frame: FrameType | None) -> None:
            if self._stop is not None:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
            self._stop = signum

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the embedding program handles signals
            before = {}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _checkpoint_name(place: Place) -> str:
    within = f"-{place.phase}-{place.repeat:010d}" if place.phase or place.repeat else ""
    return f"{place.cycle:08d}{within}"


def _ramped_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """EMA whose decay rises as (1 + n) / (10 + n) up to `decay`, so that early weights are soon forgotten."""

    @torch.no_grad()
    def average(averaged: Any, current: Any, count: Any) -> None:
        n = float(count)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1 + n) / (10 + n)))

    return average


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{i}.{key}": value for i, slot in optimizer.state_dict()["state"].items() for key, value in slot.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, slot in state.items():
        if slot["exp_avg"].shape != parameters[index].shape:
            raise ValueError(f"optimizer state {index} has shape {tuple(slot['exp_avg'].shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
