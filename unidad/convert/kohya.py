"""LoRAs of Stable Diffusion 1.x, 2.x and XL between diffusers' names and those of kohya's sd-scripts, which ComfyUI reads too.

kohya's name of a layer is its path with underscores for dots: in diffusers' UNet for SD 1.x and 2.x, in the original one for SDXL (other
programs write diffusers' for SDXL too, and both are read). Beside a layer's two factors stands alpha, and the layer adds alpha / rank
times their product. diffusers' file has no alpha: its layers add the product itself.
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
from unidad.convert.layout import RESIDUAL
from unidad.convert.ldm import UNET_ENDS, block_structure, unet_name
from unidad.convert.single_file import write_weights
from unidad.errors import CheckpointError, ModelError, SettingsError

FORMATS = ("kohya", "diffusers")
# A network by diffusers' name and by kohya's; where SDXL has another, it comes second.
NETWORKS = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
SDXL_WIDTH = 2048  # of the prompts that an SDXL UNet attends to
SDXL_LAYERS = 2  # of a block
IN_RUN = Path("lora") / "pytorch_lora_weights.safetensors"
# Every word of a path to a layer that adapters are put on; those with an underscore tell how to read a joined name.
WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "transformer_blocks"),
    *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "ff", "net", "proj"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "conv", "time_embedding", "linear_1", "linear_2"),
    *(
        "add_embedding",
        "text_model",
        "encoder",
        "layers",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp",
        "fc1",
        "fc2",
    ),
    "text_projection",
)
_WORD = "|".join([*sorted(WORDS, key=len, reverse=True), r"\d+"])
_JOINED = re.compile(f"(?:{_WORD})(?:_(?:{_WORD}))*")
_KOHYA_KEY = re.compile(r"((?:lora_unet|lora_te[12]?)_)([^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_DIFFUSERS_KEY = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(.+)\.(lora_A|lora_B|lora_linear_layer\.down|lora_linear_layer\.up)\.weight"
)
_DOWN, _UP = "lora_down.weight", "lora_up.weight"
_FACTOR = {"lora_A": _DOWN, "lora_B": _UP, "lora_linear_layer.down": _DOWN, "lora_linear_layer.up": _UP}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_(.+)")
_RESIDUAL = {theirs.replace(".", "_"): ours for theirs, ours in RESIDUAL.items()}


def convert_lora(file: str | Path, out: str | Path, to: str) -> dict[str, Any]:
    """Write a LoRA file under the names of the other format.

    Args:
        file: `.safetensors` of either format, or a run with LoRA roles. out: new `.safetensors` file. to: one of `FORMATS`.

    Returns:
        Facts: "layers", "rank" (the largest), "folded" (layers whose alpha, other than their rank, went into their second factor).

    Raises:
        ModelError: the file is damaged, or holds something besides a LoRA of these families; names it.
        SettingsError: it has that format already.
        CheckpointError: `out` exists or cannot be written.
    """
    path, target = Path(file), Path(out)
    if path.is_dir():
        path = path / IN_RUN
        if not path.exists():
            raise ModelError(f"'{file}' has no {IN_RUN}: it is not a run with LoRA roles (lora_rank=). Give such a run, or a file.")
    if target.exists():
        raise CheckpointError(f"'{target}' exists. Give another --out; nothing was overwritten.")
    if target.suffix != ".safetensors":
        raise CheckpointError(f"--out '{target}' should end in .safetensors.")
    found = read_shapes(path)
    if (kind := family(found)) != "a LoRA":
        raise ModelError(f"'{path}' looks like {kind}; a LoRA of SD 1.x, 2.x or XL is needed here.")
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
    """diffusers' `unet.PATH.lora_A.weight`, `lora_B`, and the text encoders' -> kohya's names, the same tensors, alpha = rank.

    Raises:
        ModelError: a name that is not of this kind, or a layer with half of its factors.
    """
    layers = {key: found.groups() for key in weights if (found := _DIFFUSERS_KEY.fullmatch(key))}
    xl = _is_sdxl(weights)
    paths = [path for network, path, _ in layers.values() if network == "unet"]
    structure = block_structure(paths) if xl and paths else None
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        network, path, factor = layers.get(key, ("", "", ""))
        joined = path.replace(".", "_")
        if not network or _path(joined) != path:
            raise ModelError(f"'{key}' is no LoRA weight of SD 1.x, 2.x or XL under diffusers' name.")
        if network != "unet":
            joined = f"text_model_{joined.removeprefix('text_model_')}" if path != "text_projection" else joined
        elif structure:
            joined = unet_name(f"{path}.weight", *structure).removesuffix(".weight").replace(".", "_")
        layer = NETWORKS[network][-1 if xl else 0] + joined
        named[f"{layer}.{_FACTOR[factor]}"] = value
        if _FACTOR[factor] == _DOWN:
            named[f"{layer}.alpha"] = torch.tensor(float(len(value)), dtype=value.dtype)
    _refuse_halves(named)
    return named


def _is_sdxl(weights: Mapping[str, Tensor]) -> bool:
    """Only SDXL has two text encoders, and attention blocks of several transformer blocks over prompts of that width."""
    deep = re.compile(r"unet\..*\.transformer_blocks\.[1-9]\d*\..*|text_encoder_2\..*")
    wide = (value for key, value in weights.items() if key.endswith("attn2.to_k.lora_A.weight"))
    return any(deep.fullmatch(key) for key in weights) or any(value.shape[-1] == SDXL_WIDTH for value in wide)


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's names -> diffusers'; the same tensors where alpha is the rank, else alpha / rank goes into the second factor.

    Raises:
        ModelError: a name that is not of this kind, a layer with half of its factors, or one that cannot be placed.
    """
    if odd := [key for key in weights if not _KOHYA_KEY.fullmatch(key)]:
        raise ModelError(f"'{odd[0]}' is not known here.")
    _refuse_halves(weights)
    halving = [int(found[1]) for key in weights if (found := re.match(r"lora_unet_input_blocks_(\d+)_0_op\.", key))]
    per_block = min(halving) - 1 if halving else SDXL_LAYERS
    named: dict[str, Tensor] = {}
    for key, down in weights.items():
        found = _KOHYA_KEY.fullmatch(key)
        assert found
        if found[3] != _DOWN:
            continue
        network = next(ours for ours, theirs in NETWORKS.items() if found[1] in theirs)
        up, scale = weights[key.replace("lora_down", "lora_up")], _alpha(weights, key) / len(down)
        path = _path(found[2]) or (_original_path(found[2], per_block) if network == "unet" else None)
        if path is None:
            raise ModelError(f"'{found[1]}{found[2]}' is no layer of SD 1.x, 2.x or XL as kohya names them.")
        named[f"{network}.{path}.lora_A.weight"] = down
        named[f"{network}.{path}.lora_B.weight"] = up if scale == 1 else up * scale
    return named


