"""Writes models as stock diffusers folders with a model card; whoever gets one needs diffusers and nothing of ours."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, LCMScheduler, UNet2DModel
from safetensors import SafetensorError
from torch import nn

from unidad.backbones.load import STUDENT_FILE
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.errors import CheckpointError

PATH_KEYS = ("_name_or_path", "name_or_path")  # paths of the machine that trained it


def lcm_scheduler(scheduler: dict[str, Any], steps: list[int]) -> LCMScheduler:
    """The stock scheduler whose steps are our rollout to the last bit.

    Args:
        scheduler: betas and prediction type, as `Model.scheduler`.
        steps: tau_1 > ... > tau_K. On the lcm grid `num_inference_steps=K` gives them; else pass `timesteps=`.
    """
    return LCMScheduler.from_config(
        {k: v for k, v in scheduler.items() if v is not None},
        original_inference_steps=len(steps),
        timestep_scaling=1e6,  # turns LCM's boundary conditions off: c_skip = 0, c_out = 1
        clip_sample=False,
        thresholding=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def plain_unet(backbone: UNet2DBackbone) -> UNet2DModel:
    """Its network, a copy on the CPU, without the learned-sigma output channels that LCMScheduler cannot take."""
    unet = copy.deepcopy(backbone.unet).cpu().eval().requires_grad_(False)
    channels = backbone.shape[0]
    if unet.config.out_channels != channels:
        old = unet.conv_out
        unet.conv_out = nn.Conv2d(old.in_channels, channels, old.kernel_size, padding=old.padding)
        unet.conv_out.load_state_dict({"weight": old.weight[:channels].clone(), "bias": old.bias[:channels].clone()})
        unet.register_to_config(out_channels=channels)
    return unet


def save_student(
    backbone: UNet2DBackbone, scheduler: dict[str, Any], steps: list[int], out: Path, facts: dict[str, Any], half: bool = False
) -> None:
    """Write a few-step student as a pipeline folder; replaces `out` in one step.

    Args:
        facts: for the card and unidad.json: "source", "target" and whatever else is worth keeping.
        half: store float16 weights.
    """
    unet = plain_unet(backbone)
    sampler = lcm_scheduler(scheduler, steps)
    on_lcm_grid = steps == backbone.schedule.student_steps(len(steps), "lcm")
    stock = on_lcm_grid and backbone.num_classes is None
    pipeline = DDPMPipeline(unet, sampler) if stock else ConsistencyModelPipeline(unet, sampler)
    notes = facts | {"student_steps": steps}
    write_pipeline(pipeline, out, notes, _student_card(steps, facts, stock), half)


def save_source(backbone: UNet2DBackbone, scheduler: dict[str, Any], out: Path, facts: dict[str, Any], half: bool = False) -> None:
    """Write a many-step model as a pipeline folder with a DDIM scheduler; replaces `out` in one step."""
    config = {k: v for k, v in scheduler.items() if v is not None}
    sampler = DDIMScheduler.from_config(config, clip_sample=True, timestep_spacing="trailing")
    _write_many_step(plain_unet(backbone), sampler, out, facts, half)


def save_converted(unet: UNet2DModel, scheduler: DDPMScheduler, out: Path, facts: dict[str, Any]) -> None:
    """Write a network as it is, learned sigma too, as a pipeline folder; replaces `out` in one step."""
    _write_many_step(unet, scheduler, out, facts, half=False)


def _write_many_step(unet: UNet2DModel, sampler: Any, out: Path, facts: dict[str, Any], half: bool) -> None:
    """DDPMPipeline hands no classes on, so that a class-conditional network goes into the stock pipeline that does."""
    classes = unet.config.num_class_embeds
    pipeline = DDPMPipeline(unet, sampler) if classes is None else ConsistencyModelPipeline(unet, sampler)
    write_pipeline(pipeline, out, facts, _source_card(facts, classes), half)


def write_pipeline(pipeline: Any, out: Path, notes: dict[str, Any], card: str, half: bool) -> None:
    """Save a diffusers pipeline with its card and `notes` (unidad.json); replaces `out` in one step.

    Raises:
        CheckpointError: if the disk refuses; what was there before is untouched.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            if half:
                part.to(torch.float16)
            part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # safetensors wants no other
    staged = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        pipeline.save_pretrained(staged, safe_serialization=True, max_shard_size="1TB")  # SDXL in float32 would be split
        (staged / STUDENT_FILE).write_text(json.dumps(notes, indent=1) + "\n")
        (staged / "README.md").write_text(card, encoding="utf-8")
        for config in [*staged.glob("*/config.json"), *staged.glob("*/*_config.json")]:
            settings = json.loads(config.read_text())
            kept = {k: v for k, v in settings.items() if k not in PATH_KEYS}
            config.write_text(json.dumps(kept, indent=2) + "\n")
        for weights in staged.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner may read
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        staged.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointError(f"'{out}' cannot be written: {error}. Give another folder or free some space.") from None


