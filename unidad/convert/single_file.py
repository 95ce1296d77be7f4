"""Stable Diffusion 1.x and 2.x checkpoints in one `.safetensors` file of the original layout, to diffusers folders and back.

diffusers reads them; what it would leave out in silence is looked for beforehand. Writing is ours (`ldm.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unidad.backbones.load import find_folder, load_network, read_json, refuse_custom_code
from unidad.backbones.load_text import SD, load_text_encoder, load_tokenizer, load_vae
from unidad.backbones.single_file import STABLE_DIFFUSION, VAE, Shapes, family, read_shapes
from unidad.convert.ldm import to_ldm
from unidad.errors import CheckpointError, ModelError
from unidad.export import write_pipeline

SMALL = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


def from_single_file(file: str | Path, config: str | Path, out: str | Path, half: bool = False) -> dict[str, Any]:
    """Write a single-file checkpoint as a `StableDiffusionPipeline` folder. Nothing is downloaded.

    Args:
        file: `.safetensors` with `model.diffusion_model.*`, `first_stage_model.*` and `cond_stage_model.*`.
        config: a diffusers folder of the same family; its configurations, scheduler and tokenizer are used, its weights are not.
        out: new or empty folder. half: store float16 weights, else float32.

    Returns:
        Facts: "parameters", "prediction_type" (the config's: the file does not tell).

    Raises:
        ModelError: the file is damaged or of another family, or does not fit the config; says which.
        SettingsError: transformers is not installed.
        CheckpointError: `out` holds something or cannot be written.
    """
    path, folder, target = Path(file), find_folder(str(config)), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"'{target}' is not an empty folder. Give another --out; nothing there was touched.")
    shapes = read_shapes(path)
    if (kind := family(shapes)) != STABLE_DIFFUSION:
        raise ModelError(f"'{path}' looks like {kind}; {STABLE_DIFFUSION} is needed here.")
    _check_config(folder)
    _refuse_other_shapes(path, shapes, folder)
    pipe = _read(path, folder)
    about = f"Converted from the single-file checkpoint '{path.name}' with unidad. Its licence is the checkpoint's."
    write_pipeline(pipe, target, {"about": about}, f"# {path.stem}\n\n{about}\n", half)
    parameters = sum(p.numel() for part in _networks(pipe) for p in part.parameters())
    return {"parameters": parameters, "prediction_type": str(pipe.scheduler.config.prediction_type)}


def to_single_file(folder: str | Path, out: str | Path, half: bool = False) -> dict[str, Any]:
    """Write a `StableDiffusionPipeline` folder's UNet, VAE and text encoder as one file in the original layout.

    The file holds no scheduler: whoever draws from a few-step student must set its steps by hand.

    Args:
        folder: pipeline folder, or a finished run. out: new `.safetensors` file. half: store float16 weights, else float32.

    Returns:
        Facts: "parameters", "text_encoder" ("CLIP" as SD 1.x has it, or "OpenCLIP" as SD 2.x).

    Raises:
        ModelError: the folder cannot be read, or is no SD 1.x or 2.x pipeline.
        CheckpointError: `out` exists or cannot be written.
    """
    path, source = Path(out), find_folder(str(folder))
    if path.exists():
        raise CheckpointError(f"'{path}' exists. Give another --out; nothing was overwritten.")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"--out '{path}' should end in .safetensors.")
    _check_config(source)
    open_clip = _is_open_clip(source)
    parts = (load_network(UNet2DConditionModel, source / "unet"), load_vae(source), load_text_encoder(source))
    weights = _in_original_layout(source, parts)
    kind = torch.float16 if half else torch.float32
    write_weights(path, {name: value.detach().to(kind).contiguous() for name, value in weights.items()})
    return {"parameters": sum(w.numel() for w in weights.values()), "text_encoder": "OpenCLIP" if open_clip else "CLIP"}


def write_weights(path: Path, weights: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a new `.safetensors` file, whole or not at all.

    Raises:
        CheckpointError: if the disk refuses.
    """
    part = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, part, metadata={"format": "pt", **(metadata or {})})
        part.chmod(0o644)  # safetensors writes files that only their owner may read
        part.rename(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"'{path}' cannot be written: {error}. Give another file or free some space.") from None


def _check_config(folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    refuse_custom_code(folder, index)
    if index.get("_class_name") != SD:
        raise ModelError(f"'{folder}' is a {index.get('_class_name')}; a {SD} (SD 1.x, 2.x) is needed.")
    for name in SMALL:
        read_json(folder / name)
    load_tokenizer(folder)


def _is_open_clip(folder: Path) -> bool:
    """OpenCLIP's text encoders have the exact GELU, CLIP's its sigmoid approximation."""
    return read_json(folder / "text_encoder" / "config.json").get("hidden_act", "quick_gelu") == "gelu"


def _in_original_layout(folder: Path, parts: Sequence[Any]) -> dict[str, Tensor]:
    unet, vae, text = (part.state_dict() for part in parts)
    try:
        return to_ldm(unet, vae, text, _is_open_clip(folder))
    except (ModelError, KeyError, ValueError) as error:
        raise ModelError(f"'{folder}' cannot be put into the original layout of SD 1.x and 2.x: {error}") from None


def _refuse_other_shapes(path: Path, shapes: Shapes, folder: Path) -> None:
    """Every weight that the config asks for must be in the file, in its shape: diffusers would leave a missing one unset."""
    wanted = _in_original_layout(folder, _empty_networks(folder))
    for name, value in wanted.items():
        found, shape = shapes.get(name), tuple(value.shape)
        attention = name.startswith(VAE) and ".attn_1." in name  # some files have it as matrices
        if found is None or (found != shape and not (attention and found == shape[:2])):
            has = f"{list(found)} there" if found else "not there"
            raise ModelError(
                f"'{path}' does not fit the config '{folder}': '{name}' should be {list(shape)} and is {has}. "
                "Give as --config a diffusers folder of the model that the file was made from (SD 1.x for SD 1.x, 2.x for 2.x)."
            )


def _empty_networks(folder: Path) -> list[Any]:
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
            vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(str(folder / "text_encoder"), local_files_only=True))
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"The configurations in '{folder}' cannot be used: {' '.join(str(error).split())[:200]}.") from None
    return [unet, vae, text]


def _read(path: Path, folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline  # which imports transformers
    from diffusers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of casting to float32, which is asked for
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(folder),
            local_files_only=True,
            torch_dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be read: {' '.join(str(error).split())[:300]}") from None
    finally:
        logging.set_verbosity(before)
    if any(value.is_meta for part in _networks(pipe) for value in part.state_dict().values()):
        raise ModelError(f"'{path}' could not be read whole with the config '{folder}'.")
    return pipe


def _networks(pipe: Any) -> list[Any]:
    return [pipe.unet, pipe.vae, pipe.text_encoder]
