"""Finds and opens source models: bundled ones, diffusers folders, hub ids. Weights are safetensors; no code is ever run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError

from unidad.backbones.base import Backbone
from unidad.backbones.single_file import refuse_as_source
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.errors import ModelError, did_you_mean
from unidad.noise import NoiseSchedule

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = "bundled:"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STUDENT_FILE = "unidad.json"
HUB_FILES = [
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    WEIGHTS,
    "scheduler/*.json",
    "unet/*.json",
    f"unet/{WEIGHTS}",
    "vae/*.json",
    f"vae/{WEIGHTS}",
    "text_encoder/*.json",
    "text_encoder/model.safetensors",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "text_encoder_2/*.json",
    "text_encoder_2/model.safetensors",
    "tokenizer_2/*.json",
    "tokenizer_2/*.txt",
]
# The settings that say what a noise schedule is; a scheduler's other settings say how to sample with it.
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Model:
    """A model read from disk.

    Attributes:
        backbone: float32, in eval mode, on the CPU.
        scheduler: the schedule's settings (betas and prediction type), as a diffusers scheduler's config has them.
        name: as the user gave it.
        digest: sha256 of the weights file.
        student_steps: the timesteps it was distilled for, or None for a many-step model.
        class_label: the class a class-conditional student was adapted under.
    """

    backbone: Backbone
    scheduler: dict[str, Any]
    name: str
    digest: str
    student_steps: list[int] | None = None
    class_label: int | None = None


def bundled_names(kind: str) -> list[str]:
    """Names under assets/<kind> ("models" or "targets") that `bundled:NAME` accepts."""
    folder = ASSETS / kind
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def bundled_path(name: str, kind: str) -> Path:
    """Folder of `bundled:NAME`, or the path itself when the name has no such prefix.

    Raises:
        ModelError: for a name that is not bundled.
    """
    if not name.startswith(BUNDLED):
        return Path(name)
    short, known = name.removeprefix(BUNDLED), bundled_names(kind)
    if short not in known:
        have = ", ".join(BUNDLED + k for k in known) or "none"
        raise ModelError(f"There is no '{name}'.{did_you_mean(short, known)} Bundled {kind}: {have}.")
    return ASSETS / kind / short


def load_model(name: str | Path, weights: bool = True) -> Model:
    """Open a pixel-space diffusion model.

    Args:
        name: `bundled:NAME`, a diffusers pipeline folder (model_index.json, unet/, scheduler/), a run's `student` folder, or a
            hub id, of which only .json and .safetensors files are fetched.
        weights: False reads none: the network is on the meta device, to look at its shape, and the digest empty.

    Raises:
        ModelError: missing, damaged, needing custom code, or of a kind that is not supported; says which.
    """
    folder = find_folder(str(name))
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else None
    if index is None and not (folder / "config.json").exists():
        raise ModelError(f"'{folder}' is not a diffusion pipeline: it has no model_index.json. Give a folder saved by diffusers.")
    refuse_custom_code(folder, index)
    # Older hub repositories have a pipeline's only network and scheduler at their root.
    unet_dir = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_dir = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    unet = _load_unet(unet_dir, weights)
    scheduler, schedule = load_scheduler(scheduler_dir)
    backbone = UNet2DBackbone(unet, schedule, scheduler["prediction_type"]).eval()
    notes = read_json(folder / STUDENT_FILE) if (folder / STUDENT_FILE).exists() else {}
    digest = hash_file(unet_dir / WEIGHTS) if weights else ""
    steps, label = student_steps(notes.get("student_steps"), len(schedule), folder / STUDENT_FILE), notes.get("class_label")
    if label is not None and (type(label) is not int or not 0 <= label < (backbone.num_classes or 0)):
        raise ModelError(f"'{folder / STUDENT_FILE}' names class {label!r}, which the network does not know.")
    return Model(backbone, scheduler, str(name), digest, steps, label)


def student_steps(steps: Any, total: int, where: Path) -> list[int] | None:
    """A student's timesteps as read from the file `where`, or None where it names none.

    Raises:
        ModelError: unless they are whole numbers that fall within total - 1 .. 0.
    """
    if steps is None:
        return None
    good = isinstance(steps, list) and bool(steps) and all(type(t) is int and 0 <= t < total for t in steps)
    if not good or any(a <= b for a, b in pairwise(steps)):
        raise ModelError(f"'{where}' names student_steps {str(steps)[:60]}; falling whole numbers below {total} are needed.")
    return steps


def hash_file(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def find_folder(name: str, weights: bool = True) -> Path:
    """Folder of a model: bundled, on disk (a run's product, where it is a run), or fetched from the hub, on demand without its weights.

    Raises:
        ModelError: if there is none.
    """
    folder = bundled_path(name, "models")
    if folder.is_dir():
        products = [folder / part for part in ("student", "model") if (folder / part).is_dir()]
        return products[0] if (folder / "run.json").exists() and products else folder
    if folder.exists():
        refuse_as_source(folder)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ModelError(
            f"There is no model folder '{name}'. Bundled models: {', '.join(BUNDLED + n for n in bundled_names('models'))}."
        )
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in HUB_FILES if weights or not pattern.endswith(".safetensors")]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's errors have no common base short of this
        raise ModelError(
            f"There is no folder '{name}', and it could not be fetched from the hub ({type(error).__name__}). "
            "Check the path; if it is a hub id, connect to the network, or download the model first and give its folder."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: if it cannot be read or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ModelError(f"'{path}' should hold a JSON object.")
    return content


def refuse_custom_code(folder: Path, index: dict[str, Any] | None) -> None:
    """Raise ModelError where model_index.json names a class outside of diffusers and transformers, or there is no unet.

    Stable Diffusion's safety checker lives in a module of its pipeline; it is never loaded here.
    """
    for part, value in (index or {}).items():
        if part == "safety_checker":
            continue
        library = value[0] if isinstance(value, list) and value else None
        if part == "_class_name":
            foreign = isinstance(value, list)
        else:
            foreign = not part.startswith("_") and library not in (None, "diffusers", "transformers", "unidad")
        if foreign:
            raise ModelError(f"'{folder}' wants its own code to be run for '{part}'. That is refused; use a stock pipeline.")
    if index is not None and "unet" not in index:
        raise ModelError(f"'{folder}' is a {index.get('_class_name', 'pipeline')} without a unet; a UNet2DModel is needed.")


def _load_unet(folder: Path, weights: bool) -> UNet2DModel:
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ModelError(f"'{folder}' holds a {kind}; a UNet2DModel (pixel space) is needed here.")
    _refuse_unsupported(folder, config)
    if not weights:
        with torch.device("meta"):
            return UNet2DModel.from_config(config)
    return load_network(UNet2DModel, folder)


def load_network(kind: Any, folder: Path, weights: str = WEIGHTS) -> Any:
    """A diffusers or transformers network of class `kind` in float32, with exactly the weights its configuration asks for.

    Raises:
        ModelError: if the weights are missing, pickled, damaged, or do not fit.
    """
    if not (folder / weights).exists():
        pickled = any(folder.glob("*.bin"))
        why = "it has pickled weights only; save it again with safe_serialization=True" if pickled else "the file is missing"
        raise ModelError(f"'{folder / weights}' is needed, but {why}.")
    try:
        network, report = kind.from_pretrained(
            str(folder),
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"The weights in '{folder}' do not fit or are damaged: {reason}") from None
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            some = sorted(str(key) for key in report[fault])
            raise ModelError(f"The weights in '{folder}' do not fit: {len(some)} {fault.replace('_', ' ')}, such as {some[0]}.")
    return network


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    size, channels = config.get("sample_size"), config.get("in_channels", 3)
    outputs = config.get("out_channels", 3)
    square = isinstance(size, int) or (isinstance(size, list) and len(size) == 2 and size[0] == size[1])
    wrong = None
    if not square:
        wrong = f"sample_size {size} (one side of a square is needed)"
    elif channels != 3 or outputs not in (3, 6):
        wrong = f"{channels} channels in and {outputs} out (3 in, and 3 or with learned sigma 6 out, are needed)"
    elif config.get("class_embed_type") is not None:
        wrong = f"class_embed_type '{config['class_embed_type']}' (plain class numbers are needed)"
    elif config.get("mid_block_type", "UNetMidBlock2D") is None:
        wrong = "no mid block (the discriminator needs one)"
    if wrong:
        raise ModelError(f"'{folder}' cannot be used: it has {wrong}.")


def load_scheduler(folder: Path) -> tuple[dict[str, Any], NoiseSchedule]:
    """The settings of a diffusers scheduler that say what the noise schedule is, and that schedule.

    Raises:
        ModelError: if it cannot be read or used.
    """
    config = read_json(folder / "scheduler_config.json")
    defaults = dict(DDPMScheduler().config)
    found = {key: config.get(key, defaults[key]) for key in SCHEDULE_KEYS}
    if found["trained_betas"] is None and found["beta_schedule"] in ("sigmoid", "laplace"):
        # Only DDPMScheduler knows these by name; as plain numbers every scheduler takes them.
        found |= {"trained_betas": DDPMScheduler.from_config(found).betas.tolist(), "beta_schedule": "linear"}
    try:
        schedule = NoiseSchedule(DDPMScheduler.from_config(found).alphas_cumprod)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(f"The noise schedule in '{folder}' cannot be used: {error}.") from None
    if found["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"'{folder}' names prediction type '{found['prediction_type']}', which is not known here.")
    return found, schedule
