"""Plain denoising training of one network: pretraining from scratch, and fine-tuning (the paper's baseline FT)."""

from __future__ import annotations

import torch
from torch import Tensor

from unidad.backbones.base import Backbone
from unidad.losses import denoising_loss
from unidad.methods.base import Losses, Method, Phase


def denoise(model: Backbone, x: Tensor, generator: torch.Generator, kind: str, label: int | None = None) -> Tensor:
    """L_denoise of METHOD §6: one x0-prediction of noised x at t ~ U{0..T-1}; x is [B, C, H, W] in [-1, 1]."""
    t = model.schedule.uniform(len(x), generator)
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    alpha, sigma = model.schedule.alpha_sigma(t, x.ndim)
    labels = None if label is None else torch.full_like(t, label)
    return denoising_loss(x, model.x0(alpha * x + sigma * eps, t, labels), alpha, sigma, kind)


class Finetune(Method):
    """One network, one phase.

    Args:
        model: the network, trained in place.
        generator: source of timesteps and noise, on the model's device.
        denoising: which weighting, see `denoising_loss`.
        label: class of every picture, for a class-conditional network.
    """

    product = "model"

    def __init__(self, model: Backbone, generator: torch.Generator, denoising: str = "epsilon", label: int | None = None):
        self.networks = {"model": model}
        self._model, self._generator, self._denoising, self._label = model, generator, denoising, label
        self.phases = [Phase("model", ("model",), 1, self.loss)]

    def loss(self, pictures: Tensor) -> Losses:
        """L_denoise on real pictures [B, C, H, W]."""
        return {"total": denoise(self._model, pictures, self._generator, self._denoising, self._label)}
