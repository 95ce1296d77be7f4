"""diffusers' `UNet2DConditionModel` (Stable Diffusion 1.x and 2.x: latents under a prompt) as a Backbone.

The network holds the few encoded prompts that a run needs as a table, so that to the rest of the library it is class-conditional: a
label is a row. Each role in a method can hold a table of its own: the source teacher's says "a cat" where the others say "a prt cat".
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor

from unidad.backbones.unet2d import UNet2DBackbone
from unidad.noise import NoiseSchedule


class UNet2DCondBackbone(UNet2DBackbone):
    """Wraps a `UNet2DConditionModel`.

    Args:
        unet: the network, over scaled latents in the schedule's own frame.
        schedule: the noise schedule it was trained with.
        prediction_type: "epsilon", "v_prediction" or "sample".
        prompts: [P + 1, L, D] float32, text embeddings of P prompts and, last, of the empty one.
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

    def _condition(self, labels: Tensor | None) -> dict[str, Tensor | None]:
        if labels is None:
            raise ValueError("a text-conditional network needs the rows of its prompts")
        return {"encoder_hidden_states": self.prompts[labels]}
