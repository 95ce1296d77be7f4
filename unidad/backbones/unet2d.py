"""diffusers' `UNet2DModel` (pixel space, unconditional or class-conditional) as a Backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from unidad.backbones.base import Backbone, Granularity
from unidad.noise import NoiseSchedule, to_x0


class _EncoderDone(Exception):
    """Leaves a forward pass once the mid block has given its features; the decoder is never run."""


class UNet2DBackbone(Backbone):
    """Wraps a `UNet2DModel`; its extra output channels, if any (learned sigma), are kept but not used.

    Args:
        unet: the network; input and output in the schedule's own frame (x_t = alpha x + sigma eps).
        schedule: the noise schedule it was trained with.
        prediction_type: "epsilon", "v_prediction" or "sample".
    """

    _half = False

    def __init__(self, unet: UNet2DModel, schedule: NoiseSchedule, prediction_type: str):
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction_type = prediction_type
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (unet.config.in_channels, height, width)
        self.num_classes = unet.config.num_class_embeds

    def recompute_activations(self) -> None:
        """Keep only what enters each block for the backward pass, which runs the blocks once more (arXiv 1604.06174)."""
        self.unet.enable_gradient_checkpointing()

    def compile_unet(self) -> None:
        """Run plain predictions through torch.compile; passes that collect features stay eager, as their blocks are hooked."""
        self.unet.compile()

    def hold_in_bf16(self) -> None:
        """Keep the weights in bfloat16, in half the memory, and compute in it; x0-predictions are float32 as before. For frozen networks.

        Raises:
            ValueError: if some of it is being trained.
        """
        if any(p.requires_grad for p in self.parameters()):
            raise ValueError("a network that is trained needs its weights in float32")
        nn.Module.to(self.unet, torch.bfloat16)  # diffusers' own warns of layers to keep in float32, of which these have none
        self._half = True

    def _cast(self, given: Tensor) -> Tensor:
        """A float32 input as the weights are held."""
        return given.to(torch.bfloat16) if self._half else given

    def _raw(self, run: Callable[..., Any], x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What the network puts out, in the number format it computes in."""
        raw: Tensor = run(self._cast(x_t), t, **self._condition(labels), return_dict=False)[0]
        return raw

    def _condition(self, labels: Tensor | None) -> dict[str, Any]:
        return {"class_labels": labels}

    def _to_x0(self, raw: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t, x_t.ndim)
        return to_x0(raw[:, : self.shape[0]].float(), x_t, alpha, sigma, self.prediction_type)

    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x0-prediction, float32; see `Backbone.x0`."""
        return self._to_x0(self._raw(self.unet, x_t, t, labels), x_t, t)

    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        """Encoder and mid-block features alone; see `Backbone.features`."""
        with self._collect(granularity, stop=True) as found:
            try:
                self._raw(self.unet.forward, x_t, t, labels)
            except _EncoderDone:
                return found
        raise RuntimeError("the mid block was never reached")

    def x0_and_features(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage"
    ) -> tuple[Tensor, list[Tensor]]:
        """Prediction and features from one forward; see `Backbone.x0_and_features`."""
        with self._collect(granularity, stop=False) as found:
            raw = self._raw(self.unet.forward, x_t, t, labels)
        return self._to_x0(raw, x_t, t), found

    def feature_channels(self, granularity: Granularity = "stage") -> list[int]:
        """Channels of each feature, from the configuration alone."""
        widths, layers = list(self.unet.config.block_out_channels), self.unet.config.layers_per_block
        if granularity == "stage":
            return [*widths, widths[-1]]
        per_layer = [widths[0]]
        for i, width in enumerate(widths):
            downsampler = [] if i == len(widths) - 1 else [width]
            per_layer += [width] * layers + downsampler
        return [*per_layer, widths[-1]]

    @contextmanager
    def _collect(self, granularity: Granularity, stop: bool) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []

        def keep_tensor(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found.append(output)

        def keep_block(_module: nn.Module, _inputs: object, output: tuple) -> None:
            # A down block returns (its last output, the outputs of each of its layers).
            found.extend([output[0]] if granularity == "stage" else output[1])

        def keep_mid(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found.append(output)
            if stop:
                raise _EncoderDone

        hooks = [block.register_forward_hook(keep_block) for block in self.unet.down_blocks]
        hooks.append(self.unet.mid_block.register_forward_hook(keep_mid))
        if granularity == "layer":
            hooks.append(self.unet.conv_in.register_forward_hook(keep_tensor))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def random_unet(shape: tuple[int, int, int], widths: tuple[int, ...], seed: int, **options: object) -> UNet2DModel:
    """A freshly initialised `UNet2DModel` for pretraining, the same for the same seed.

    Args:
        shape: (channels, height, width).
        widths: channels per resolution, the first at full resolution; attention where the side is 8 and in the mid block.
        options: further `UNet2DModel` settings.
    """
    attention = [shape[1] // 2**i == 8 for i in range(len(widths))]
    settings = {
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": min(32, *widths[1:]),
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], block_out_channels=widths, **settings)
