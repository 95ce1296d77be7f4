"""Numbers that are not finite, on devices whose numbers are dear to look at: they stay on the device until the next log line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class DeferredGuard:
    """Leaves updates with numbers that are not finite out on the device itself, and counts them there.

    Looking at a loss on the host makes the host wait for the device, once a loss and network. Instead every update has a flag on the
    device, which fused AdamW takes as `found_inf`: where it is 1 neither weights nor moments change.

    Args:
        device: of the losses.
        phases: names of all phases.
    """

    def __init__(self, device: torch.device, phases: Iterable[str]):
        self.flag = torch.zeros((), device=device)
        self._counts = {name: torch.zeros((), device=device) for name in phases}
        self._row, self._longest = torch.zeros((), device=device), torch.zeros((), device=device)

    def see(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raise the flag where one of these scalars is not finite; returns them with 0 in its place, for the log."""
        for value in values.values():
            self.flag = torch.maximum(self.flag, (~torch.isfinite(value.detach())).float())
        return {name: torch.nan_to_num(value.detach(), 0.0, 0.0, 0.0) for name, value in values.items()}

    def close(self, phase: str) -> None:
        """Count the update of this phase and lower the flag for the next."""
        self._counts[phase] += self.flag
        self._row = (self._row + self.flag) * self.flag
        self._longest = torch.maximum(self._longest, self._row)
        self.flag = torch.zeros_like(self.flag)

    def read(self) -> tuple[dict[str, int], int]:
        """Waits for the device. Updates left out since the last reading, by phase, and the longest row of them in all the run."""
        *counts, longest = torch.stack([*self._counts.values(), self._longest]).tolist()
        found = {name: int(n) for name, n in zip(self._counts, counts, strict=True) if n}
        for count in self._counts.values():
            count.zero_()
        return found, int(longest)


def not_finite(losses: Mapping[str, Tensor]) -> str | None:
    """The name of the first loss that is nan or infinite, or None; reads the numbers back."""
    return next((name for name, value in losses.items() if not torch.isfinite(value)), None)
