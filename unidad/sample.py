"""Draws pictures from a student (K steps) or a many-step model (DDIM): same seed, same pictures, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from unidad.backbones.base import Backbone
from unidad.data import to_uint8
from unidad.rollout import ddim, rollout, seeded_noise


def at_once(side: int, most: int = 32, device: torch.device | None = None) -> int:
    """How many pictures of that side to draw together: up to 64 pixels `most`, beyond that as many as have no more pixels in all.

    A network of full width at 256 pixels holds hundreds of megabytes for each picture it draws. On a GPU four times as many: with two
    pictures of 256 pixels it waits for its next operation most of the time.
    """
    most = 4 * most if device is not None and device.type == "cuda" else most
    return max(1, min(most, most * 64**2 // side**2))


@torch.no_grad()
def draw(
    backbone: Backbone,
    n: int,
    seed: int = 0,
    steps: Sequence[int] | None = None,
    ddim_steps: int = 50,
    batch_size: int | None = None,
    label: int | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    bf16: bool = False,
) -> Tensor:
    """Draw n pictures, [n, C, H, W] uint8 on the CPU. Picture i depends on seed + i alone.

    Args:
        backbone: in eval mode, on its device.
        steps: the student's timesteps; None draws with `ddim_steps` of DDIM instead.
        batch_size: drawn together; None: `at_once` of the network's side.
        label: class of every picture, for a class-conditional network.
        decode: what the network draws -> pictures in [-1, 1], where it draws latents.
        bf16: the network computes under bf16 autocast: faster on GPUs, and other pictures by a little.
    """
    device = next(chain(backbone.parameters(), backbone.buffers())).device  # a frozen role has no parameters of its own
    batch_size = batch_size or at_once(backbone.shape[-1])
    done = []
    for start in range(0, n, batch_size):
        seeds = range(seed + start, seed + min(start + batch_size, n))
        noise = seeded_noise(seeds, backbone.shape, device)
        labels = None if label is None else torch.full((len(seeds),), label, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = ddim(backbone, noise(), ddim_steps, labels) if steps is None else rollout(backbone, noise, steps, labels)
        done.append(to_uint8(x if decode is None else decode(x)).cpu())
    return torch.cat(done)
