"""Networks of named shapes with random weights: true speed and memory need no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from unidad.backbones.load import Model, load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.backbones.unet2d_cond import UNet2DCondBackbone, pooled_width
from unidad.errors import SettingsError, did_you_mean
from unidad.noise import NoiseSchedule

ADM_GROUPS = 32  # of every group norm


@dataclass(frozen=True)
class Architecture:
    """ADM, the pixel-space U-Net of guided-diffusion (arXiv 2105.05233), as `UNet2DModel` can express it.

    Attributes:
        about: one line for people.
        size: side of its square pictures.
        widths: channels per resolution, the first at full resolution; multiples of 32.
        attends: whether there is attention, per resolution; the mid block always has it.
        head_width: channels of an attention head.
        blocks: residual blocks per resolution on the way down; one more on the way up.
        residual: up and down inside residual blocks; otherwise by plain convolutions.
        scale_shift: time scales and shifts the second norm; otherwise it is added before it.
        learned_sigma: six channels out instead of three.
        classes: of a class-conditional network, else None.
    """

    about: str
    size: int
    widths: tuple[int, ...]
    attends: tuple[bool, ...]
    head_width: int
    blocks: int = 2
    residual: bool = True
    scale_shift: bool = True
    learned_sigma: bool = True
    classes: int | None = None

    def unet_config(self) -> dict[str, Any]:
        """Arguments of `UNet2DModel`."""
        # DownBlock2D and UpBlock2D ignore downsample_type and upsample_type; without attention the residual ones have their own names.
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if self.residual else ("DownBlock2D", "UpBlock2D")
        resampling = "resnet" if self.residual else "conv"
        return {
            "sample_size": self.size,
            "in_channels": 3,
            "out_channels": 6 if self.learned_sigma else 3,
            "block_out_channels": self.widths,
            "layers_per_block": self.blocks,
            "down_block_types": tuple("AttnDownBlock2D" if a else plain[0] for a in self.attends),
            "up_block_types": tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(self.attends)),
            "attention_head_dim": self.head_width,
            "norm_num_groups": ADM_GROUPS,
            "attn_norm_num_groups": ADM_GROUPS,  # under scale_shift the mid block's attention has no norm unless this is said
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "downsample_type": resampling,
            "upsample_type": resampling,
            "num_class_embeds": self.classes,
        }


BUNDLED = "avatars"
ARCHITECTURES: dict[str, Architecture] = {
    "adm-256": Architecture(
        "the shape of the FFHQ 256 model of guided-diffusion, 552.8 M parameters",
        256,
        (256, 256, 512, 512, 1024, 1024),
        (False, False, False, True, True, True),
        64,
    ),
    "adm-32x64": Architecture("ADM at 64 pixels with 32 channels, for CPUs", 64, (32, 64, 96, 128), (False, True, True, True), 32),
}


def architecture_names() -> list[str]:
    """Names that `random_model` knows."""
    return sorted([BUNDLED, *ARCHITECTURES, *TEXT_UNETS])


def random_model(name: str, seed: int = 0) -> Model:
    """A model of that shape with random weights and the schedule of its kind; `avatars` is the bundled one as it is.

    Raises:
        SettingsError: for an unknown name.
    """
    if name == BUNDLED:
        return load_model("bundled:avatars")
    if name in TEXT_UNETS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Model(_text_backbone(TEXT_UNETS[name], "cpu"), {"prediction_type": "epsilon"}, name, "random")
    if name not in ARCHITECTURES:
        known = architecture_names()
        raise SettingsError(f"There is no architecture '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(**ARCHITECTURES[name].unet_config())
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    backbone = UNet2DBackbone(unet, NoiseSchedule(scheduler.alphas_cumprod), "epsilon").eval()
    return Model(backbone, dict(scheduler.config), name, "random")


# UNets of text-to-image models, as arguments of `UNet2DConditionModel`: what `--plan` can count with no folder at hand.
TEXT_UNETS: dict[str, dict[str, Any]] = {
    "sd-1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def text_unet(config: Mapping[str, Any]) -> UNet2DCondBackbone:
    """A network of that configuration without weights, on the meta device, under one prompt of 77 tokens and the empty one."""
    return _text_backbone(config, "meta")


def _text_backbone(config: Mapping[str, Any], device: str) -> UNet2DCondBackbone:
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(dict(config))
        tokens = 77 + (pooled_width(unet.config) is not None)
        prompts = torch.zeros(2, tokens, unet.config.cross_attention_dim)
    schedule = NoiseSchedule(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod)
    return UNet2DCondBackbone(unet, schedule, "epsilon", prompts).eval()
