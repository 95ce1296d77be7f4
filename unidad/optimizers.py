"""AdamW as the loop uses it, and its state as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from unidad.config import LoopSettings
from unidad.sharding import share_like


def make_optimizer(parameters: Iterable[nn.Parameter], settings: LoopSettings, rate: float) -> torch.optim.AdamW:
    """Fused AdamW where the device has it."""
    held = list(parameters)
    return torch.optim.AdamW(
        held,
        lr=rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=held[0].device.type != "mps",
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state by parameter number and name, such as "3.exp_avg"."""
    return {f"{i}.{key}": value for i, slot in optimizer.state_dict()["state"].items() for key, value in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError, IndexError, KeyError: if it is of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, slot in state.items():
        if slot["exp_avg"].shape != parameters[index].shape:
            raise ValueError(f"optimizer state {index} has shape {tuple(slot['exp_avg'].shape)}")
        for key, value in slot.items():  # fused AdamW goes through memory: moments must lie there as the weights do
            moments = torch.empty_like(parameters[index], dtype=value.dtype)
            slot[key] = moments.copy_(share_like(value, moments)) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
