"""Moments that live in the computer's memory and are on the GPU only while their own network's update is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidad.config import LoopSettings
from unidad.errors import SettingsError


def refuse_useless_offload(settings: LoopSettings, device: torch.device) -> None:
    """Raise SettingsError where there is no memory of a GPU's own to make room in."""
    if settings.offload_optimizer and device.type != "cuda":
        raise SettingsError(
            f"'offload_optimizer' moves moments out of an NVIDIA GPU's memory, and this run is on {device.type}. Leave it off."
        )


class HostMoments:
    """Moves an optimizer's moments: here before each step, away after it, and away after a state is loaded. The numbers stay the same.

    A moment is any tensor of the state that is not a single number. Away, they lie in page-locked memory, which a GPU copies from and to at
    full speed; it is taken once. The host waits for every step, so that a checkpoint never reads a half-copied moment.

    Args:
        optimizer: from now on hooked; its parameters lie on `device`.
        device: of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self._device = device
        self._homes: dict[tuple[Tensor, str], Tensor] = {}
        optimizer.register_step_pre_hook(self._fetch)
        optimizer.register_step_post_hook(self._put_away)
        optimizer.register_load_state_dict_post_hook(self._put_away)

    @torch.no_grad()
    def _fetch(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, slot in optimizer.state.items():
            for key, home in slot.items():
                if home.ndim:
                    slot[key] = torch.empty_like(home, device=parameter.device).copy_(home, non_blocking=True)

    @torch.no_grad()
    def _put_away(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, slot in optimizer.state.items():
            for key, value in slot.items():
                if value.ndim:
                    slot[key] = self._home(parameter, key, value).copy_(value, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _home(self, parameter: Tensor, key: str, like: Tensor) -> Tensor:
        place = (parameter, key)
        if place not in self._homes:
            home = torch.empty_like(like, device="cpu")
            self._homes[place] = home.pin_memory() if self._device.type == "cuda" else home
        return self._homes[place]
