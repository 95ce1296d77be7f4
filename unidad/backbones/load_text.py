"""Opens Stable Diffusion 1.x and 2.x folders part by part: the UNet for a run, the VAE and the text encoder for as long as they are used."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from unidad.backbones.load import (
    STUDENT_FILE,
    WEIGHTS,
    Model,
    find_folder,
    hash_file,
    load_model,
    load_network,
    load_scheduler,
    read_json,
    refuse_custom_code,
    student_steps,
)
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.errors import ModelError, SettingsError

TEXT_WEIGHTS = "model.safetensors"
PIPELINE = "StableDiffusionPipeline"


@dataclass(frozen=True)
class TextModel(Model):
    """A text-to-image model read from disk; its backbone knows the empty prompt only, until a table is set.

    Attributes:
        folder: of the whole pipeline.
        parts: sha256 of the VAE's and of the text encoder's weights.
        prompt: that a student was trained with.
    """

    folder: Path = Path()
    parts: tuple[str, str] = ("", "")
    prompt: str = ""


def is_text_to_image(name: str | Path) -> bool:
    """Whether a model has a text encoder.

    Raises:
        ModelError: if there is no such model.
    """
    index = find_folder(str(name)) / "model_index.json"
    return index.exists() and "text_encoder" in read_json(index)


def open_model(name: str | Path) -> Model:
    """A model of either kind.

    Raises:
        UserError: as `load_model` and `load_text_model` do.
    """
    return load_text_model(name) if is_text_to_image(name) else load_model(name)


def load_text_model(name: str | Path) -> TextModel:
    """Open a `StableDiffusionPipeline` folder; VAE and text encoder are looked at but not kept.

    Raises:
        ModelError: missing, damaged, needing custom code, or of another family; says which.
        SettingsError: transformers is not installed.
    """
    folder = find_folder(str(name))
    index = read_json(folder / "model_index.json")
    refuse_custom_code(folder, index)
    if index.get("_class_name") != PIPELINE:
        raise ModelError(
            f"'{folder}' is a {index.get('_class_name')}; of text-to-image models this version trains a {PIPELINE} (SD 1.x, 2.x) only."
        )
    unet = _load_unet(folder / "unet")
    scheduler, schedule = load_scheduler(folder / "scheduler")
    if unet.config.in_channels != load_vae(folder).config.latent_channels:
        raise ModelError(f"'{folder}' does not fit together: the UNet and the VAE have other numbers of channels.")
    model = TextModel(
        UNet2DCondBackbone(unet, schedule, scheduler["prediction_type"], encode_prompts(folder, [""])).eval(),
        scheduler,
        str(name),
        hash_file(folder / "unet" / WEIGHTS),
        folder=folder,
        parts=(hash_file(folder / "vae" / WEIGHTS), hash_file(folder / "text_encoder" / TEXT_WEIGHTS)),
    )
    notes = read_json(folder / STUDENT_FILE) if (folder / STUDENT_FILE).exists() else {}
    steps = student_steps(notes.get("student_steps"), len(schedule), folder / STUDENT_FILE)
    return replace(model, student_steps=steps, prompt=notes.get("prompt", ""))


def _load_unet(folder: Path) -> UNet2DConditionModel:
    config = read_json(folder / "config.json")
    size, plain = config.get("sample_size"), isinstance(config.get("layers_per_block", 2), int)
    wrong = None
    if config.get("_class_name") != "UNet2DConditionModel":
        wrong = f"is a {config.get('_class_name')}"
    elif config.get("in_channels", 4) != config.get("out_channels", 4):
        wrong = f"has {config.get('in_channels')} channels in and {config.get('out_channels')} out (inpainting?)"
    elif not isinstance(size, int) or not plain:
        wrong = "has no single sample_size or layers_per_block"
    else:
        extras = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")
        named = [extra for extra in extras if config.get(extra) is not None]
        wrong = f"wants a condition besides the prompt ('{named[0]}')" if named else None
    if wrong:
        raise ModelError(f"'{folder}' cannot be used: it {wrong}. The UNet of an SD 1.x or 2.x text-to-image model is needed.")
    return load_network(UNet2DConditionModel, folder)


# -- pictures and latents ---------------------------------------------------------------------------------------------


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a pipeline folder, float32, in eval mode."""
    return load_network(AutoencoderKL, folder / "vae").eval().requires_grad_(False)


def picture_side(model: TextModel) -> int:
    """Side in pixels of the pictures that a model draws."""
    blocks = read_json(model.folder / "vae" / "config.json").get("block_out_channels", [0])
    return model.backbone.shape[-1] * 2 ** (len(blocks) - 1)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [N, 3, S, S] in [-1, 1] -> scaled latents [N, c, s, s]: the mean of the VAE's posterior, one picture at a time."""
    return torch.cat([vae.encode(x[None]).latent_dist.mean for x in pictures]) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents [N, c, s, s] -> pictures [N, 3, S, S], nearly in [-1, 1], one at a time."""
    return torch.cat([vae.decode(z[None] / vae.config.scaling_factor, return_dict=False)[0] for z in latents])


# -- prompts ----------------------------------------------------------------------------------------------------------


def _quiet_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise SettingsError("Text-to-image models need transformers. Run: pip install 'unidad[sd]'.")
    from transformers.utils import logging

    logging.set_verbosity_error()  # it advises to install torchvision, which nothing here needs
    logging.disable_progress_bar()  # of reading weights that are on disk already


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a pipeline folder.

    Raises:
        ModelError: it cannot be read.
        SettingsError: transformers is not installed.
    """
    _quiet_transformers()
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"The tokenizer in '{folder}' cannot be read: {reason}.") from None


def load_text_encoder(folder: Path) -> Any:
    """The CLIP text encoder of a pipeline folder, float32, in eval mode."""
    _quiet_transformers()
    from transformers import CLIPTextModel

    return load_network(CLIPTextModel, folder / "text_encoder", TEXT_WEIGHTS).eval().requires_grad_(False)


@torch.no_grad()
def encode_prompts(folder: Path, prompts: list[str]) -> Tensor:
    """Text embeddings of prompts, [P, L, D] float32, as `StableDiffusionPipeline` computes them; the encoder is freed afterwards.

    Raises:
        SettingsError: a prompt has more tokens than the text encoder takes (77, its two ends included).
    """
    tokenizer = load_tokenizer(folder)
    most = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        if len(ids) > most:
            raise SettingsError(
                f"The prompt '{prompt[:60]}...' has {len(ids)} tokens, more than the {most} it may have. Shorten it."
            )
    encoder = load_text_encoder(folder)
    tokens = tokenizer(prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids, attention_mask=mask)[0].clone()


def split_tokens(folder: Path, prompt: str, class_prompt: str) -> dict[str, list[str]]:
    """Words of the prompt that the class prompt has not and that the tokenizer knows only in pieces, with these."""
    tokenizer = load_tokenizer(folder)
    rare = [word for word in prompt.split() if word not in class_prompt.split()]
    pieces = {word: [piece.removesuffix("</w>") for piece in tokenizer.tokenize(word)] for word in rare}
    return {word: some for word, some in pieces.items() if len(some) > 1}
