"""Where each weight of Stable Diffusion 1.x, 2.x and XL in diffusers' layout goes in the original one (LDM, arXiv 2112.10752; OpenCLIP).

Tensors in, tensors out; files are `single_file.py`'s. The original counts a U-Net's blocks through (`input_blocks.7.1`) where diffusers
counts levels and layers (`down_blocks.2.attentions.0`), counts a VAE decoder's levels from full resolution, writes the VAE's attention as
1x1 convolutions, and has q, k and v of an OpenCLIP text encoder in one matrix and its projection the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from unidad.backbones.single_file import TEXT, TEXTS_XL, UNET, VAE
from unidad.convert.layout import RESIDUAL
from unidad.errors import ModelError

CLIP, OPEN_CLIP = f"{TEXT}transformer.text_model.", f"{TEXT}model."
_INNER = {ours: theirs for theirs, ours in RESIDUAL.items()}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def to_ldm(unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], open_clip: bool) -> dict[str, Tensor]:
    """The weights of a whole pipeline under their original names; new tensors only where shapes change.

    Args:
        unet, vae, text: state dicts of `UNet2DConditionModel`, `AutoencoderKL` and `CLIPTextModel`, on any device, meta too.
        open_clip: write the text encoder as OpenCLIP's (SD 2.x), else as CLIP's (SD 1.x).

    Raises:
        ModelError: a part that SD 1.x and 2.x have not; names it.
    """
    words = {name.removeprefix("text_model."): value for name, value in text.items()}
    if open_clip:
        told = {OPEN_CLIP + name: value for name, value in _open_clip(words).items()}
    else:
        told = {CLIP + name: value for name, value in words.items()}
    return {UNET + name: value for name, value in _unet(unet).items()} | _vae(vae) | told


def to_ldm_xl(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], text_2: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`to_ldm` for SDXL: `text` is a `CLIPTextModel`'s, `text_2` a `CLIPTextModelWithProjection`'s, written as OpenCLIP's.

    Raises:
        ModelError: a part that SDXL has not; names it.
    """
    first, second = ({name.removeprefix("text_model."): value for name, value in part.items()} for part in (text, text_2))
    projection = second.pop("text_projection.weight", None)
    if projection is None:
        raise ModelError("the second text encoder has no text_projection.")
    told = {f"{TEXTS_XL[0]}text_model.{name}": value for name, value in first.items()}
    told |= {TEXTS_XL[1] + name: value for name, value in _open_clip(second).items()}
    told[f"{TEXTS_XL[1]}text_projection"] = projection.T
    return {UNET + name: value for name, value in _unet(unet).items()} | _vae(vae) | told


def _unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers, attended = block_structure(weights)
    return {unet_name(name, layers, attended): value for name, value in weights.items()}


def block_structure(names: Iterable[str]) -> tuple[int, set[str]]:
    """Layers of a down block and the up blocks with attention, as the names of diffusers' UNet (or of layers in it) tell.

    Raises:
        ValueError: no name is of a layer in a down block.
    """
    names = list(names)
    layers = 1 + max(
        int(found[1]) for name in names if (found := re.match(r"down_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", name))
    )
    return layers, {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}


def unet_name(name: str, layers: int, attended: set[str]) -> str:
    """The original name of a weight of diffusers' UNet with that `block_structure`.

    Raises:
        ModelError: it has none.
    """
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return f"{theirs}.{_residual(name.removeprefix(f'{ours}.'), ours)}"
    found = _BLOCK.fullmatch(name)
    if not found:
        raise ModelError(f"the UNet's '{name}' has no place in the original layout of SD 1.x, 2.x and XL.")
    way, level, kind, layer, rest = found.groups()
    if way == "down":
        first = 1 + int(level) * (layers + 1)
        block, rank = (
            (first + layers, "0.op") if kind == "downsamplers" else (first + int(layer), "0" if kind == "resnets" else "1")
        )
        sided = "input_blocks"
    else:
        first = int(level) * (layers + 1)
        after = "2" if level in attended else "1"
        block, rank = (first + layers, after) if kind == "upsamplers" else (first + int(layer), "0" if kind == "resnets" else "1")
        sided = "output_blocks"
    inner = rest.removeprefix("conv.") if kind == "downsamplers" else _residual(rest, kind)
    return f"{sided}.{block}.{rank}.{inner}"


def _residual(rest: str, kind: str) -> str:
    """A name inside a residual block; anything else is named alike in both layouts."""
    part, _, leaf = rest.rpartition(".")
    return f"{_INNER[part]}.{leaf}" if "resnets" in kind else rest


def _vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up_blocks."))
    found = {}
    for name, value in weights.items():
        theirs = _vae_name(name, levels)
        convolution = ".mid.attn_1." in theirs and not theirs.endswith(("norm.weight", "bias"))
        found[VAE + theirs] = value[:, :, None, None] if convolution else value
    return found


def _vae_name(name: str, levels: int) -> str:
    if block := _VAE_BLOCK.fullmatch(name):
        side, level, kind, layer, rest = block.groups()
        place = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{levels - 1 - int(level)}"
        if kind == "resnets":
            return f"{place}.block.{layer}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{place}.{kind.removesuffix('rs')}.{rest}"
    if middle := _VAE_MIDDLE.fullmatch(name):
        side, kind, layer, rest = middle.groups()
        if kind == "resnets":
            return f"{side}.mid.block_{int(layer) + 1}.{rest}"
        part, _, leaf = rest.rpartition(".")
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[part]}.{leaf}"
    return name.replace("conv_norm_out", "norm_out")


def _open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        layer = _LAYER.fullmatch(name)
        place, rest = (f"transformer.resblocks.{layer[1]}.", layer[2]) if layer else ("", name)
        if rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            continue  # written with q
        if rest.startswith("self_attn.q_proj"):
            leaf = rest.rpartition(".")[2]
            found[f"{place}attn.in_proj_{leaf}"] = torch.cat([weights[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            continue
        ours = next((part for part in _OPEN_CLIP if rest.startswith(part)), None)
        if ours is None:
            raise ModelError(f"the text encoder's '{name}' has no place in OpenCLIP's layout.")
        found[place + _OPEN_CLIP[ours] + rest.removeprefix(ours)] = value
    return found