def _path(joined: str) -> str | None:
    """`down_blocks_0_..._to_q` -> `down_blocks.0....to_q`, or None where it has a word that is not of these networks."""
    return ".".join(re.findall(_WORD, joined)) if _JOINED.fullmatch(joined) else None


def _original_path(joined: str, per_block: int) -> str | None:
    """A path in the original UNet, joined, as one in diffusers'; `ldm.unet_name` the other way round. None where it is none.

    Args:
        per_block: residual layers of a down block.
    """
    for ours, theirs in UNET_ENDS.items():
        start = theirs.replace(".", "_")
        if joined == start:
            return ours
        if joined.startswith(f"{start}_"):
            rest = joined.removeprefix(f"{start}_")
            inner = _RESIDUAL.get(rest) if "resnets" in ours else _path(rest)
            return f"{ours}.{inner}" if inner else None
    found = _BLOCK.fullmatch(joined)
    if not found:
        return None
    down, rank, rest = found[1] == "input", found[3], found[4]
    level, layer = divmod(int(found[2]) - down, per_block + 1)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if rest == ("op" if down else "conv"):
        return f"{block}.{'down' if down else 'up'}samplers.0.conv"
    kind, inner = ("resnets", _RESIDUAL.get(rest)) if rank == "0" else ("attentions", _path(rest))
    return f"{block}.{kind}.{layer}.{inner}" if inner else None


def _alpha(weights: Mapping[str, Tensor], down: str) -> float:
    """Of the layer whose first factor this is; a file without alpha means its rank."""
    alpha = weights.get(down.replace("lora_down.weight", "alpha"))
    return float(len(weights[down]) if alpha is None else alpha)


def _refuse_halves(named: Mapping[str, Tensor]) -> None:
    layers = {key.split(".")[0] for key in named}
    for layer in sorted(layers):
        for factor in (_DOWN, _UP):
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
