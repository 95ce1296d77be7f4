"""Networks of named shapes with random weights: true speed and memory need no download."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from unidad.backbones.load import Model, load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.errors import SettingsError, did_you_mean
from unidad.noise import NoiseSchedule


@dataclass(frozen=True)
class Architecture:
    """A pixel-space U-Net.

    Attributes:
        about: one line for people.
        size: side of its square pictures.
        widths: channels per resolution, the first at full resolution.
        attention: sides at which there is attention.
        options: further `UNet2DModel` settings.
    """

    about: str
    size: int
    widths: tuple[int, ...]
    attention: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def unet_config(self) -> dict[str, Any]:
        """Arguments of `UNet2DModel`: three channels in, six out (learned sigma), scale-shift norm, residual up and down."""
        attends = [self.size // 2**i in self.attention for i in range(len(self.widths))]
        shape = {
            "sample_size": self.size,
            "in_channels": 3,
            "out_channels": 6,
            "block_out_channels": self.widths,
            "layers_per_block": 2,
            "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        }
        return shape | self.options


BUNDLED = "avatars"
ARCHITECTURES: dict[str, Architecture] = {
    "adm-256": Architecture(
        "the shape of the FFHQ 256 model of guided-diffusion",
        256,
        (256, 256, 512, 512, 1024, 1024),
        (32, 16, 8),
        {"attention_head_dim": 64},
    ),
    "adm-32x64": Architecture(
        "ADM at 64 pixels with 32 channels, for CPUs", 64, (32, 64, 96, 128), (32, 16, 8), {"attention_head_dim": 32}
    ),
}


def architecture_names() -> list[str]:
    """Names that `random_model` knows."""
    return sorted([BUNDLED, *ARCHITECTURES])


def random_model(name: str, seed: int = 0) -> Model:
    """A model of that shape with random weights and the linear 1000-step schedule; `avatars` is the bundled one as it is.

    Raises:
        SettingsError: for an unknown name.
    """
    if name == BUNDLED:
        return load_model("bundled:avatars")
    if name not in ARCHITECTURES:
        known = architecture_names()
        raise SettingsError(f"There is no architecture '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(**ARCHITECTURES[name].unet_config())
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    backbone = UNet2DBackbone(unet, NoiseSchedule(scheduler.alphas_cumprod), "epsilon").eval()
    return Model(backbone, dict(scheduler.config), name, "random")
