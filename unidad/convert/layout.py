"""Where each weight of a guided-diffusion U-Net goes in diffusers' `UNet2DModel`: names, shapes and the order of q, k and v.

Tensors in, tensors out; files are `guided_diffusion.py`'s. The facts are those of ADM (arXiv 2105.05233): group norm, SiLU,
convolution twice in a residual block, the timestep between them; q, k and v from one 1x1 convolution.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from unidad.architectures import ADM_GROUPS, Architecture
from unidad.errors import ModelError

ATTENTION_ORDERS: tuple[str, ...] = ("legacy", "new")
# One weight of theirs and where it goes: one name, or three for q, k, v.
Pair = tuple[str, tuple[str, ...]]
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
FIRST, EMBED, MIDDLE, LAST = "input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.1.qkv.weight", "out.2.weight"
UPSAMPLER = re.compile(r"output_blocks\.(\d+)\.[1-9]\.(in_layers\.0|conv)\.weight")


def infer(weights: Mapping[str, Tensor], size: int, head_width: int) -> Architecture:
    """The shape of the network that these weights are of.

    Args:
        weights: by guided-diffusion's names.
        size: side of its pictures. head_width: channels of an attention head. Neither shows in the weights.

    Raises:
        ModelError: no guided-diffusion U-Net, or one that `UNet2DModel` cannot express; says which part.
    """
    for name in (FIRST, EMBED, MIDDLE, LAST):
        if name not in weights:
            raise ModelError(f"it is not a whole guided-diffusion U-Net: it has no '{name}'.")
    inner = len({key.split(".")[1] for key in weights if key.startswith("output_blocks.")})
    ups = {int(found[1]): found[2] for key in weights if (found := UPSAMPLER.fullmatch(key))}
    levels = len(ups) + 1
    blocks = (min(ups) if ups else inner - 1) if inner else 0
    if blocks < 1 or inner != levels * (blocks + 1):
        raise ModelError(f"it has {inner} output blocks for {levels} resolutions, which is no U-Net that can be used here.")
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    firsts = [f"input_blocks.{i}.0.in_layers.2.weight" for i in starts]
    if missing := [name for name in firsts if name not in weights]:
        raise ModelError(f"it is not a whole guided-diffusion U-Net: it has no '{missing[0]}'.")
    widths = tuple(len(weights[name]) for name in firsts)
    time = weights.get(f"input_blocks.{starts[0]}.0.emb_layers.1.weight", weights[FIRST])
    shape = Architecture(
        about="",
        size=size,
        widths=widths,
        attends=tuple(f"input_blocks.{i}.1.qkv.weight" in weights for i in starts),
        head_width=head_width,
        blocks=blocks,
        residual="conv" not in ups.values(),
        scale_shift=len(time) == 2 * widths[0],
        learned_sigma=len(weights[LAST]) == 6,
        classes=len(weights["label_emb.weight"]) if "label_emb.weight" in weights else None,
    )
    _refuse_inexpressible(weights, shape)
    return shape


def _refuse_inexpressible(weights: Mapping[str, Tensor], shape: Architecture) -> None:
    channels, outputs, time = weights[FIRST].shape[1], len(weights[LAST]), weights[EMBED].shape[-1]
    attended = [w for w, attends in zip(shape.widths, shape.attends, strict=True) if attends] + [shape.widths[-1]]
    side = 2 ** (len(shape.widths) - 1)
    wrong = None
    if channels != 3 or outputs not in (3, 6):
        wrong = (
            f"it has {channels} channels in and {outputs} out (3 in, and 3 or 6 out, are needed; a super-resolution model has 6 in)"
        )
    elif time != shape.widths[0]:
        wrong = (
            f"its timestep embedding has {time} channels and its first level {shape.widths[0]}; UNet2DModel has one number for both"
        )
    elif any(w % ADM_GROUPS for w in shape.widths):
        wrong = f"its widths {list(shape.widths)} are not multiples of {ADM_GROUPS}"
    elif any(w % shape.head_width for w in attended):
        wrong = f"a head width of {shape.head_width} does not divide its attention widths {sorted(set(attended))}; give another --head-width"
    elif shape.size % side or shape.size < 2 * side:
        wrong = f"it halves pictures {len(shape.widths) - 1} times, which a side of {shape.size} does not bear; give another --size"
    if wrong:
        raise ModelError(f"{wrong}.")


def pairs(shape: Architecture, ours: Collection[str]) -> list[Pair]:
    """Every weight of a network of that shape: guided-diffusion's name and that of `UNet2DModel`, or three for q, k, v.

    Args:
        ours: the names that `UNet2DModel` has; a residual block has a shortcut where they say so.
    """
    found: list[Pair] = []
    for kind, theirs, mine in _modules(shape):
        inner = RESIDUAL if kind == "residual" else {"": ""}
        if kind == "attention":
            inner = {"norm": "group_norm", "proj_out": "to_out.0"}
            qkv = [tuple(f"{mine}.to_{p}.{end}" for p in "qkv") for end in ("weight", "bias")]
            found += [(f"{theirs}.qkv.weight", qkv[0]), (f"{theirs}.qkv.bias", qkv[1])]
        for part, name in inner.items():
            for end in ("weight", "bias"):
                full = ".".join(p for p in (mine, name, end) if p)
                if full in ours:
                    found.append((".".join(p for p in (theirs, part, end) if p), (full,)))
    return found


def _modules(shape: Architecture) -> Iterator[tuple[str, str, str]]:
    """(plain, residual or attention; guided-diffusion's name; diffusers' name) of every module, in guided-diffusion's order."""
    n, last = shape.blocks, len(shape.widths) - 1
    yield from [("plain", "time_embed.0", "time_embedding.linear_1"), ("plain", "time_embed.2", "time_embedding.linear_2")]
    yield from [("plain", "label_emb", "class_embedding"), ("plain", "input_blocks.0.0", "conv_in")]
    for level, attends in enumerate(shape.attends):
        for i in range(n):
            yield from _block(f"input_blocks.{1 + level * (n + 1) + i}", f"down_blocks.{level}", i, attends)
        theirs, mine = f"input_blocks.{(level + 1) * (n + 1)}.0", f"down_blocks.{level}.downsamplers.0"
        if level < last:
            yield ("residual", theirs, mine) if shape.residual else ("plain", f"{theirs}.op", f"{mine}.conv")
    yield from [("residual", "middle_block.0", "mid_block.resnets.0"), ("attention", "middle_block.1", "mid_block.attentions.0")]
    yield "residual", "middle_block.2", "mid_block.resnets.1"
    for up, attends in enumerate(reversed(shape.attends)):
        for i in range(n + 1):
            yield from _block(f"output_blocks.{up * (n + 1) + i}", f"up_blocks.{up}", i, attends)
        theirs, mine = f"output_blocks.{up * (n + 1) + n}.{1 + attends}", f"up_blocks.{up}.upsamplers.0"
        if up < last:
            yield ("residual", theirs, mine) if shape.residual else ("plain", f"{theirs}.conv", f"{mine}.conv")
    yield from [("plain", "out.0", "conv_norm_out"), ("plain", "out.2", "conv_out")]


