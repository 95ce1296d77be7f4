"""diffusers' `UNet2DConditionModel` (Stable Diffusion 1.x, 2.x and XL: latents under a prompt) as a Backbone.

The network holds the few encoded prompts that a run needs as a table, so that to the rest of the library it is class-conditional: a
label is a row. Each role in a method can hold a table of its own: the source teacher's says "a cat" where the others say "a prt cat".
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from unidad.backbones.unet2d import UNet2DBackbone
from unidad.noise import NoiseSchedule

TIME_IDS = 6  # SDXL's size conditions: original height and width, top and left of the crop, target height and width


def with_added(embeddings: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
    """SDXL's table of prompts, [P, L + 1, D]: a prompt's added conditions stand after its tokens, so that a label names them too.

    Args:
        embeddings: [P, L, D], of both text encoders.
        pooled: [P, E] of the second, E + 6 <= D; first in the added row.
        time_ids: [P, 6], in pixels; last in the added row.
    """
    added = embeddings.new_zeros(len(embeddings), 1, embeddings.shape[-1])
    added[:, 0, : pooled.shape[-1]] = pooled
    added[:, 0, -TIME_IDS:] = time_ids
    return torch.cat([embeddings, added], dim=1)


def pooled_width(config: Any) -> int | None:
    """E, the width of the pooled embedding that an SDXL UNet of this configuration takes; None for one without added conditions."""
    if config.get("addition_embed_type") != "text_time":
        return None
    total, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    return (total or 0) - TIME_IDS * (each or 0)


class UNet2DCondBackbone(UNet2DBackbone):
    """Wraps a `UNet2DConditionModel`.

    Args:
        unet: the network, over scaled latents in the schedule's own frame.
        schedule: the noise schedule it was trained with.
        prediction_type: "epsilon", "v_prediction" or "sample".
        prompts: [P + 1, L, D] float32, text embeddings of P prompts and, last, of the empty one; for SDXL as `with_added` gives them.
    """

    bounded = False
    prompts: Tensor

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, prediction_type: str, prompts: Tensor):
        super().__init__(unet, schedule, prediction_type)
        self.register_buffer("prompts", prompts, persistent=False)  # a checkpoint holds what was trained
        self.num_classes = len(prompts) - 1

    def set_prompts(self, prompts: Tensor) -> None:
        """Take another table, [P + 1, L, D] with the empty prompt last."""
        self.prompts = prompts.to(self.prompts)
        self.num_classes = len(prompts) - 1

    def _condition(self, labels: Tensor | None) -> dict[str, Any]:
        if labels is None:
            raise ValueError("a text-conditional network needs the rows of its prompts")
        return self.told(self.prompts[labels])

    def told(self, rows: Tensor) -> dict[str, Any]:
        """Rows of a table, [B, L, D], as the network's arguments."""
        width = pooled_width(self.unet.config)
        if width is None:
            return {"encoder_hidden_states": self._cast(rows)}
        added = {"text_embeds": rows[:, -1, :width], "time_ids": rows[:, -1, -TIME_IDS:]}
        return {"encoder_hidden_states": self._cast(rows[:, :-1]), "added_cond_kwargs": added}
