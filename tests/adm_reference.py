"""ADM's forward pass, written from the facts of the architecture on a bare dictionary of weights by guided-diffusion's names.

It shares nothing with `unidad.convert`: it walks the blocks in the order of their numbers and looks at the weights' names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def random_weights(
    widths: tuple[int, ...],
    attends: tuple[bool, ...],
    blocks: int = 1,
    residual: bool = True,
    scale_shift: bool = True,
    outputs: int = 6,
    classes: int | None = None,
    seed: int = 0,
) -> Weights:
    """Every weight, none of them zero or one."""
    made: Weights = {}
    generator = torch.Generator(torch.get_default_device().type.replace("meta", "cpu")).manual_seed(seed)
    time = 4 * widths[0]

    def layer(name: str, *shape: int) -> None:
        made[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        made[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        made[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def res(name: str, ins: int, outs: int) -> None:
        norm(f"{name}.in_layers.0", ins)
        layer(f"{name}.in_layers.2", outs, ins, 3, 3)
        layer(f"{name}.emb_layers.1", (1 + scale_shift) * outs, time)
        norm(f"{name}.out_layers.0", outs)
        layer(f"{name}.out_layers.3", outs, outs, 3, 3)
        if ins != outs:
            layer(f"{name}.skip_connection", outs, ins, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        layer(f"{name}.qkv", 3 * width, width, 1)
        layer(f"{name}.proj_out", width, width, 1)

    layer("time_embed.0", time, widths[0])
    layer("time_embed.2", time, time)
    if classes:
        made["label_emb.weight"] = torch.randn((classes, time), generator=generator)
    layer("input_blocks.0.0", widths[0], 3, 3, 3)
    here, number, skips = widths[0], 1, [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(blocks):
            res(f"input_blocks.{number}.0", here, width)
            if attends[level]:
                attention(f"input_blocks.{number}.1", width)
            here, number = width, number + 1
            skips.append(width)
        if level + 1 < len(widths):
            if residual:
                res(f"input_blocks.{number}.0", width, width)
            else:
                layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            number += 1
            skips.append(width)
    res("middle_block.0", here, here)
    attention("middle_block.1", here)
    res("middle_block.2", here, here)
    number = 0
    for level in reversed(range(len(widths))):
        for i in range(blocks + 1):
            res(f"output_blocks.{number}.0", here + skips.pop(), widths[level])
            here, following = widths[level], 1
            if attends[level]:
                attention(f"output_blocks.{number}.1", here)
                following = 2
            if level and i == blocks:
                if residual:
                    res(f"output_blocks.{number}.{following}", here, here)
                else:
                    layer(f"output_blocks.{number}.{following}.conv", here, here, 3, 3)
            number += 1
    norm("out.0", here)
    layer("out.2", outputs, here, 3, 3)
    return made


def forward(w: Weights, x: Tensor, t: Tensor, head_width: int, order: str = "legacy", labels: Tensor | None = None) -> Tensor:
    """x: [B, 3, H, W], t: [B] -> [B, 3 or 6, H, W]."""
    emb = timestep_features(t, w["time_embed.0.weight"].shape[1])
    emb = F.linear(emb, w["time_embed.0.weight"], w["time_embed.0.bias"])
    emb = F.linear(F.silu(emb), w["time_embed.2.weight"], w["time_embed.2.bias"])
    if labels is not None:
        emb = emb + w["label_emb.weight"][labels]
    numbers = sorted({int(k.split(".")[1]) for k in w if k.startswith("input_blocks.")})
    outer = sorted({int(k.split(".")[1]) for k in w if k.startswith("output_blocks.")})
    n = len(numbers) and next(
        (i for i in outer if any(f"output_blocks.{i}.{j}.{k}.weight" in w for j in (1, 2) for k in ("in_layers.0", "conv"))),
        outer[-1],
    )
    skips = []
    for i in numbers:
        down = i > 0 and i % (n + 1) == 0
        x = _sequence(w, f"input_blocks.{i}", x, emb, head_width, order, "down" if down else None)
        skips.append(x)
    x = _residual(w, "middle_block.0", x, emb)
    x = _attention(w, "middle_block.1", x, head_width, order)
    x = _residual(w, "middle_block.2", x, emb)
    for i in outer:
        x = _sequence(w, f"output_blocks.{i}", torch.cat([x, skips.pop()], 1), emb, head_width, order, None)
    x = F.silu(F.group_norm(x, 32, w["out.0.weight"], w["out.0.bias"], 1e-5))
    return F.conv2d(x, w["out.2.weight"], w["out.2.bias"], padding=1)


def timestep_features(t: Tensor, width: int) -> Tensor:
    half = width // 2
    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angle.cos(), angle.sin()], 1)


def _sequence(w: Weights, name: str, x: Tensor, emb: Tensor, head_width: int, order: str, resample: str | None) -> Tensor:
    for j in range(3):
        part = f"{name}.{j}"
        if f"{part}.in_layers.0.weight" in w:
            x = _residual(w, part, x, emb, "up" if j else resample)
        elif f"{part}.qkv.weight" in w:
            x = _attention(w, part, x, head_width, order)
        elif f"{part}.op.weight" in w:
            x = F.conv2d(x, w[f"{part}.op.weight"], w[f"{part}.op.bias"], stride=2, padding=1)
        elif f"{part}.conv.weight" in w:
            x = F.conv2d(_double(x), w[f"{part}.conv.weight"], w[f"{part}.conv.bias"], padding=1)
        elif f"{part}.weight" in w:
            x = F.conv2d(x, w[f"{part}.weight"], w[f"{part}.bias"], padding=1)
    return x


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _halve(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _residual(w: Weights, name: str, x: Tensor, emb: Tensor, resample: str | None = None) -> Tensor:
    """Norm, SiLU, then the resampling of both paths, then the convolution."""
    change = {"up": _double, "down": _halve, None: lambda y: y}[resample]
    h = F.silu(F.group_norm(x, 32, w[f"{name}.in_layers.0.weight"], w[f"{name}.in_layers.0.bias"], 1e-5))
    h, x = change(h), change(x)
    h = F.conv2d(h, w[f"{name}.in_layers.2.weight"], w[f"{name}.in_layers.2.bias"], padding=1)
    e = F.linear(F.silu(emb), w[f"{name}.emb_layers.1.weight"], w[f"{name}.emb_layers.1.bias"])[:, :, None, None]
    norm = (w[f"{name}.out_layers.0.weight"], w[f"{name}.out_layers.0.bias"], 1e-5)
    if e.shape[1] == 2 * h.shape[1]:
        scale, shift = e.chunk(2, 1)
        h = F.group_norm(h, 32, *norm) * (1 + scale) + shift
    else:
        h = F.group_norm(h + e, 32, *norm)
    h = F.conv2d(F.silu(h), w[f"{name}.out_layers.3.weight"], w[f"{name}.out_layers.3.bias"], padding=1)
    if f"{name}.skip_connection.weight" in w:
        x = F.conv2d(x, w[f"{name}.skip_connection.weight"], w[f"{name}.skip_connection.bias"])
    return x + h


def _attention(w: Weights, name: str, x: Tensor, head_width: int, order: str) -> Tensor:
    b, c, *side = x.shape
    heads = c // head_width
    h = F.group_norm(x, 32, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], 1e-5).flatten(2)
    qkv = F.conv1d(h, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
    if order == "legacy":  # head by head: its q, its k, its v
        q, k, v = qkv.view(b * heads, 3 * head_width, -1).split(head_width, 1)
    else:  # all q, all k, all v, each head by head
        q, k, v = (part.reshape(b * heads, head_width, -1) for part in qkv.chunk(3, 1))
    weight = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(head_width)).softmax(-1)
    h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
    return x + F.conv1d(h, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"]).view(b, c, *side)