_MADE: dict[str, str] = {
    "uni-dad": "Distilled and adapted in one stage by Uni-DAD (arXiv 2511.18281).",
    "finetune": "Fine-tuned from the source model.",
    "adapt-then-distill": "Adapted by fine-tuning, then distilled by DMD2 (arXiv 2405.14867): the two-stage rival of Uni-DAD.",
    "distill-then-adapt": "Distilled, then fine-tuned at its own timesteps: the two-stage rival of Uni-DAD.",
}


def is_dmd2(settings: Mapping[str, Any]) -> bool:
    """Whether they are those of `unidad distill`: the source teacher alone, and a single head."""
    alone = settings.get("method", "uni-dad") == "uni-dad" and settings.get("target_teacher") == "off"
    return alone and settings.get("heads") == "single" and settings.get("dmd_weight", 1) > 0


def made(settings: Mapping[str, Any]) -> str:
    """How a training run with these settings made its product, as a sentence for the card."""
    method = settings.get("method", "uni-dad")
    if is_dmd2(settings):
        return "Distilled by distribution matching with the source teacher alone (DMD2, arXiv 2405.14867)."
    if method == "uni-dad" and settings.get("dmd_weight", 1) == 0:
        return "Trained by the GAN of Uni-DAD (arXiv 2511.18281) alone."
    without = ", without a target teacher" if method == "uni-dad" and settings.get("target_teacher") == "off" else ""
    return _MADE[method].removesuffix(".") + without + "."


_HEADER = """---
library_name: diffusers
tags: [unconditional-image-generation{tags}]
---
"""


def _source_card(facts: dict[str, Any], classes: int | None) -> str:
    pipeline, label, more = "DDPMPipeline", "", ""
    if classes is not None:
        pipeline, label = "ConsistencyModelPipeline", f", class_labels=torch.full((4,), {facts.get('class_label', 0)})"
        more = f"\nIt knows {classes} classes, 0 to {classes - 1}; without class_labels they are drawn at random.\n"
    return (
        _HEADER.format(tags="")
        + f"""# {facts.get("title", "A diffusion model")}

{facts.get("about", "")}

```python
import torch
from diffusers import {pipeline}
pipe = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER", use_safetensors=True)
pipe(batch_size=4, num_inference_steps=50{label}).images
```
{more}"""
    )


def _student_card(steps: list[int], facts: dict[str, Any], stock: bool) -> str:
    k = len(steps)
    label = f", class_labels=torch.full((4,), {facts['class_label']})" if "class_label" in facts else ""
    if stock:
        pipeline, call = "DDPMPipeline", f"pipe(batch_size=4, num_inference_steps={k}).images"
    else:
        pipeline, call = (
            "ConsistencyModelPipeline",
            f"pipe(batch_size=4, num_inference_steps=None, timesteps={steps}{label}).images",
        )
    warning = "its default of 1000 steps is refused" if stock else "its default is ONE step at a timestep this model never saw"
    noise = "" if stock else " diffusers warns of timesteps that are not its own; these are the student's."
    return (
        _HEADER.format(tags=", few-step, uni-dad")
        + f"""# A {k}-step generator

{facts.get("about", "")}

{facts.get("made", _MADE["uni-dad"])} It draws in {k} network evaluations, at timesteps {steps}.

```python
import torch
from diffusers import {pipeline}
pipe = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER", use_safetensors=True)
{call}
```

Give the number of steps as shown: {warning}.{noise}
The same pictures as `unidad sample --seed 0`: add `generator=[torch.Generator().manual_seed(i) for i in range(4)]`.

Trained from: {facts.get("source", "unknown")}. Target pictures: {facts.get("target", "unknown")}.
The pictures' licence and the source model's licence both bind what is made with it.
"""
    )
