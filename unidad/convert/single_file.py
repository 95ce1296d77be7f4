"""Stable Diffusion 1.x, 2.x and XL checkpoints in one `.safetensors` file of the original layout, to diffusers folders and back.

diffusers reads them; what it would leave out in silence is looked for beforehand. Writing is ours (`ldm.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unidad.backbones.load import STUDENT_FILE, find_folder, hash_file, load_network, read_json, refuse_custom_code
from unidad.backbones.load_text import (
    SD,
    SDXL,
    is_sdxl,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    pipeline_name,
    zero_empty_prompt,
)
from unidad.backbones.single_file import CONVERTED, STABLE_DIFFUSION, STABLE_DIFFUSION_XL, VAE, Shapes, family, read_shapes
from unidad.convert.ldm import to_ldm, to_ldm_xl
from unidad.errors import CheckpointError, ModelError
from unidad.export import write_pipeline

SMALL = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
MADE_FROM = "made_from"  # in unidad.json: sha256 over a checkpoint's and its config's small files
V_PREDICTION = "v_pred"  # an empty tensor of this name marks v-prediction in SDXL files; files of other families say nothing


def from_single_file(file: str | Path, config: str | Path, out: str | Path, half: bool = False) -> dict[str, Any]:
    """Write a single-file checkpoint as a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` folder.

    Args:
        file: `.safetensors` with `model.diffusion_model.*`, `first_stage_model.*` and `cond_stage_model.*` (SDXL: `conditioner.*`).
        config: a diffusers folder of the same family; its configurations, scheduler and tokenizer are used, its weights are not.
        out: new or empty folder. half: store float16 weights, else float32.

    Returns:
        Facts: "parameters", "prediction_type" (the config's: the file does not tell).

    Raises:
        ModelError: the file is damaged or of another family, or does not fit the config; says which.
        SettingsError: transformers is not installed.
        CheckpointError: `out` holds something or cannot be written.
    """
    path, target = Path(file), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"'{target}' is not an empty folder. Give another --out; nothing there was touched.")
    shapes = read_shapes(path)
    if (kind := family(shapes)) not in CONVERTED:
        raise ModelError(f"'{path}' looks like {kind}; {STABLE_DIFFUSION} or {STABLE_DIFFUSION_XL} is needed here.")
    folder = find_folder(str(config), weights=False)
    _check_config(folder)
    if (kind == STABLE_DIFFUSION_XL) != is_sdxl(folder):
        raise ModelError(
            f"'{path}' looks like {kind}, but the config '{folder}' is a {pipeline_name(folder)}. Give one of the same family."
        )
    _refuse_other_shapes(path, shapes, folder)
    pipe = _read(path, folder)
    if V_PREDICTION in shapes and pipe.scheduler.config.prediction_type != "v_prediction":
        raise ModelError(
            f"'{path}' is marked as a v-prediction model, and the config '{folder}' says {pipe.scheduler.config.prediction_type}. "
            "Set prediction_type to v_prediction in its scheduler/scheduler_config.json."
        )
    about = f"Converted from the single-file checkpoint '{path.name}' with unidad. Its licence is the checkpoint's."
    notes = {"about": about, MADE_FROM: _made_from(path, folder)}
    write_pipeline(pipe, target, notes, f"# {path.stem}\n\n{about}\n", half)
    parameters = sum(p.numel() for part in _networks(pipe) for p in part.parameters())
    return {"parameters": parameters, "prediction_type": str(pipe.scheduler.config.prediction_type)}


def unpacked(file: str | Path, config: str | Path) -> Path:
    """The folder of a single-file checkpoint, of the same name beside it; made where it is not there yet.

    Raises:
        CheckpointError: what is there was made from another file or configuration, or by other means.
        UserError: as `from_single_file` does.
    """
    path = Path(file)
    out = path.with_suffix("")
    if path.suffix == ".safetensors" and (out / STUDENT_FILE).is_file():
        if read_json(out / STUDENT_FILE).get(MADE_FROM) != _made_from(path, find_folder(str(config), weights=False)):
            raise CheckpointError(
                f"'{out}' was made from another file or configuration than '{path}' and '{config}'. Move it away."
            )
        return out
    from_single_file(path, config, out)
    return out


def _made_from(path: Path, folder: Path) -> str:
    small = "".join((folder / name).read_text(encoding="utf-8") for name in SMALL)
    return hashlib.sha256(f"{hash_file(path)}{small}".encode()).hexdigest()


def to_single_file(folder: str | Path, out: str | Path, half: bool = False) -> dict[str, Any]:
    """Write the UNet, VAE and text encoders of a folder (SD 1.x, 2.x, XL) as one file in the original layout.

    The file holds no scheduler: whoever draws from a few-step student must set its steps by hand.

    Args:
        folder: pipeline folder, or a finished run. out: new `.safetensors` file. half: store float16 weights, else float32.

    Returns:
        Facts: "parameters", "text_encoder" ("CLIP" as SD 1.x has it, "OpenCLIP" as SD 2.x, or "CLIP and OpenCLIP" as SDXL).

    Raises:
        ModelError: the folder cannot be read, or is no SD 1.x, 2.x or XL pipeline.
        CheckpointError: `out` exists or cannot be written.
    """
    path, source = Path(out), find_folder(str(folder))
    if path.exists():
        raise CheckpointError(f"'{path}' exists. Give another --out; nothing was overwritten.")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"--out '{path}' should end in .safetensors.")
    _check_config(source)
    kind = "CLIP and OpenCLIP" if is_sdxl(source) else "OpenCLIP" if _is_open_clip(source) else "CLIP"
    parts = [load_network(UNet2DConditionModel, source / "unet"), load_vae(source)]
    parts += [load_text_encoder(source, part) for part in _texts(source)]
    weights = _in_original_layout(source, parts)
    number = torch.float16 if half else torch.float32
    write_weights(path, {name: value.detach().to(number).contiguous() for name, value in weights.items()})
    return {"parameters": sum(w.numel() for w in weights.values()), "text_encoder": kind}


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
    if index.get("_class_name") not in (SD, SDXL):
        raise ModelError(f"'{folder}' is a {index.get('_class_name')}; a {SD} (SD 1.x, 2.x) or {SDXL} is needed.")
    for name in (*SMALL, *(f"{part}/config.json" for part in _texts(folder))):
        read_json(folder / name)
    for part in _texts(folder):
        load_tokenizer(folder, part.replace("text_encoder", "tokenizer"))


def _texts(folder: Path) -> list[str]:
    return ["text_encoder", "text_encoder_2"] if is_sdxl(folder) else ["text_encoder"]


def _is_open_clip(folder: Path) -> bool:
    """OpenCLIP's text encoders have the exact GELU, CLIP's its sigmoid approximation."""
    return read_json(folder / "text_encoder" / "config.json").get("hidden_act", "quick_gelu") == "gelu"


def _in_original_layout(folder: Path, parts: Sequence[Any]) -> dict[str, Tensor]:
    unet, vae, *texts = (part.state_dict() for part in parts)
    try:
        return to_ldm_xl(unet, vae, *texts) if is_sdxl(folder) else to_ldm(unet, vae, texts[0], _is_open_clip(folder))
    except (ModelError, KeyError, ValueError) as error:
        raise ModelError(f"'{folder}' cannot be put into the original layout of SD 1.x, 2.x and XL: {error}") from None


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
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
            vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
            kinds = (CLIPTextModel, CLIPTextModelWithProjection)
            texts = [
                kind(CLIPTextConfig.from_pretrained(str(folder / part), local_files_only=True))
                for kind, part in zip(kinds, _texts(folder), strict=False)
            ]
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"The configurations in '{folder}' cannot be used: {' '.join(str(error).split())[:200]}.") from None
    return [unet, vae, *texts]


def _read(path: Path, folder: Path) -> Any:
    import diffusers  # whose pipelines import transformers
    from diffusers.utils import logging

    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if is_sdxl(folder):
        options = {"force_zeros_for_empty_prompt": zero_empty_prompt(folder), "add_watermarker": False}

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of casting to float32, which is asked for
    try:
        pipe = getattr(diffusers, pipeline_name(folder)).from_single_file(
            str(path),
            config=str(folder),
            local_files_only=True,
            torch_dtype=torch.float32,
            feature_extractor=None,
            image_encoder=None,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be read: {' '.join(str(error).split())[:300]}") from None
    finally:
        logging.set_verbosity(before)
    if any(value.is_meta for part in _networks(pipe) for value in part.state_dict().values()):
        raise ModelError(f"'{path}' could not be read whole with the config '{folder}'.")
    return pipe


def _networks(pipe: Any) -> list[Any]:
    return [part for name, part in pipe.components.items() if name in ("unet", "vae", "text_encoder", "text_encoder_2")]
