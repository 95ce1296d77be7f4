"""The job `unidad train`: adapt and distil a source model to a folder of pictures in one stage, or by a rival method, and leave
everything a person needs in the run folder: the student (or model), sample grids, a picture grid and a report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from unidad import checkpoint
from unidad.augment import CutMix
from unidad.backbones.base import Backbone
from unidad.backbones.load_text import is_text_to_image
from unidad.config import TrainSettings, as_dict
from unidad.device import make_accelerator, start_trackers, use_bf16
from unidad.distributed import connected, naming_the_lost
from unidad.export import made
from unidad.heads import build_heads
from unidad.ingredients import Ingredients, gather, tuned
from unidad.ingredients_text import gather_text
from unidad.log import Log
from unidad.methods.base import Method
from unidad.methods.finetune import Finetune
from unidad.methods.objective import Objective
from unidad.methods.two_stage import AdaptThenDistill
from unidad.methods.unidad import UniDAD
from unidad.optimizers import checked_device
from unidad.run import RunFolder, open_run, public_name, refuse_other_inputs, surroundings
from unidad.sharding import whole_copy
from unidad.train import Trainer


def build_method(settings: TrainSettings, parts: Ingredients, device: torch.device, generator: torch.Generator) -> Method:
    """The method that the settings name, on fresh copies of the source model (or of the student and target teacher it starts from)."""
    network, values, label = tuned(parts.networks(device), settings), as_dict(settings), parts.label(settings)
    mixes = settings.cutmix_above < 1 and parts.pictures.masks is None and parts.pictures.more is None
    above = settings.cutmix_above * len(parts.source.backbone.schedule)
    mix = CutMix(parts.pictures.pixels.to(device), above) if mixes else None
    if settings.method in ("finetune", "distill-then-adapt"):
        start = network("student", parts.student_init if parts.student_steps else None)
        return Finetune(start, generator, settings.denoising, label, parts.student_steps, settings.denoising_law, mix)
    objective = Objective(**{name: values[name] for name in Objective.__dataclass_fields__ if name in values})
    fake = network("fake_teacher")
    assert parts.student_steps is not None
    heads = build_heads(settings.heads, fake.feature_channels(objective.features), settings.seed).to(device)
    common: dict[str, Any] = {
        "student": network("student", parts.student_init),
        "fake_teacher": fake,
        "heads": heads if objective.uses_gan else None,
        "objective": objective,
        "student_steps": parts.student_steps,
        "batch_size": settings.batch_size,
        "generator": generator,
        "mix": mix,
        "label": label,
        "contexts": parts.contexts,
        "transfer": settings.transfer,
        "origin": parts.source.backbone.state_dict() if settings.transfer else None,
    }
    if settings.method == "adapt-then-distill":
        fresh = parts.student_init is None
        return AdaptThenDistill(
            target_teacher=network("target_teacher"), adapt_cycles=settings.target_warmup, student_from_teacher=fresh, **common
        )
    return UniDAD(
        source_teacher=network("source_teacher") if objective.uses_source else None,
        target_teacher=network("target_teacher", parts.adapted) if objective.uses_target else None,
        train_target=parts.adapted is None,
        target_warmup=settings.target_warmup,
        target_cycles=settings.target_cycles or None,
        **common,
    )


def within_epochs(settings: TrainSettings, pictures: int) -> TrainSettings:
    """The settings with no more updates of a target teacher, or of the one network of finetune, than `target_epochs` allows on so many
    pictures; a student has as many as before.
    """
    most = max(1, settings.target_epochs * pictures // (settings.batch_size * settings.accumulation))
    if not settings.target_epochs or most >= taught_cycles(settings):
        return settings
    if settings.method == "finetune":
        return replace(settings, cycles=most)
    warmup = min(settings.target_warmup, most)
    return replace(settings, target_warmup=warmup, target_cycles=most, cycles=settings.cycles - settings.target_warmup + warmup)


def taught_cycles(settings: TrainSettings) -> int:
    """For how many cycles the target teacher learns, or the one network of finetune."""
    if settings.method == "finetune":
        return settings.cycles
    if settings.method == "adapt-then-distill":
        return settings.target_warmup
    learns = settings.method == "uni-dad" and settings.target_teacher == "online" and settings.a > 0 and settings.dmd_weight > 0
    return (settings.target_cycles or settings.cycles) if learns else 0


def network_rates(settings: TrainSettings) -> dict[str, float]:
    """Learning rates of the networks that have their own; 0 where that is `lr`."""
    return {
        "fake_teacher": settings.lr_fake,
        "heads": settings.lr_heads or settings.lr_fake,
        "target_teacher": settings.lr_target,
    }


def train(
    target: str | Path,
    out: str | Path,
    settings: TrainSettings | None = None,
    resume: bool = False,
    console: Console | None = None,
    until: int | None = None,
    expected: Mapping[str, str] | None = None,
) -> RunFolder:
    """Adapt and distil; the run folder ends with student/, grid.png and report.html.

    Args:
        target: folder of pictures, or `bundled:NAME`.
        out: run folder; new, or with `resume` one of the same settings, models and pictures.
        settings: see `TrainSettings`; the defaults are the paper's weights.
        console: where progress is shown; None is silent.
        until: stop after this cycle; see `Trainer.fit`.
        expected: hashes of models and pictures that this run must have, as run.json lists them; None: any.

    Raises:
        UserError: something about the settings, models, pictures or folders must be put right first.
        Stopped: after SIGINT or SIGTERM; the run is saved.
        NonFiniteError: a loss or gradient was not finite; the last checkpoint is whole.
    """
    settings, parts = _gathered(settings or TrainSettings(), target)
    device = checked_device(settings)
    accelerator = make_accelerator(settings, RunFolder(Path(out)))
    device = accelerator.device if accelerator.num_processes > 1 else device
    say = console.print if console is not None else _silent
    for note in parts.pictures.notes:
        say(f"Note: {note}")
    facts = describe(settings, parts, target, device) | {"processes": accelerator.num_processes}
    refuse_other_inputs(facts["hashes"], expected)
    with connected(accelerator) as ranks, open_run(out, facts, resume) if ranks.first else nullcontext(RunFolder(Path(out))) as run:
        ranks.wait()  # the first one has made the folder, or was refused
        start_trackers(accelerator)
        torch.manual_seed(settings.seed)
        generator = torch.Generator(device).manual_seed(settings.seed)
        method = build_method(settings, parts, device, generator)
        stream = parts.stream(settings, device)
        log = Log(run, accelerator, console)
        sampler, rates = _sampler(parts, settings), network_rates(settings)
        shard = settings.shard and ranks.count > 1
        trainer = Trainer(method, stream, settings, run, log, generator, accelerator, sampler, rates, shard)
        if _restored(trainer, resume):
            say(f"Going on from cycle {trainer.place.cycle} of {settings.cycles}.")
        else:
            log.rewind(0)
        with naming_the_lost(only="gloo") if shard else nullcontext():
            trainer.fit(until)
            product = whole_copy(trainer.product, parts.networks(device)("student")) if shard else trainer.product
        ranks.end()  # the others need not wait for what the first one writes
        if ranks.first:
            say(
                f"Trained and saved. Writing {parts.product_folder}/, grid.png and report.html, for which pictures are drawn and scored."
            )
            finish(run, product, parts, settings, target, trainer.place.cycle)
    return run


def _gathered(settings: TrainSettings, target: str | Path) -> tuple[TrainSettings, Ingredients]:
    """Models and pictures, and the settings as these pictures allow."""
    parts = gather_text(settings, target) if is_text_to_image(settings.source) else gather(settings, target)
    allowed = within_epochs(settings, len(parts.pictures.learnt_from))
    if allowed != settings:
        parts.pictures.notes.append(
            f"So few target pictures are learnt from in {taught_cycles(allowed)} cycles instead of {taught_cycles(settings)}, so as not to "
            "be learnt by heart; target_epochs=0 takes all."
        )
    return allowed, parts


def _restored(trainer: Trainer, resume: bool) -> bool:
    """Whether there was a checkpoint to go on from; the trainer stands there then, and the file's tensors are let go of."""
    found = checkpoint.latest(trainer.run.checkpoints) if resume else None
    if found:
        trainer.restore(found[1])
    return found is not None


