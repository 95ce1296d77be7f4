"""Opens Stable Diffusion 1.x, 2.x and XL folders part by part: the UNet for a run, VAE and text encoders for as long as they are used."""

from __future__ import annotations

import hashlib
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
from unidad.backbones.unet2d_cond import TIME_IDS, UNet2DCondBackbone, pooled_width, with_added
from unidad.errors import ModelError, SettingsError

TEXT_WEIGHTS = "model.safetensors"
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


@dataclass(frozen=True)
class TextModel(Model):
    """A text-to-image model read from disk; its backbone knows the empty prompt only, until a table is set.

    Attributes:
        folder: of the whole pipeline.
        parts: sha256 of the VAE's and of the text encoders' weights.
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


def pipeline_name(folder: Path) -> str:
    """Name of the diffusers class that a folder is of."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def is_sdxl(folder: Path) -> bool:
    """Whether a pipeline folder is SDXL's, with two text encoders and added conditions."""
    return pipeline_name(folder) == SDXL


def zero_empty_prompt(folder: Path) -> bool:
    """Whether guidance's empty prompt is all zeros instead of what the text encoders make of it."""
    return is_sdxl(folder) and bool(read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True))


def open_model(name: str | Path) -> Model:
    """A model of either kind.

    Raises:
        UserError: as `load_model` and `load_text_model` do.
    """
    return load_text_model(name) if is_text_to_image(name) else load_model(name)


def load_text_model(name: str | Path) -> TextModel:
    """Open a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` folder; VAE and text encoders are looked at but not kept.

    Raises:
        ModelError: missing, damaged, needing custom code, or of another family; says which.
        SettingsError: transformers is not installed.
    """
    folder = find_folder(str(name))
    index = read_json(folder / "model_index.json")
    refuse_custom_code(folder, index)
    if index.get("_class_name") not in (SD, SDXL):
        raise ModelError(
            f"'{folder}' is a {index.get('_class_name')}; of text-to-image models this version trains {SD} (SD 1.x, 2.x) and {SDXL} only."
        )
    missing = [part for part in ("text_encoder_2", "tokenizer_2") if not (folder / part).is_dir()]
    if is_sdxl(folder) and missing:
        raise ModelError(f"'{folder}' says that it is a {SDXL} but has no {missing[0]}. A base model is needed, not a refiner.")
    unet = _load_unet(folder / "unet", is_sdxl(folder))
    scheduler, schedule = load_scheduler(folder / "scheduler")
    if unet.config.in_channels != load_vae(folder).config.latent_channels:
        raise ModelError(f"'{folder}' does not fit together: the UNet and the VAE have other numbers of channels.")
    model = TextModel(
        UNet2DCondBackbone(unet, schedule, scheduler["prediction_type"], encode_prompts(folder, [""])).eval(),
        scheduler,
        str(name),
        hash_file(folder / "unet" / WEIGHTS),
        folder=folder,
        parts=(hash_file(folder / "vae" / WEIGHTS), _text_digest(folder)),
    )
    notes = read_json(folder / STUDENT_FILE) if (folder / STUDENT_FILE).exists() else {}
    steps = student_steps(notes.get("student_steps"), len(schedule), folder / STUDENT_FILE)
    return replace(model, student_steps=steps, prompt=notes.get("prompt", ""))


def _text_digest(folder: Path) -> str:
    digests = [hash_file(folder / part / TEXT_WEIGHTS) for part in ("text_encoder", "text_encoder_2") if (folder / part).is_dir()]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _load_unet(folder: Path, sdxl: bool) -> UNet2DConditionModel:
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
        named = [extra for extra in extras if config.get(extra) not in ((None, "text_time") if sdxl else (None,))]
        wrong = f"wants a condition besides the prompt ('{named[0]}')" if named else None
    width = config.get("cross_attention_dim")
    room = width - TIME_IDS if isinstance(width, int) else 0
    if not wrong and sdxl and not 0 < (pooled_width(config) or 0) <= room:
        wrong = "takes no pooled prompt and sizes as SDXL's does"
    if wrong:
        raise ModelError(
            f"'{folder}' cannot be used: it {wrong}. The UNet of a plain SD 1.x, 2.x or XL text-to-image model is needed."
        )
    return load_network(UNet2DConditionModel, folder)


