"""AdamW as the loop uses it, with moments in float32 or in 8 bits; its state as a checkpoint holds it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unidad.config import LoopSettings, PretrainSettings, TrainSettings
from unidad.device import pick_device, refuse_wrong_gradients
from unidad.errors import SettingsError
from unidad.offload import HostMoments, refuse_useless_offload
from unidad.sharding import share_like

# bitsandbytes' own: parameters with fewer numbers keep float32 moments; the others have a float32 scale for each block of a moment.
LEAST, BLOCK = 4096, 256
FIRST = {"adamw": "exp_avg", "adamw8bit": "state1"}  # the first moment's name in either's state


def refuse_missing_optimizer(settings: LoopSettings, device: torch.device) -> None:
    """Do nothing where the optimizer can be made.

    Raises:
        SettingsError: for 8 bits without bitsandbytes, or on a device it is not for.
    """
    if settings.optimizer != "adamw8bit":
        return
    if device.type not in ("cuda", "cpu"):
        raise SettingsError(f"'optimizer' adamw8bit needs an NVIDIA GPU or a CPU, not {device.type}. Set optimizer=adamw.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError("'optimizer' adamw8bit needs bitsandbytes. Run: pip install 'unidad[8bit]', or set optimizer=adamw.")


def checked_device(settings: TrainSettings | PretrainSettings) -> torch.device:
    """The device of a run.

    Raises:
        SettingsError: there is no such device, or what the settings ask for cannot be computed on it.
    """
    device = pick_device(settings.device)
    refuse_wrong_gradients(settings, device)
    refuse_missing_optimizer(settings, device)
    refuse_useless_offload(settings, device)
    return device


def make_optimizer(parameters: Iterable[nn.Parameter], settings: LoopSettings, rate: float) -> torch.optim.Optimizer:
    """Fused AdamW where the device has it, its moments offloaded where the settings say so; or AdamW with 8-bit moments in blocks of 256
    (arXiv 2110.02861).

    Raises:
        SettingsError: as `refuse_missing_optimizer`.
    """
    held = list(parameters)
    common: dict[str, Any] = {
        "lr": rate,
        "betas": (settings.beta1, settings.beta2),
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw8bit":
        refuse_missing_optimizer(settings, held[0].device)
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(held, **common, min_8bit_size=LEAST)
        return optimizer
    plain = torch.optim.AdamW(held, **common, fused=held[0].device.type != "mps")
    if settings.offload_optimizer:
        HostMoments(plain, held[0].device)
    return plain


def moment_bytes(parameters: Iterable[nn.Parameter], settings: LoopSettings) -> int:
    """Bytes of both moments of these parameters."""
    if settings.optimizer == "adamw":
        return sum(2 * p.numel() * p.element_size() for p in parameters)
    return sum(2 * (4 * n if n < LEAST else n + 4 * -(-n // BLOCK)) for n in (p.numel() for p in parameters))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state by parameter number and name, such as "3.exp_avg"; whole numbers as tensors, and what parameters share once for each."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {i: optimizer.state[p] for i, p in enumerate(parameters) if p in optimizer.state}
    return {
        f"{i}.{key}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
        for i, slot in slots.items()
        for key, value in slot.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError, IndexError, KeyError: if it is of other parameters, or of the other optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    plain = isinstance(optimizer, torch.optim.AdamW)
    first = FIRST["adamw" if plain else "adamw8bit"]
    for index, slot in state.items():
        if slot[first].shape != parameters[index].shape:
            raise ValueError(f"optimizer state {index} has shape {tuple(slot[first].shape)}")
        if not plain:
            slot["step"] = int(slot["step"])
            continue
        for key, value in slot.items():  # fused AdamW goes through memory: moments must lie there as the weights do
            moments = torch.empty_like(parameters[index], dtype=value.dtype)
            slot[key] = moments.copy_(share_like(value, moments)) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
