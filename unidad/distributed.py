"""Several processes as one: each computes its rows of the batch, all take the same averaged step, so that N processes with b pictures
each are one process with N * b.

DistributedDataParallel is not used: it wraps a module's own forward, while the methods here call parts of networks (an encoder's
features, a rollout of K steps) and train several networks in turn. Averaging the gradients once, after the last micro-batch, is the same
sum, serves every network and the heads alike, and waits in one place.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unidad.errors import LostProcessError

_shared: ContextVar[bool] = ContextVar("shared", default=False)
_sum: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("sum", default=None)


@contextmanager
def shared_draws() -> Iterator[None]:
    """Inside, every process draws the same random numbers: what is drawn belongs to all of them, not to rows of a batch."""
    token = _shared.set(True)
    try:
        yield
    finally:
        _shared.reset(token)


def sum_over_processes(x: Tensor) -> Tensor:
    """Within a loss: x summed over all processes of the run, which must all ask.

    Raises:
        LostProcessError: if another process has ended.
    """
    together = _sum.get()
    return x if together is None else together(x)


class _Rows(TorchFunctionMode):
    """Random numbers drawn for a batch are drawn for the whole batch of all processes, and this one's rows are returned.

    The generators of all processes thus stay in the same state, which is that of one process with the whole batch. Scalars are shared.
    """

    def __init__(self, generator: torch.Generator, rank: int, count: int):
        super().__init__()
        self.generator, self.rank, self.count = generator, rank, count

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        options = kwargs or {}
        drawn = func in (torch.randn, torch.rand, torch.randint) and options.get("generator") is self.generator
        if not drawn or _shared.get() or not args[-1]:
            return func(*args, **options)
        *front, (n, *rest) = args
        return func(*front, (n * self.count, *rest), **options)[self.rank * n : (self.rank + 1) * n]


class Ranks:
    """The process among those of the run.

    Attributes:
        rank: 0 in the process that writes the files.
        count: how many there are; with 1 nothing here does anything.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self._ended = False

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def rows(self, x: Tensor) -> Tensor:
        """The share of this process in a whole batch, [count * n, ...] -> [n, ...]."""
        n = len(x) // self.count
        return x[self.rank * n : (self.rank + 1) * n]

    @contextmanager
    def draws(self, generator: torch.Generator) -> Iterator[None]:
        """Inside, what is drawn from `generator` is this process's rows of the whole batch's numbers, and `sum_over_processes` sums."""
        if self.count == 1:
            yield
            return
        token = _sum.set(lambda x: self._together(x, "sum"))
        try:
            with _Rows(generator, self.rank, self.count):
                yield
        finally:
            _sum.reset(token)

    def total(self, numbers: list[float]) -> list[float]:
        """Sums over all processes.

        Raises:
            LostProcessError: if another process has ended.
        """
        if self.count == 1:
            return numbers
        return self._together(torch.tensor(numbers, dtype=torch.float64), "sum").tolist()

    def average_gradients(self, networks: Iterable[nn.Module]) -> None:
        """Replace each gradient by its mean over all processes.

        Raises:
            LostProcessError: if another process has ended.
        """
        if self.count == 1:
            return
        for network in networks:
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            whole = self._together(torch.cat([g.reshape(-1) for g in gradients]), "mean")
            for gradient, mean in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def whole(self, x: Tensor) -> Tensor:
        """The rows of all processes, in order: the opposite of `rows`."""
        if self.count == 1:
            return x
        with naming_the_lost():
            return self._accelerator.gather(x.contiguous())

    def filled(self, x: Tensor) -> Tensor:
        """Of x, [N, ...] on the CPU, each process has filled in other rows and left the rest 0: with all rows, in every process.

        Raises:
            LostProcessError: if another process has ended.
        """
        return x if self.count == 1 else self._together(x, "sum").cpu()

    def end(self, connection: bool = True) -> None:
        """Close the trackers, and the processes' connection: from here on each is alone."""
        if self._ended:
            return
        self._ended = True
        if connection:
            self._accelerator.end_training()
        else:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def wait(self) -> None:
        """Until every process is here.

        Raises:
            LostProcessError: if another process has ended.
        """
        if self.count > 1:
            self.total([0.0])

    def _together(self, x: Tensor, how: str) -> Tensor:
        with naming_the_lost():
            device = self._accelerator.device
            return self._accelerator.reduce(x.to(device) if device.type != "mps" else x, reduction=how)


@contextmanager
def connected(accelerator: Accelerator) -> Iterator[Ranks]:
    """The processes of a run; their connection ends with the block at the latest.

    Where an error ends the block it ends with Python instead, so that this process has said what is wrong before the others notice that it
    is gone. It must not outlive Python: a process ends with SIGABRT now and then if a thread of the connection waits for Python, to let go
    of a tensor, as Python is taken down.
    """
    ranks = Ranks(accelerator)
    if ranks.count > 1:
        atexit.register(_disconnect)
    try:
        yield ranks
    except BaseException:
        ranks.end(connection=False)
        raise
    ranks.end()


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # networks that are shared out hold the connection, in cycles


def first_to_speak() -> bool:
    """Whether no other process of this run has told the user yet why it ends; asked of the store where the processes met.

    `torchrun` and `accelerate launch` keep that store. Without them the first process keeps it: before it does, and once it has ended,
    each process speaks for itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not torch.distributed.is_initialized():
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"unidad/told/{attempt}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


@contextmanager
def naming_the_lost(only: str = "") -> Iterator[None]:
    """Inside, a connection that ends or times out raises LostProcessError.

    Args:
        only: where other errors can come up too: what the message must hold, in any case, if the error is none of torch.distributed's own.
    """
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises when a connection ends or times out
        if only not in str(error).lower() and not isinstance(error, torch.distributed.DistError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise LostProcessError(f"Another process of this run has ended ({reason}).") from error
