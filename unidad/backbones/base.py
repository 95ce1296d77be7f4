"""What every generator network looks like to the rest of the library: x0-predictions and encoder features.

Losses, methods and samplers talk to this class only and never ask which architecture is behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

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
        num_classes: of a class-conditional network, else None.
    """

    schedule: NoiseSchedule
    prediction_type: str
    shape: tuple[int, int, int]
    num_classes: int | None = None

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
