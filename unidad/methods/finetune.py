"""Plain denoising training of one network: pretraining from scratch, fine-tuning (the paper's baseline FT), and fine-tuning of a
few-step student at its own timesteps (the second stage of the baseline DMD2-FT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidad.augment import CutMix
from unidad.backbones.base import Backbone
from unidad.losses import denoising_loss
from unidad.methods.base import Losses, Method, Phase


def denoise(
    model: Backbone,
    x: Tensor,
    generator: torch.Generator,
    kind: str,
    label: int | Tensor | None = None,
    timesteps: Sequence[int] | None = None,
    law: str = "uniform",
    mask: Tensor | None = None,
    mix: CutMix | None = None,
) -> Tensor:
    """L_denoise of METHOD §6: one x0-prediction of noised x at t ~ U{0..T-1}, or uniform over `timesteps`.

    x is [B, C, H, W]; `label` is one for all, or [B] int64; `law` "quadratic" (ours) draws t = T u^2 instead, more often at little noise,
    and "detail" still more so (see `NoiseSchedule`); `mask` as for `denoising_loss`; `mix` pieces pictures together at high noise.
    """
    if timesteps is None and law == "quadratic":
        t = model.schedule.quadratic(len(x), generator, 1.0)
    elif timesteps is None and law == "detail":
        t = model.schedule.detail(len(x), generator)
    elif timesteps is None:
        t = model.schedule.uniform(len(x), generator)
    else:
        index = torch.randint(0, len(timesteps), (len(x),), generator=generator, device=x.device)
        t = torch.tensor(timesteps, device=x.device)[index]
    if mix is not None:
        x = mix(x, t, generator)
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    alpha, sigma = model.schedule.alpha_sigma(t, x.ndim)
    labels = torch.full_like(t, label) if isinstance(label, int) else label
    return denoising_loss(x, model.x0(alpha * x + sigma * eps, t, labels), alpha, sigma, kind, mask=mask)


class Finetune(Method):
    """One network, one phase.

    Args:
        model: the network, trained in place; called "student" where it has `student_steps`, else "model".
        generator: source of timesteps and noise, on the model's device.
        denoising: which weighting, see `denoising_loss`.
        label: class of every picture, for a class-conditional network.
        student_steps: of a few-step student, which is trained at these timesteps only.
        law: of the timesteps of any other network, see `denoise`. mix: see there too.
    """

    def __init__(
        self,
        model: Backbone,
        generator: torch.Generator,
        denoising: str = "epsilon",
        label: int | None = None,
        student_steps: list[int] | None = None,
        law: str = "uniform",
        mix: CutMix | None = None,
    ):
        self.product = "student" if student_steps else "model"
        self.student_steps = student_steps
        self.networks = {self.product: model}
        self._model, self._generator, self._label = model, generator, label
        self._options: dict[str, Any] = {"kind": denoising, "timesteps": student_steps, "law": law, "mix": mix}
        self.phases = [Phase(self.product, (self.product,), 1, self.loss)]

    def loss(self, pictures: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> Losses:
        """L_denoise on real pictures [B, C, H, W], where their masks say."""
        label = self._label if labels is None else labels
        return {"total": denoise(self._model, pictures, self._generator, label=label, mask=masks, **self._options)}
