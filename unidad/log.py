"""What a run says while it goes: a progress bar with losses, log.jsonl, sample grids, and trackers through accelerate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from unidad.data import picture_grid
from unidad.distributed import Ranks
from unidad.run import RunFolder, replacing

SHOWN = ("dmd", "gan", "fake", "disc", "target", "total")


class Log:
    """Collects loss terms on the device and reads them out only when flushed.

    Args:
        run: where log.jsonl and samples/ are.
        accelerator: its trackers get every flushed row.
        console: where the bar is drawn; None is silent.
    """

    def __init__(self, run: RunFolder, accelerator: Accelerator, console: Console | None = None):
        self.run, self.accelerator, self.console = run, accelerator, console
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed: tuple[float, int] | None = None  # seconds and cycle of the last line
        self._total = 0
        self._limit = 0.0
        self._work: Callable[[int], float] = float

    def add(self, phase: str, losses: dict[str, Tensor]) -> None:
        """Remember terms of one micro-batch; no synchronisation."""
        for name, value in losses.items():
            key = f"{phase}/{name}"
            total, count = self._sums.get(key, (torch.zeros((), device=value.device), 0))
            self._sums[key] = (total + value.detach(), count + 1)

    @property
    def pending(self) -> bool:
        """Whether terms were added since the last flush."""
        return bool(self._sums)

    def flush(self, cycle: int, seconds: float, updates: dict[str, int], **more: object) -> None:
        """Write the means since the last flush: one row in log.jsonl (with `more` in it), the trackers and the bar."""
        means = {key: float(total) / count for key, (total, count) in self._sums.items()}
        self._sums.clear()
        ranks = Ranks(self.accelerator)
        if ranks.count > 1:
            means = {key: total / ranks.count for key, total in zip(means, ranks.total(list(means.values())), strict=True)}
        if not self.accelerator.is_main_process:
            return
        row = {"cycle": cycle, "seconds": round(seconds, 3), "updates": updates, "losses": means, **more}
        with self.run.log.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(means | {"seconds": seconds}, step=cycle)
        self._show(cycle, means, seconds)

    def _show(self, cycle: int, means: dict[str, float], seconds: float) -> None:
        short = {key.split("/")[1]: value for key, value in means.items()}
        text = "  ".join(f"{name} {short[name]:.3g}" for name in SHOWN if name in short and (name != "total" or len(short) < 4))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._work(cycle), cycle=cycle, losses=text)
        if self.console is None or self.console.is_terminal:
            return
        if self._printed is None:
            self._printed = seconds, cycle
            self.console.print(f"cycle {cycle} of {self._total}  {text}", highlight=False)
        before, since = self._printed
        if seconds - before >= 15:
            self._printed = seconds, cycle
            done, ahead = self._work(cycle) - self._work(since), self._work(self._total) - self._work(cycle)
            left = (seconds - before) / max(1.0, done) * ahead / 60  # at the pace of the last lines
            left = min(left, max(0.0, self._limit - seconds / 60)) if self._limit else left
            self.console.print(f"cycle {cycle} of {self._total}, about {left:.0f} min left  {text}", highlight=False)

    def say(self, sentence: str) -> None:
        """A line above the bar, or by itself."""
        if self.console is not None:
            self.console.print(sentence, highlight=False)

    def picture(self, cycle: int, pixels: Tensor) -> None:
        """Store a sample grid as samples/<cycle>.png."""
        self.run.samples.mkdir(exist_ok=True)
        with replacing(self.run.samples / f"{cycle:08d}.png") as part:
            picture_grid(pixels).save(part, format="PNG")

    def flush_files(self) -> None:
        """Force log.jsonl to the disk, as a checkpoint will count on it."""
        if self.run.log.exists():
            with self.run.log.open("a") as handle:
                os.fsync(handle.fileno())

    def rewind(self, cycle: int) -> None:
        """After resuming at `cycle`: forget rows written past it, which will be written again."""
        if not self.run.log.exists() or not self.accelerator.is_main_process:
            return
        kept = []
        for line in self.run.log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["cycle"] <= cycle:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                break  # a row cut short by the crash, and all after it
        with replacing(self.run.log) as part:
            part.write_text("".join(kept))

    @contextmanager
    def progress(self, done: int, total: int, minutes: float = 0.0, work: Callable[[int], float] = float) -> Iterator[None]:
        """Draw the bar while the block runs, where there is a terminal; `work` says how much is done after so many cycles."""
        self._total, self._limit, self._work = total, minutes, work
        self._printed = None
        if self.console is None or not self.console.is_terminal:
            yield
            return
        columns = (
            BarColumn(),
            TextColumn("{task.fields[cycle]}/{task.fields[cycles]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=60) as progress:
            self._progress = progress
            self._task = progress.add_task("", total=work(total), completed=int(work(done)), cycle=done, cycles=total, losses="")
            try:
                yield
            finally:
                self._progress = self._task = None