def _silent(*_: object) -> None:
    return None


def _sampler(parts: Ingredients, settings: TrainSettings) -> Callable[[nn.Module], Tensor]:
    def sample(product: nn.Module) -> Tensor:
        assert isinstance(product, Backbone)
        return parts.draw(product, settings)

    return sample


def describe(settings: TrainSettings, parts: Ingredients, target: str | Path, device: torch.device) -> dict[str, Any]:
    """What run.json says: enough to know, repeat and check the run."""
    return {
        "kind": "train",
        "product": parts.product_folder,
        "settings": as_dict(settings),
        "hashes": parts.hashes(),
        "device": device.type,
        "precision": "bf16" if use_bf16(settings.precision, device) else "fp32",
        "data": {
            "target": public_name(target),
            "given": str(target),
            "count": len(parts.pictures),
            "names": parts.pictures.names,
            "notes": parts.pictures.notes,
        },
        "student_steps": parts.student_steps,
        "surroundings": surroundings(str(device)),
    }


def finish(run: RunFolder, product: nn.Module, parts: Ingredients, settings: TrainSettings, target: str | Path, cycle: int) -> None:
    """Write student/, grid.png and report.html from the product as it is after so many cycles."""
    assert isinstance(product, Backbone)
    name = public_name(target)
    about = f"Draws pictures like the {len(parts.pictures)} in '{name}', made from '{public_name(settings.source)}' with unidad."
    facts: dict[str, Any] = {
        "about": about,
        "source": public_name(settings.source),
        "target": f"{name} ({len(parts.pictures)} pictures)",
        "made": made(as_dict(settings)),
        "cycle": cycle,
    }
    if settings.class_label >= 0:
        facts["class_label"] = settings.class_label
    if settings.prompt:
        facts["prompt"] = settings.prompt
    parts.save(product.eval(), run.path / parts.product_folder, facts)
    parts.report(run, product, settings)