def _block(theirs: str, mine: str, i: int, attends: bool) -> Iterator[tuple[str, str, str]]:
    yield "residual", f"{theirs}.0", f"{mine}.resnets.{i}"
    if attends:
        yield "attention", f"{theirs}.1", f"{mine}.attentions.{i}"


def split_qkv(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [C, ...], from [3C, ...]: "legacy" has q, k, v within each head, "new" the heads within each of q, k, v."""
    if order == "new":
        q, k, v = qkv.chunk(3)
    else:
        q, k, v = qkv.unflatten(0, (heads, 3, -1)).unbind(1)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return q.contiguous().clone(), k.contiguous().clone(), v.contiguous().clone()


def join_qkv(qkv: Sequence[Tensor], heads: int, order: str) -> Tensor:
    """Inverse of `split_qkv`."""
    if order == "new":
        return torch.cat(list(qkv))
    return torch.stack([part.unflatten(0, (heads, -1)) for part in qkv], dim=1).flatten(0, 2)


def to_unet(weights: Mapping[str, Tensor], shape: Architecture, order: str) -> UNet2DModel:
    """The same network for diffusers, float32; every weight is used exactly once.

    Raises:
        ModelError: a weight is missing, of another shape, or has no place.
    """
    with torch.device("meta"):
        unet = UNet2DModel(**shape.unet_config())
    wanted = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    found: dict[str, Tensor] = {}
    left = set(weights)
    for theirs, names in pairs(shape, wanted):
        if theirs not in weights:
            raise ModelError(f"it is not a whole guided-diffusion U-Net: it has no '{theirs}'.")
        left.remove(theirs)
        tensor = weights[theirs].float()
        if _is_attention(theirs) and tensor.ndim == 3:
            tensor = tensor.squeeze(-1)  # a 1x1 convolution along the pixels
        expected = torch.Size((len(names) * wanted[names[0]][0], *wanted[names[0]][1:]))
        if tensor.shape != expected:
            raise ModelError(f"its '{theirs}' is {list(tensor.shape)}, where {list(expected)} is needed.")
        heads = wanted[names[0]][0] // shape.head_width
        found |= dict(zip(names, split_qkv(tensor, heads, order) if len(names) == 3 else (tensor,), strict=True))
    if left:
        raise ModelError(f"{len(left)} of its weights have no place in a UNet2DModel, such as '{min(left)}'.")
    unet.load_state_dict(found, strict=True, assign=True)
    return unet.eval()


def from_unet(unet: UNet2DModel, order: str) -> dict[str, Tensor]:
    """The weights of a network of ADM's kind by guided-diffusion's names; the inverse of `to_unet`.

    Raises:
        ModelError: a setting that guided-diffusion's network does not have; says which.
    """
    shape = _shape_of(unet)
    ours = unet.state_dict()
    found = {}
    for theirs, names in pairs(shape, ours):
        parts = [ours[name].float().contiguous().clone() for name in names]
        tensor = parts[0] if len(parts) == 1 else join_qkv(parts, len(parts[0]) // shape.head_width, order)
        one_by_one = _is_attention(theirs) and tensor.ndim == 2
        found[theirs] = tensor.unsqueeze(-1) if one_by_one else tensor
    return found


def _is_attention(name: str) -> bool:
    return ".qkv." in name or ".proj_out." in name


def _shape_of(unet: UNet2DModel) -> Architecture:
    config = unet.config
    size, head = config.sample_size, config.attention_head_dim
    if not isinstance(size, int) or not isinstance(head, int):
        raise ModelError(f"its sample_size {size} and attention_head_dim {head} are not single numbers.")
    shape = Architecture(
        about="",
        size=size,
        widths=tuple(config.block_out_channels),
        attends=tuple(kind == "AttnDownBlock2D" for kind in config.down_block_types),
        head_width=head,
        blocks=config.layers_per_block,
        residual=config.downsample_type == "resnet",
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        learned_sigma=config.out_channels == 6,
        classes=config.num_class_embeds,
    )
    _refuse_other_settings(config, shape)
    return shape


def _refuse_other_settings(config: Mapping[str, Any], shape: Architecture) -> None:
    ignored = {"self", "dropout"}
    ignored |= set() if shape.scale_shift else {"attn_norm_num_groups"}  # without scale_shift it falls back to norm_num_groups
    wanted = {name: p.default for name, p in inspect.signature(UNet2DModel.__init__).parameters.items()} | shape.unet_config()
    for name, value in wanted.items():
        here = config.get(name, value)
        if name not in ignored and (tuple(here) if isinstance(here, list) else here) != value:
            raise ModelError(f"its {name} is {here}, which guided-diffusion's network does not have ({value}).")
