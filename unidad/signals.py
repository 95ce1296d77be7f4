"""SIGINT, SIGTERM and SIGHUP as requests: the first one is passed on, a second one ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
)


class Stopped(Exception):
    """A command was asked to stop by a signal; what it made so far is saved.

    Attributes:
        code: the exit code a shell expects.
        place: where it stands, in words.
    """

    def __init__(self, signum: int, place: str):
        super().__init__(signal.Signals(signum).name)
        self.code, self.place = 128 + signum, place


@contextmanager
def passing_on(ask: Callable[[int], None]) -> Iterator[None]:
    """Inside, the first of `STOPPING` is given to `ask`; a second one ends the process at once."""
    asked = False

    def handle(signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        asked = True
        ask(signum)

    # What is ignored already stays so: `nohup` ignores SIGHUP.
    wanted = [s for s in STOPPING if s != getattr(signal, "SIGHUP", None) or signal.getsignal(s) != signal.SIG_IGN]
    try:
        before = {s: signal.signal(s, handle) for s in wanted}
    except ValueError:  # not in the main thread: the embedding program handles signals
        before = {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
