"""Networks and methods small enough to train a few updates in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unidad.backbones.base import Backbone, Granularity
from unidad.backbones.unet2d import UNet2DBackbone, random_unet
from unidad.heads import build_heads
from unidad.methods.base import Phase
from unidad.methods.objective import Objective
from unidad.methods.unidad import UniDAD
from unidad.noise import NoiseSchedule

SHAPE = (3, 16, 16)


def cosine() -> NoiseSchedule:
    return NoiseSchedule(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)


def linear() -> NoiseSchedule:
    return NoiseSchedule(DDPMScheduler(beta_schedule="linear").alphas_cumprod)


def backbone(seed: int = 0, kind: str = "v_prediction", widths: tuple[int, ...] = (8, 16), **options: object) -> UNet2DBackbone:
    schedule = linear() if kind == "epsilon" else cosine()
    return UNet2DBackbone(random_unet(SHAPE, widths, seed, **options), schedule, kind).eval()


def unidad(
    batch_size: int = 2,
    steps: int = 2,
    heads: str = "multi",
    seed: int = 7,
    drop: tuple[str, ...] = (),
    warmup: int = 0,
    target_cycles=None,
    transfer: float = 0.0,
    **numbers,
) -> UniDAD:
    """Four networks with different weights (so that no gradient is zero by accident) and the heads."""
    objective = Objective(**({"fake_updates": 2, "a": 0.25} | numbers))
    nets = {"student": backbone(1), "source_teacher": backbone(2), "fake_teacher": backbone(3), "target_teacher": backbone(4)}
    nets["heads"] = build_heads(heads, nets["fake_teacher"].feature_channels(objective.features), 5)
    nets |= dict.fromkeys(drop)
    return UniDAD(
        **nets,
        objective=objective,
        student_steps=nets["student"].schedule.student_steps(steps),
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        target_warmup=warmup,
        target_cycles=target_cycles,
        transfer=transfer,
        origin=backbone(6).state_dict(),
    )


def phase(method: UniDAD, name: str) -> Phase:
    return next(p for p in method.phases if p.name == name)


class GaussianBackbone(Backbone):
    """The exact denoiser of N(mean, std^2) data: xhat = E[x | x_t]."""

    prediction_type = "sample"
    shape = (2, 3, 3)

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.schedule = cosine()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std
        self.calls = 0

    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        alpha, sigma = self.schedule.alpha_sigma(t, x_t.ndim)
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x_t - alpha * self.mean)

    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        return [x_t * self.mean]

    def x0_and_features(self, x_t, t, labels=None, granularity="stage"):
        return self.x0(x_t, t, labels), self.features(x_t, t)

    def feature_channels(self, granularity: Granularity = "stage") -> list[int]:
        return [2]


SETTINGS = (
    "batch_size=2",
    "fake_updates=1",
    "save_every=1",
    "sample_every=0",
    "log_every=1",
    "tracker=none",
    "a=0.5",
    "denoising=v",
    "precision=fp32",  # whatever the machine's CPU can do
)


def words(source: Path, pictures: Path, out: Path, *more: str, cycles: int = 2) -> list[str]:
    """Arguments of a small `unidad train`, saved after every cycle."""
    sets = [word for setting in (*SETTINGS, f"cycles={cycles}") for word in ("--set", setting)]
    return ["train", "--source", str(source), "--target", str(pictures), "--out", str(out), "--device", "cpu", "--preset", "fsig-near",
            *sets, *more]  # fmt: skip
