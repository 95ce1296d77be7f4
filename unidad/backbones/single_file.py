"""Looks at one `.safetensors` file of weights, its names and shapes only, and says what it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from unidad.errors import ModelError

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TEXTS_XL = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
REFINER = "conditioner.embedders.0.model."
FIRST = f"{UNET}input_blocks.0.0.weight"
STABLE_DIFFUSION, STABLE_DIFFUSION_XL = "a Stable Diffusion 1.x or 2.x checkpoint", "an SDXL checkpoint"
CONVERTED = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
MOST_HEADER = 100_000_000  # bytes, as the format's own readers have it
Shapes = dict[str, tuple[int, ...]]

# What a name in the file gives away, the surest first.
SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_unet_", "lora_te", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up."), "a LoRA"),
    (("double_blocks.", "single_transformer_blocks."), "a Flux checkpoint"),
    (("joint_blocks.", "transformer_blocks.0.norm1_context"), "an SD3 checkpoint"),
    (("control_model.", "input_hint_block.", "controlnet_cond_embedding."), "a ControlNet"),
)
ALONE: tuple[tuple[str, str], ...] = (
    ("add_embedding.linear_1.weight", "an SDXL UNet alone, in diffusers' layout"),
    ("decoder.conv_in.weight", "a VAE alone"),
    ("down_blocks.0.resnets.0.conv1.weight", "a UNet alone, in diffusers' layout"),
    ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
    ("embeddings.token_embedding.weight", "a text encoder alone"),
    ("input_blocks.0.0.weight", "a UNet alone"),
)


def read_shapes(path: Path) -> Shapes:
    """Name and shape of every tensor, from the file's header; no weight is read.

    Raises:
        ModelError: there is no such file, or it is a pickle, truncated, or of another format.
    """
    if not path.is_file():
        raise ModelError(f"There is no file '{path}'. Give a checkpoint (.safetensors).")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"'{path}' is no .safetensors file. Pickled checkpoints (.ckpt, .pt, .bin) can run code when they are opened, so they are not "
            "read here: save it as .safetensors first."
        )
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= MOST_HEADER:
                raise ValueError("it has no header")
            header = json.loads(handle.read(length))
        shapes = {name: tuple(about["shape"]) for name, about in header.items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError("it is shorter than its header says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"'{path}' is truncated, damaged or no safetensors file ({error}). Fetch it again.") from None
    return shapes


def family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file of these names and shapes looks like, as words; one of `CONVERTED` where it can be that."""
    for signs, kind in SIGNS:
        if any(sign in name for name in shapes for sign in signs):
            return kind
    if FIRST in shapes:
        return _stable_diffusion(shapes)
    return next((kind for name, kind in ALONE if name in shapes), "no checkpoint of a family that is known here")


def _stable_diffusion(shapes: Mapping[str, tuple[int, ...]]) -> str:
    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in shapes)

    channels = shapes[FIRST][1] if len(shapes[FIRST]) == 4 else 0
    xl = has("conditioner.", f"{UNET}label_emb.")
    name = "SDXL" if xl else "Stable Diffusion"
    if channels == 9:
        return f"an inpainting checkpoint of {name}"
    if channels != 4:
        return f"a checkpoint of {name} whose UNet takes {channels} channels (4 are needed)"
    if xl and has(REFINER):
        return "an SDXL refiner (the base model is needed)"
    texts = zip(TEXTS_XL, ("first text encoder", "second text encoder"), strict=True) if xl else [(TEXT, "text encoder")]
    for prefix, part in ((VAE, "VAE"), *texts):
        if not has(prefix):
            return f"a UNet of {name} without its {part}"
    return STABLE_DIFFUSION_XL if xl else STABLE_DIFFUSION


def refuse_as_source(path: Path) -> NoReturn:
    """Raise the ModelError that says what a file given as a model is, and what to do with it."""
    kind = family(read_shapes(path))
    if kind in CONVERTED:
        raise ModelError(
            f"'{path}' looks like {kind} in one file; a source is a folder. Make one: unidad convert single-file {path} --config FOLDER "
            "--out DIR, FOLDER being any diffusers folder of the same family, of which only the small files are used; or add "
            "--source-config FOLDER to `unidad train`."
        )
    raise ModelError(f"'{path}' is a file that looks like {kind}; a model is a folder saved by diffusers.")
