"""What every generator network looks like to the rest of the library: x0-predictions and encoder features.

Losses, methods and samplers talk to this class only and never ask which architecture is behind it. A condition is always a number:
a class, or the row of a table of encoded prompts that the network holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from unidad.noise import NoiseSchedule

Granularity = Literal["stage", "layer"]
GRANULARITIES: tuple[str, ...] = ("stage", "layer")


class Backbone(nn.Module, ABC):
    """A denoising network with its noise schedule.

    Attributes:
        schedule: the discrete schedule it was trained with.
        prediction_type: what its raw output means ("epsilon", "v_prediction", "sample").
        shape: (channels, height, width) of one sample.
        num_classes: of a class-conditional network, or prompts in the table of a text-conditional one; else None.
        bounded: whether clean samples lie in [-1, 1], as pictures do and latents do not.
    """

    schedule: NoiseSchedule
    prediction_type: str
    shape: tuple[int, int, int]
    num_classes: int | None = None
    bounded: bool = True

    @abstractmethod
    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x0-prediction xhat(x_t, t), METHOD §2. x_t: [B, C, H, W], t: [B] int64, labels: [B] int64 -> [B, C, H, W]."""

    @abstractmethod
    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        """Outputs of the encoder blocks and of the mid block, METHOD §5, without running the decoder. Each [B, c, h, w]."""

    @abstractmethod
    def x0_and_features(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage"
    ) -> tuple[Tensor, list[Tensor]]:
        """Both of the above from one forward pass."""

    @abstractmethod
    def feature_channels(self, granularity: Granularity = "stage") -> list[int]:
        """Channel counts of `features`, in the same order, known before any forward pass."""


class Guided(Backbone):
    """A teacher under classifier-free guidance (arXiv 2207.12598): xhat(empty) + scale (xhat(label) - xhat(empty)), from one batch of 2B.

    Guiding the x0-prediction is guiding epsilon or v: each is linear in the other at fixed x_t.

    Args:
        teacher: its label `num_classes`, the one after the last, is the empty prompt.
        scale: 1 is no guidance.
    """

    def __init__(self, teacher: Backbone, scale: float):
        super().__init__()
        if teacher.num_classes is None:
            raise ValueError("guidance needs a network with conditions")
        self.teacher, self.scale, self.empty = teacher, scale, teacher.num_classes
        self.schedule, self.prediction_type, self.shape = teacher.schedule, teacher.prediction_type, teacher.shape
        self.num_classes, self.bounded = teacher.num_classes, teacher.bounded

    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Guided x0-prediction; `labels` are needed."""
        assert labels is not None
        both = torch.cat([labels, torch.full_like(labels, self.empty)])
        told, untold = self.teacher.x0(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return untold + self.scale * (told - untold)

    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        """The teacher's own, unguided."""
        return self.teacher.features(x_t, t, labels, granularity)

    def x0_and_features(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage"
    ) -> tuple[Tensor, list[Tensor]]:
        """Guided prediction, unguided features."""
        return self.x0(x_t, t, labels), self.features(x_t, t, labels, granularity)

    def feature_channels(self, granularity: Granularity = "stage") -> list[int]:
        """The teacher's."""
        return self.teacher.feature_channels(granularity)


def guided(teacher: Backbone, scale: float) -> Backbone:
    """The teacher under guidance, or itself where the scale is 1."""
    return teacher if scale == 1 else Guided(teacher, scale)
