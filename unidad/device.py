"""Which chip, number format and tracker a run uses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from torch.nn import functional

from unidad.config import LoopSettings, PretrainSettings, TrainSettings
from unidad.errors import SettingsError
from unidad.run import RunFolder

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 32 << 20  # bytes; glibc takes no higher threshold


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run under bf16 autocast: "auto" says yes where the chip computes in bf16, on a GPU or a CPU, and no elsewhere."""
    if precision == "auto" and device.type == "cpu":
        return _cpu_has_bf16()
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Under autocast a GPU normalises in float32 and hands that on, a CPU in what it is given; inside, as a GPU does."""
    plain = {name: getattr(functional, name) for name in ("group_norm", "layer_norm")}
    try:
        for name, run in plain.items():
            setattr(functional, name, lambda x, *args, run=run, **kwargs: run(x.float(), *args, **kwargs))
        yield
    finally:
        for name, run in plain.items():
            setattr(functional, name, run)


def refuse_wrong_gradients(settings: TrainSettings | PretrainSettings, device: torch.device) -> None:
    """Raise SettingsError for torch.compile with bf16 on a CPU.

    Seen with torch 2.13: gradients of everything below the first upsampler come out as exactly zero.
    """
    if settings.compile and device.type == "cpu" and use_bf16(settings.precision, device):
        raise SettingsError("'compile' with precision=bf16 gives wrong gradients on a CPU. Use compile=false, or precision=fp32.")


def _cpu_has_bf16() -> bool:
    # Where there are no such instructions bf16 is emulated, two to three times slower than float32.
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_tracker(settings: LoopSettings) -> str:
    """Name of the tracker to use, or "none".

    Raises:
        SettingsError: if one is asked for that is not installed.
    """
    available = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    if settings.tracker == "auto":
        return "tensorboard" if available["tensorboard"] else "none"
    if not available.get(settings.tracker, True):
        raise SettingsError(
            f"'tracker' is {settings.tracker}, which is not installed. Run: pip install {settings.tracker}, or set tracker=none."
        )
    return settings.tracker


def make_accelerator(settings: LoopSettings, run: RunFolder) -> Accelerator:
    """Device, processes and trackers through accelerate; "auto" is tensorboard where that is installed.

    Raises:
        SettingsError: if a tracker is asked for that is not installed.
    """
    wanted = pick_tracker(settings)
    return Accelerator(
        cpu=pick_device(settings.device).type == "cpu",
        log_with=None if wanted == "none" else wanted,
        project_dir=str(run.path),
    )


def keep_freed_memory() -> None:
    """Let this process keep what it frees, in blocks of up to 32 MB, for its next allocations; with glibc only, elsewhere nothing is done.

    Otherwise each backward pass hands its memory back to the system, and the next forward pass has it cleared anew, page by page.
    """
    if sys.platform != "linux":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, MOST)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def start_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write; only where the run folder is ours. The name is tensorboard's folder in it, or wandb's project."""
    if accelerator.log_with:
        accelerator.init_trackers("tensorboard" if "tensorboard" in accelerator.log_with else "unidad")


def pick_device(name: str) -> torch.device:
    """The device named, or for "auto" cuda, mps or cpu, whichever is there first; on a CPU memory that is freed is kept from then on.

    Raises:
        SettingsError: if the one asked for is not there.
    """
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(name):
        raise SettingsError(
            f"There is no {name} device here, or this torch was built without it. Use --device auto, or see `unidad doctor`."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)
