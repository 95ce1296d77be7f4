"""LoRAs of Stable Diffusion 1.x and 2.x UNets between diffusers' names and those of kohya's sd-scripts, which ComfyUI reads too.

kohya's name of a layer is its path in diffusers' UNet with underscores for dots; beside its two factors stands alpha, and the layer adds
alpha / rank times their product. diffusers' file has no alpha: its layers add the product itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unidad.backbones.single_file import family, read_shapes
from unidad.convert.single_file import write_weights
from unidad.errors import CheckpointError, ModelError, SettingsError

FORMATS = ("kohya", "diffusers")
KOHYA, DIFFUSERS = "lora_unet_", "unet."
IN_RUN = Path("lora") / "pytorch_lora_weights.safetensors"
# Every word of a path in the UNet of SD 1.x and 2.x that adapters are put on; those with an underscore tell how to read a joined name.
WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "transformer_blocks"),
    *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "ff", "net", "proj"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "conv", "time_embedding", "linear_1", "linear_2"),
)
_WORD = "|".join([*sorted(WORDS, key=len, reverse=True), r"\d+"])
_JOINED = re.compile(f"(?:{_WORD})(?:_(?:{_WORD}))*")
_KOHYA_KEY = re.compile(r"(lora_unet_[^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_DIFFUSERS_KEY = re.compile(r"unet\.(.+)\.(lora_A|lora_B)\.weight")
_FACTOR = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}


def convert_lora(file: str | Path, out: str | Path, to: str) -> dict[str, Any]:
    """Write a LoRA file under the names of the other format.

    Args:
        file: `.safetensors` of either format, or a run with LoRA roles. out: new `.safetensors` file. to: one of `FORMATS`.

    Returns:
        Facts: "layers", "rank" (the largest), "folded" (layers whose alpha, other than their rank, went into their second factor).

    Raises:
        ModelError: the file is damaged, or holds something besides a LoRA of an SD 1.x or 2.x UNet; names it.
        SettingsError: it has that format already.
        CheckpointError: `out` exists or cannot be written.
    """
    path, target = Path(file), Path(out)
    path = path / IN_RUN if path.is_dir() else path
    if target.exists():
        raise CheckpointError(f"'{target}' exists. Give another --out; nothing was overwritten.")
    if target.suffix != ".safetensors":
        raise CheckpointError(f"--out '{target}' should end in .safetensors.")
    found = read_shapes(path)
    if (kind := family(found)) != "a LoRA":
        raise ModelError(f"'{path}' looks like {kind}; a LoRA of an SD 1.x or 2.x UNet is needed here.")
    held = "kohya" if any(name.startswith("lora_") for name in found) else "diffusers"
    if held == to:
        raise SettingsError(f"'{path}' has {to}'s names already.")
    weights = _read(path)
    try:
        named = to_kohya(weights) if to == "kohya" else to_diffusers(weights)
    except ModelError as error:
        raise ModelError(f"'{path}' cannot be converted: {error}") from None
    write_weights(target, named)
    downs = {key: value for key, value in named.items() if key.endswith((".lora_down.weight", ".lora_A.weight"))}
    folded = sum(_alpha(weights, key) != len(value) for key, value in weights.items() if key.endswith(".lora_down.weight"))
    return {"layers": len(downs), "rank": max(len(value) for value in downs.values()), "folded": folded}


def to_kohya(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' `unet.PATH.lora_A.weight`, `lora_B` -> kohya's names, the same tensors, alpha = rank.

    Raises:
        ModelError: a name that is not of this kind, or a layer with half of its factors.
    """
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        found = _DIFFUSERS_KEY.fullmatch(key)
        if not found or _path(joined := found[1].replace(".", "_")) != found[1]:
            raise ModelError(f"'{key}' is no LoRA weight of an SD 1.x or 2.x UNet under diffusers' name.")
        named[f"{KOHYA}{joined}.{_FACTOR[found[2]]}"] = value
        if found[2] == "lora_A":
            named[f"{KOHYA}{joined}.alpha"] = torch.tensor(float(len(value)), dtype=value.dtype)
    _refuse_halves(named)
    return named


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's names -> diffusers'; the same tensors where alpha is the rank, else alpha / rank goes into the second factor.

    Raises:
        ModelError: a name that is not of this kind, a layer with half of its factors, or one that cannot be placed.
    """
    for key in weights:
        if not _KOHYA_KEY.fullmatch(key):
            part = (
                "the text encoder's part of a LoRA; the UNet's alone is converted"
                if key.startswith("lora_te")
                else "not known here"
            )
            raise ModelError(f"'{key}' is {part}.")
    _refuse_halves(weights)
    named: dict[str, Tensor] = {}
    for key, down in weights.items():
        if not key.endswith(".lora_down.weight"):
            continue
        name, up = key.removesuffix(".lora_down.weight"), weights[key.replace("lora_down", "lora_up")]
        path, scale = _path(name.removeprefix(KOHYA)), _alpha(weights, key) / len(down)
        if path is None:
            raise ModelError(f"'{name}' is no layer of an SD 1.x or 2.x UNet as kohya names them (SDXL's have other names).")
        named[f"{DIFFUSERS}{path}.lora_A.weight"] = down
        named[f"{DIFFUSERS}{path}.lora_B.weight"] = up if scale == 1 else up * scale
    return named


def _path(joined: str) -> str | None:
    """`down_blocks_0_..._to_q` -> `down_blocks.0....to_q`, or None where it has a word that is not of these UNets."""
    return ".".join(re.findall(_WORD, joined)) if _JOINED.fullmatch(joined) else None


def _alpha(weights: Mapping[str, Tensor], down: str) -> float:
    """Of the layer whose first factor this is; a file without alpha means its rank."""
    alpha = weights.get(down.replace("lora_down.weight", "alpha"))
    return float(len(weights[down]) if alpha is None else alpha)


def _refuse_halves(named: Mapping[str, Tensor]) -> None:
    layers = {key.split(".")[0] for key in named}
    for layer in sorted(layers):
        for factor in _FACTOR.values():
            if f"{layer}.{factor}" not in named:
                raise ModelError(f"'{layer}' has no {factor.removesuffix('.weight')}.")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors, in a fixed order, of a file whose metadata ask for no other rule than alpha = rank."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            weights = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}.") from None
    if "lora_adapter_metadata" in metadata:
        _refuse_other_rules(path, metadata["lora_adapter_metadata"])
    return weights


def _refuse_other_rules(path: Path, metadata: str) -> None:
    try:
        told = {key.rpartition(".")[2]: value for key, value in json.loads(metadata).items()}
    except (ValueError, AttributeError) as error:
        raise ModelError(f"The metadata of '{path}' cannot be read: {error}.") from None
    other = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if told.get(key)]
    if told.get("lora_alpha") != told.get("r"):
        other.append(f"lora_alpha {told.get('lora_alpha')} at rank {told.get('r')}")
    if other:
        raise ModelError(
            f"'{path}' scales its layers by {', '.join(other)}; only LoRAs whose alpha is their rank are converted from there."
        )