# -- pictures and latents ---------------------------------------------------------------------------------------------


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a pipeline folder, in eval mode; float32 always, as SDXL's needs (`force_upcast`).

    Raises:
        ModelError: it cannot be read, or shifts its latents.
    """
    vae = load_network(AutoencoderKL, folder / "vae").eval().requires_grad_(False)
    if vae.config.latents_mean is not None or vae.config.shift_factor is not None:
        raise ModelError(f"The VAE in '{folder}' shifts its latents (latents_mean or shift_factor), which is not supported.")
    return vae


def picture_side(folder: Path) -> int:
    """Side in pixels of the pictures that a pipeline folder's model draws."""
    blocks = read_json(folder / "vae" / "config.json").get("block_out_channels", [0])
    return read_json(folder / "unet" / "config.json")["sample_size"] * 2 ** (len(blocks) - 1)


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


def load_tokenizer(folder: Path, part: str = "tokenizer") -> Any:
    """A CLIP tokenizer of a pipeline folder.

    Raises:
        ModelError: it cannot be read.
        SettingsError: transformers is not installed.
    """
    _quiet_transformers()
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder / part), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"The tokenizer in '{folder / part}' cannot be read: {reason}.") from None


def load_text_encoder(folder: Path, part: str = "text_encoder") -> Any:
    """A CLIP text encoder of a pipeline folder, float32, in eval mode; the second ends in a projection."""
    _quiet_transformers()
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return load_network(kind, folder / part, TEXT_WEIGHTS).eval().requires_grad_(False)


def text_parts(folder: Path) -> dict[str, Any]:
    """Tokenizers and text encoders of a pipeline folder, by the names that its pipeline gives them."""
    ends = ("", "_2") if is_sdxl(folder) else ("",)
    tokenizers = {f"tokenizer{end}": load_tokenizer(folder, f"tokenizer{end}") for end in ends}
    return tokenizers | {f"text_encoder{end}": load_text_encoder(folder, f"text_encoder{end}") for end in ends}


def encode_prompts(folder: Path, prompts: list[str]) -> Tensor:
    """A table of prompts, [P, L, D] float32, as the folder's own pipeline encodes them; the encoders are freed afterwards.

    With SDXL each prompt's added conditions stand in the table too (`with_added`): the pooled embedding, and sizes that say that the
    picture was as large as the model draws them and not cropped.

    Raises:
        SettingsError: a prompt has more tokens than a text encoder takes (77, its two ends included).
    """
    refuse_long(folder, prompts)
    return _encode_sdxl(folder, prompts) if is_sdxl(folder) else _encode(folder, prompts)


def refuse_long(folder: Path, prompts: list[str]) -> None:
    """Raise SettingsError for a prompt that has more tokens than a text encoder of the folder takes."""
    for part in ("tokenizer", "tokenizer_2") if is_sdxl(folder) else ("tokenizer",):
        tokenizer = load_tokenizer(folder, part)
        most = tokenizer.model_max_length
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids, strict=True):
            if len(ids) > most:
                raise SettingsError(
                    f"The prompt '{prompt[:60]}...' has {len(ids)} tokens, more than the {most} it may have. Shorten it."
                )


@torch.no_grad()
def _encode(folder: Path, prompts: list[str]) -> Tensor:
    tokenizer, encoder = load_tokenizer(folder), load_text_encoder(folder)
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids, attention_mask=mask)[0].clone()


@torch.no_grad()
def _encode_sdxl(folder: Path, prompts: list[str]) -> Tensor:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(**text_parts(folder), vae=None, unet=None, scheduler=None, add_watermarker=False)
    embeddings, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    if prompts[-1] == "" and zero_empty_prompt(folder):
        embeddings[-1], pooled[-1] = 0, 0
    config, side = read_json(folder / "unet" / "config.json"), picture_side(folder)
    if embeddings.shape[-1] != config.get("cross_attention_dim") or pooled.shape[-1] != pooled_width(config):
        raise ModelError(f"'{folder}' does not fit together: the UNet and the text encoders are of other widths.")
    return with_added(embeddings, pooled, torch.tensor([side, side, 0, 0, side, side]))


def split_tokens(folder: Path, prompt: str, class_prompt: str) -> dict[str, list[str]]:
    """Words of the prompt that the class prompt has not and that the tokenizer knows only in pieces, with these."""
    tokenizer, ends = load_tokenizer(folder), ",.;:!?\"'()"
    ours, general = ([word.strip(ends) for word in text.split()] for text in (prompt, class_prompt))
    rare = [word for word in ours if word and word not in general]
    pieces = {word: [piece.removesuffix("</w>") for piece in tokenizer.tokenize(word)] for word in rare}
    return {word: some for word, some in pieces.items() if len(some) > 1}
