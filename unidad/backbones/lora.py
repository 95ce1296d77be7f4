"""Roles as adapters: one frozen base network, and for each network of a method a LoRA adapter (arXiv 2106.09685) of its own.

At rest no adapter is active, so that whatever runs outside of a role is the base.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unidad.backbones.base import Granularity
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.errors import SettingsError

# Attention, feed-forward, and the residual blocks' convolutions: a one-step student has to change more than attention.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
)


def _layers(unet: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def only_adapter(layers: list[Any], names: list[str]) -> Iterator[None]:
    """Inside, only the adapters named are active on these layers; afterwards those that were before, however the block ends.

    peft's own `set_adapter` would also switch on gradients of the active adapter, and leave them on another role's.
    """
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = names
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def _as_in_forward(block: nn.Module, *inputs: Any) -> Any:
    """Activation checkpointing of a block; the backward pass comes when no role is active, so it is told which one was."""
    layers = _layers(block)
    names = layers[0]._active_adapter if layers else []

    def run(*again: Any) -> Any:
        with only_adapter(layers, names):
            return block(*again)

    return checkpoint(run, *inputs, use_reentrant=False)


class LoraRole(UNet2DCondBackbone):
    """One role on a base that it shares with others. Its parameters, state and device are its adapter's; the base is not part of it.

    Args:
        base: frozen from now on; it receives the adapter, which draws nothing until it is trained (its second factor is 0).
        role: name of the adapter.
        rank: of the adapter; 0 makes none, and the role is the base itself.
        prompts: the role's table.

    Raises:
        SettingsError: peft is not installed.
    """

    def __init__(self, base: UNet2DCondBackbone, role: str, rank: int, prompts: Tensor):
        if importlib.util.find_spec("peft") is None:
            raise SettingsError("'lora_rank' needs peft. Run: pip install 'unidad[sd]'.")
        super().__init__(base.unet, base.schedule, base.prediction_type, prompts.to(base.prompts))
        del self.unet
        object.__setattr__(self, "unet", base.unet)  # shared: no submodule, so neither trained nor saved with this role
        self.role, self._names = role, [role] if rank else []
        self._layers: list[Any] = []
        self.adapter = nn.ModuleDict(self._add_adapter(rank) if rank else {})
        self.unet.requires_grad_(False)

    def _add_adapter(self, rank: int) -> dict[str, nn.Module]:
        from peft import LoraConfig

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "more than one adapter": that is the point
            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), self.role)
        self._layers = layers = _layers(self.unet)
        for layer in layers:
            layer._active_adapter = []
        return {str(i): nn.ModuleList([layer.lora_A[self.role], layer.lora_B[self.role]]) for i, layer in enumerate(layers)}

    @property
    def _adapted(self) -> list[Any]:
        """The layers that have adapters, the same for all; a role without one may be made before they are there, and looks each time."""
        return self._layers or _layers(self.unet)

    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `Backbone.x0`."""
        with only_adapter(self._adapted, self._names):
            return super().x0(x_t, t, labels)

    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        """See `Backbone.features`."""
        with only_adapter(self._adapted, self._names):
            return super().features(x_t, t, labels, granularity)

    def x0_and_features(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage"
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Backbone.x0_and_features`."""
        with only_adapter(self._adapted, self._names):
            return super().x0_and_features(x_t, t, labels, granularity)

    def recompute_activations(self) -> None:
        """See `UNet2DBackbone.recompute_activations`; for all roles on this base."""
        self.unet.enable_gradient_checkpointing(_as_in_forward)

    def hold_in_bf16(self) -> None:
        """Always refused: the weights are the base's, which every role computes with.

        Raises:
            ValueError: always.
        """
        raise ValueError("a role's weights are the base's, which it shares with networks that are trained")

    def merged(self) -> UNet2DCondBackbone:
        """A plain network on the CPU whose weights have the adapter in them."""
        unet = copy.deepcopy(self.unet).cpu()
        if self._names:
            unet.fuse_lora(adapter_names=self._names)
            unet.unload_lora()
        return UNet2DCondBackbone(unet, self.schedule, self.prediction_type, self.prompts.cpu()).eval()

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's weights under the names that peft and diffusers give them."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.unet, adapter_name=self.role)
