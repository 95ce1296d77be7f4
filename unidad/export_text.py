"""Writes text-to-image students as whole stock pipeline folders (Stable Diffusion, SDXL) with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from safetensors import SafetensorError

from unidad.backbones.load_text import is_sdxl, load_vae, pipeline_name, text_parts, zero_empty_prompt
from unidad.backbones.lora import LoraRole
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.errors import CheckpointError
from unidad.export import lcm_scheduler, plain_unet, write_pipeline

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def save_text_student(
    backbone: UNet2DCondBackbone,
    scheduler: dict[str, Any],
    steps: list[int],
    folder: Path,
    out: Path,
    facts: dict[str, Any],
    half: bool = False,
) -> None:
    """Write a few-step student with the VAE, text encoders and tokenizers of its source; replaces `out` in one step.

    Args:
        folder: pipeline folder that the other parts are taken from.
        facts: for the card and unidad.json: "prompt", "source", "target", "made" and whatever else is worth keeping.
        half: store float16 weights.

    Raises:
        CheckpointError: if the disk refuses.
    """
    parts = text_parts(folder) | {
        "vae": load_vae(folder),
        "unet": plain_unet(backbone),
        "scheduler": lcm_scheduler(scheduler, steps),
    }
    pipeline = _pipeline_class(folder)(**parts, **_options(folder))
    on_lcm_grid = steps == backbone.schedule.student_steps(len(steps), "lcm")
    write_pipeline(pipeline, out, facts | {"student_steps": steps}, _card(steps, facts, on_lcm_grid, pipeline_name(folder)), half)


def save_text_source(
    backbone: UNet2DCondBackbone, scheduler: dict[str, Any], folder: Path, out: Path, facts: dict[str, Any]
) -> None:
    """Write a many-step model as `save_text_student` writes a student, with a DDIM scheduler.

    Raises:
        CheckpointError: if the disk refuses.
    """
    config = {k: v for k, v in scheduler.items() if v is not None}
    sampler = DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    parts = text_parts(folder) | {"vae": load_vae(folder), "unet": plain_unet(backbone), "scheduler": sampler}
    card = f"# {facts['title']}\n\n{facts['about']}\n"
    write_pipeline(_pipeline_class(folder)(**parts, **_options(folder)), out, facts, card, half=False)


def _pipeline_class(folder: Path) -> Any:
    import diffusers  # whose pipelines import transformers

    return getattr(diffusers, pipeline_name(folder))


def _options(folder: Path) -> dict[str, Any]:
    if is_sdxl(folder):
        return {"force_zeros_for_empty_prompt": zero_empty_prompt(folder), "add_watermarker": False}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def save_lora(role: LoraRole, scheduler: dict[str, Any], steps: list[int], folder: Path, out: Path, facts: dict[str, Any]) -> None:
    """Write an adapter as `pytorch_lora_weights.safetensors`, with the scheduler and a card; replaces files of these names in `out`.

    Args:
        folder: pipeline folder that it fits.

    Raises:
        CheckpointError: if the disk refuses.
    """
    on_lcm_grid = steps == role.schedule.student_steps(len(steps), "lcm")
    layers = {name: value.detach().cpu().contiguous() for name, value in role.adapter_state().items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _pipeline_class(folder).save_lora_weights(out, unet_lora_layers=layers, safe_serialization=True)
        (out / LORA_WEIGHTS).chmod(0o644)
        lcm_scheduler(scheduler, steps).save_pretrained(out / "scheduler")
        (out / "README.md").write_text(_lora_card(steps, facts, on_lcm_grid, pipeline_name(folder)), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{out}' cannot be written: {error}. Free some space.") from None


def sampling_call(steps: list[int], on_lcm_grid: bool) -> str:
    """The arguments, after the prompt, with which a stock pipeline draws at these timesteps."""
    grid = f"num_inference_steps={len(steps)}" if on_lcm_grid else f"timesteps={steps}"
    return f"{grid}, guidance_scale=1.0"


def _card(steps: list[int], facts: dict[str, Any], on_lcm_grid: bool, pipeline: str) -> str:
    k, prompt = len(steps), facts["prompt"]
    return f"""---
library_name: diffusers
tags: [text-to-image, few-step, uni-dad]
---
# A {k}-step text-to-image generator

{facts.get("about", "")}

{facts.get("made", "")} It draws in {k} network evaluation{"s" if k > 1 else ""}, at timesteps {steps}, without guidance.

```python
import torch
from diffusers import {pipeline}
pipe = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER", use_safetensors=True)
pipe({prompt!r}, {sampling_call(steps, on_lcm_grid)}).images[0]
```

Give these arguments as shown: the pipeline's own 50 steps and guidance are not what this model was trained for.
The same picture as `unidad sample --seed 0`: add `generator=torch.Generator().manual_seed(0)`.
There is no safety checker in this folder.

Trained from: {facts.get("source", "unknown")}. Target pictures: {facts.get("target", "unknown")}, as {prompt!r}.
The pictures' licence and the source model's licence both bind what is made with it.
"""


def _lora_card(steps: list[int], facts: dict[str, Any], on_lcm_grid: bool, pipeline: str) -> str:
    return f"""---
library_name: diffusers
tags: [text-to-image, lora, few-step, uni-dad]
---
# LoRA of a {len(steps)}-step text-to-image generator

{facts.get("about", "")}

```python
from diffusers import LCMScheduler, {pipeline}
pipe = {pipeline}.from_pretrained("PATH_OF_THE_SOURCE", use_safetensors=True)
pipe.load_lora_weights("PATH_OF_THIS_FOLDER")
pipe.scheduler = LCMScheduler.from_pretrained("PATH_OF_THIS_FOLDER", subfolder="scheduler")
pipe({facts["prompt"]!r}, {sampling_call(steps, on_lcm_grid)}).images[0]
```

It fits the model it was trained on, {facts.get("source", "unknown")}, at a scale of 1 and with this scheduler.
"""
