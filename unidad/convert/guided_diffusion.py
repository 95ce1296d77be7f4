"""Checkpoints of guided-diffusion (ADM, arXiv 2105.05233; one `.pt` of weights) to diffusers folders and back.

A checkpoint does not say everything: the width of an attention head, the order of q, k and v, the side of the pictures and the noise
schedule come from `KNOWN` or from the person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from unidad.architectures import Architecture
from unidad.backbones.load import STUDENT_FILE, load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.convert.layout import FIRST, from_unet, infer, to_unet
from unidad.errors import CheckpointError, ModelError, SettingsError, did_you_mean
from unidad.export import save_converted

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
NESTS = ("ema", "model", "state_dict")  # averaged weights first, where there are several
TIMESTEPS = 1000
# What torch says, in small letters, of code in a pickle; of functions of `os` and its kind it says "unsupported GLOBAL ... is blocked".
FOREIGN = (
    "unsupported global",
    "unsupported class",
    "unrecognized function",
    "can only create new object",
    "can only build tensor",
)


@dataclass(frozen=True)
class Unsaid:
    """What the weights do not tell.

    Attributes:
        size: side of the pictures. head_width: channels of an attention head.
        schedule: "linear" or "cosine", of 1000 steps.
        attention_order: "legacy" (guided-diffusion's default) or "new" (its `use_new_attention_order`).
    """

    size: int
    head_width: int
    schedule: str
    attention_order: str = "legacy"


@dataclass(frozen=True)
class Known:
    """A published model: what its weights do not tell, and what they must tell."""

    unsaid: Unsaid
    widths: tuple[int, ...]
    attended: tuple[int, ...]  # sides of pictures
    blocks: int = 2
    classes: int | None = None


_256 = (256, 256, 512, 512, 1024, 1024)
KNOWN: dict[str, Known] = {
    "ffhq256": Known(Unsaid(256, 64, "linear"), _256, (32, 16, 8)),
    "lsun256": Known(Unsaid(256, 64, "linear"), _256, (32, 16, 8)),
    "imagenet64": Known(Unsaid(64, 64, "cosine", "new"), (192, 384, 576, 768), (32, 16, 8), blocks=3, classes=1000),
    "imagenet256": Known(Unsaid(256, 64, "linear"), _256, (32, 16, 8), classes=1000),
    "imagenet256-uncond": Known(Unsaid(256, 64, "linear"), _256, (32, 16, 8)),
}
# Published models that UNet2DModel cannot be.
REFUSED = {
    "imagenet128": "it has 4 attention heads at every resolution, so heads of 128, 192 and 256 channels, and a UNet2DModel has one head width"
}


def arch_names() -> list[str]:
    """What `--arch` may be; "auto" leaves the unsaid to be given."""
    return ["auto", *KNOWN, *REFUSED]


def from_guided_diffusion(
    file: str | Path, out: str | Path, arch: str = "auto", unconditional: bool = False, **unsaid: Any
) -> dict[str, Any]:
    """Write a guided-diffusion checkpoint as a DDPMPipeline folder; learned sigma is kept.

    Args:
        file: the `.pt`: weights, plain or under "ema", "model" or "state_dict", with or without a `module.` prefix.
        out: new or empty folder.
        arch: a name of `arch_names`.
        unconditional: refuse a class-conditional network.
        unsaid: the fields of `Unsaid`; None where not given. They win over the named architecture's.

    Returns:
        Facts: "parameters", "under" (where in the file they were), "classes", "size" and the other fields of `Unsaid`.

    Raises:
        ModelError: the file cannot be read safely, is no such network, or is one that UNet2DModel cannot express.
        SettingsError: something that the weights do not tell was not given.
        CheckpointError: `out` holds something or cannot be written.
    """
    path, folder = Path(file), Path(out)
    _refuse_existing(folder)
    rest = _unsaid(arch, unsaid)
    weights, under = read_checkpoint(path)
    try:
        shape = infer(weights, rest.size, rest.head_width)
        if unconditional and shape.classes is not None:
            raise ModelError(f"it is class-conditional ({shape.classes} classes), where an unconditional network was asked for.")
        if arch in KNOWN:
            _refuse_other(shape, arch)
        unet = to_unet(weights, shape, rest.attention_order)
    except ModelError as error:
        raise ModelError(f"'{path}' cannot be converted: {error}") from None
    scheduler = DDPMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule=SCHEDULES[rest.schedule],
        variance_type="learned_range" if shape.learned_sigma else "fixed_large",
    )
    facts = vars(rest) | {"under": under, "classes": shape.classes}
    alone = "" if shape.classes is None else " It is class-conditional, which DDPMPipeline cannot draw from: use `unidad sample`."
    about = f"Converted from the guided-diffusion checkpoint '{path.name}' with unidad.{alone} Its licence is the checkpoint's."
    save_converted(unet, scheduler, folder, {"title": path.stem, "about": about, "guided_diffusion": facts})
    return facts | {"parameters": sum(p.numel() for p in unet.parameters())}


def to_guided_diffusion(folder: str | Path, out: str | Path, attention_order: str | None = None) -> dict[str, Any]:
    """Write a diffusers folder's network as a guided-diffusion checkpoint, its weights alone, float32.

    Args:
        folder: as `load_model` takes it; its network must be of ADM's kind.
        out: new file.
        attention_order: None takes that of the checkpoint it was converted from, else "legacy".

    Returns:
        Facts: "parameters", "attention_order".

    Raises:
        ModelError: the folder cannot be read or its network has something that guided-diffusion's has not.
        CheckpointError: `out` exists or cannot be written.
    """
    path = Path(out)
    if path.exists():
        raise CheckpointError(f"'{path}' exists. Give another --out; nothing was overwritten.")
    model = load_model(folder)
    assert isinstance(model.backbone, UNet2DBackbone)
    order = attention_order or _noted_order(Path(folder) / STUDENT_FILE)
    try:
        weights = from_unet(model.backbone.unet, order)
    except ModelError as error:
        raise ModelError(f"'{folder}' cannot be converted: {error}") from None
    part = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, part)
        part.rename(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        raise CheckpointError(f"'{path}' cannot be written: {error}. Give another file or free some space.") from None
    return {"parameters": sum(w.numel() for w in weights.values()), "attention_order": order}


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights in a `.pt` file by guided-diffusion's names, and the entries they lay under ("" for none).

    Nothing in the file is run: it is read with torch's weights-only reader.

    Raises:
        ModelError: missing, truncated, holding more than tensors, or holding no such network.
    """
    if not path.is_file():
        raise ModelError(f"There is no file '{path}'. Give a guided-diffusion checkpoint (.pt).")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip reader, the pickle reader and the file system have no common base short of this
        raise ModelError(_why_unreadable(path, error)) from None
    found = _find_weights(content)
    if found is None:
        raise ModelError(f"'{path}' holds no guided-diffusion network: there is no '{FIRST}', plain or under {', '.join(NESTS)}.")
    return found


def _why_unreadable(path: Path, error: Exception) -> str:
    if any(words in str(error).lower() for words in FOREIGN):
        return (
            f"'{path}' holds more than weights (code that loading it would run), so it was not loaded. "
            "If you trust where it is from, save its state dict alone."
        )
    return f"'{path}' is truncated, damaged or no torch checkpoint ({type(error).__name__}). Fetch it again."


def _find_weights(content: Any, under: str = "") -> tuple[dict[str, Tensor], str] | None:
    if not isinstance(content, Mapping):
        return None
    bare = {str(key).removeprefix("module."): value for key, value in content.items()}
    if FIRST in bare:
        good = all(isinstance(value, Tensor) and value.is_floating_point() for value in bare.values())
        return (bare, under) if good and len(bare) == len(content) else None
    deeper = (_find_weights(content[nest], f"{under}{nest}.") for nest in NESTS if nest in content)
    return next((found for found in deeper if found is not None), None)


def _unsaid(arch: str, given: Mapping[str, Any]) -> Unsaid:
    if arch in REFUSED:
        raise ModelError(f"'{arch}' cannot be converted: {REFUSED[arch]}.")
    if arch not in arch_names():
        raise SettingsError(f"There is no --arch '{arch}'.{did_you_mean(arch, arch_names())} Known: {', '.join(arch_names())}.")
    values = dict(vars(KNOWN[arch].unsaid)) if arch in KNOWN else {}
    values |= {key: value for key, value in given.items() if value is not None}
    missing = [name for name in ("head_width", "schedule", "size") if name not in values]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise SettingsError(f"The weights do not tell everything: give {flags}, or --arch {'|'.join(KNOWN)}.")
    if min(values["size"], values["head_width"]) < 1:
        raise SettingsError("--size and --head-width must be at least 1.")
    return Unsaid(**values)


def _refuse_other(shape: Architecture, arch: str) -> None:
    known = KNOWN[arch]
    attended = tuple(shape.size // 2**i for i, attends in enumerate(shape.attends) if attends)
    for what, wanted, found in (
        ("widths", known.widths, shape.widths),
        ("attention at sides", known.attended, attended),
        ("residual blocks", known.blocks, shape.blocks),
        ("classes", known.classes or "none", shape.classes or "none"),
    ):
        if wanted != found:
            raise ModelError(f"it is not {arch}: its {what} are {found}, where {wanted} belong. Try another --arch, or auto.")


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"'{folder}' is not an empty folder. Give another --out; nothing there was touched.")


def _noted_order(notes: Path) -> str:
    try:
        return str(json.loads(notes.read_text(encoding="utf-8"))["guided_diffusion"]["attention_order"])
    except (OSError, ValueError, KeyError, TypeError):  # not converted from such a checkpoint
        return "legacy"
