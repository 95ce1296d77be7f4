"""A Stable Diffusion pipeline of random weights, small enough to train in seconds: pictures of 16x16, latents of 4x8x8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.noise import NoiseSchedule

START, END = "<|startoftext|>", "<|endoftext|>"


def random_unet(seed: int = 0, layers: int = 1) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def scheduler(kind: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False, steps_offset=1
    )


def backbone(seed: int = 0, kind: str = "epsilon", prompts: int = 2, layers: int = 1) -> UNet2DCondBackbone:
    table = torch.randn(prompts + 1, 5, 16, generator=torch.Generator().manual_seed(99))
    return UNet2DCondBackbone(random_unet(seed, layers), NoiseSchedule(scheduler(kind).alphas_cumprod), kind, table).eval()


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary in which "a", "cat", "dog", "prt", "on" and "the" are whole words and all else is letters."""
    letters = [chr(i) for i in range(33, 127)]
    vocabulary, merges = letters + [f"{c}</w>" for c in letters], []
    for word in ("cat", "dog", "prt", "on", "the"):
        whole, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for piece in rest:
            merges.append(f"{whole} {piece}")
            whole += piece
            vocabulary.append(whole)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {token: i for i, token in enumerate([*vocabulary, START, END])}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def write_pipeline(folder: Path, seed: int = 0, kind: str = "epsilon") -> Path:
    """Save a whole random pipeline to `folder`."""
    unet = random_unet(seed)
    torch.manual_seed(seed + 100)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    tokenizer = write_tokenizer(folder.with_name(f"{folder.name}-words"))
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    parts = {
        "vae": vae,
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler(kind),
    }
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
