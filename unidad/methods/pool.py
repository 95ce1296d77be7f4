"""A pool of a teacher's trajectories, which a student is regressed onto."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

REFRESH = 16  # student updates


class TrajectoryPool:
    """Its oldest eighth is drawn anew every REFRESH uses, for the student learns, and the teacher may.

    Args:
        size: trajectories kept.
        draw: n -> n new ones, [n, K, 2, C, H, W].

    Attributes:
        kept: [size, K, 2, C, H, W], or None before the first use.
        age: how often it was used.
    """

    def __init__(self, size: int, draw: Callable[[int], Tensor]):
        self.size, self.draw = size, draw
        self.kept: Tensor | None = None
        self.age = 0

    def use(self) -> Tensor:
        """All trajectories, [size, K, 2, C, H, W]."""
        if self.kept is None:
            self.kept = self.draw(self.size)
        elif self.age % REFRESH == 0:
            renewed = max(1, self.size // 8)
            self.kept = torch.cat([self.kept[renewed:], self.draw(renewed)])
        self.age += 1
        return self.kept

    def drawn(self, uses: int) -> int:
        """How many trajectories so many uses of a new pool take."""
        return self.size + (uses - 1) // REFRESH * max(1, self.size // 8) if uses else 0

    def carried(self) -> list[Tensor]:
        """What a checkpoint needs: the pool and its age, or nothing."""
        return [] if self.kept is None else [self.kept, torch.tensor(self.age)]

    def restore(self, carried: list[Tensor]) -> list[Tensor]:
        """Take back what `carried` gave from the end of a list; returns the rest. A pool of an earlier form is left, and drawn anew."""
        self.kept = None
        if not carried or carried[-1].ndim:
            return carried
        if carried[-2].ndim == 6:
            self.kept, self.age = carried[-2], int(carried[-1])
        return carried[:-2]
