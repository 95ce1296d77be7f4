"""The job `unidad train`: adapt and distil a source model to a folder of pictures in one stage, or by a rival method, and leave
everything a person needs in the run folder: the student (or model), sample grids, a picture grid and a report.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from unidad import checkpoint
from unidad.backbones.load import Model, bundled_path, load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.config import TrainSettings, as_dict
from unidad.data import PictureSet, PictureStream, load_folder
from unidad.device import make_accelerator, pick_device, start_trackers, use_bf16
from unidad.distributed import Ranks
from unidad.errors import ModelError, SettingsError
from unidad.export import made, save_source, save_student
from unidad.heads import build_heads
from unidad.log import Log
from unidad.methods.base import Method
from unidad.methods.finetune import Finetune
from unidad.methods.two_stage import AdaptThenDistill
from unidad.methods.unidad import Objective, UniDAD
from unidad.report import write_report
from unidad.run import RunFolder, open_run, public_name, refuse_other_inputs, surroundings
from unidad.sample import draw
from unidad.train import Trainer

GRID_SAMPLES = 48


@dataclass(frozen=True)
class Ingredients:
    """What a run is made from, all read and checked before anything is written."""

    source: Model
    pictures: PictureSet
    student_init: Model | None
    adapted: Model | None
    student_steps: list[int] | None  # None where the product is a many-step model

    @property
    def product_folder(self) -> str:
        """Where in the run folder the product goes."""
        return "model" if self.student_steps is None else "student"


def gather(settings: TrainSettings, target: str | Path) -> Ingredients:
    """Read models and pictures and check that they fit each other.

    Raises:
        UserError: the source, student or target teacher cannot be used, or the pictures cannot.
    """
    source = load_model(settings.source)
    student_init = None if settings.student_init == "source" else load_model(settings.student_init)
    adapted = None if settings.target_teacher in ("online", "off") else load_model(settings.target_teacher)
    for model in (student_init, adapted):
        if model is not None:
            _refuse_other_shape(source, model)
    classes = source.backbone.num_classes
    if classes is None and settings.class_label >= 0:
        raise SettingsError(f"'class_label' is {settings.class_label}, but '{source.name}' knows no classes. Leave it at -1.")
    if classes is not None and not 0 <= settings.class_label < classes:
        raise SettingsError(f"'{source.name}' is class-conditional: set class_label to a number in 0..{classes - 1}.")
    try:
        steps = None if settings.method == "finetune" else source.backbone.schedule.student_steps(settings.steps, settings.grid)
    except ValueError as error:
        raise SettingsError(f"'steps' and 'grid': {error}.") from None
    pictures = load_folder(bundled_path(str(target), "targets"), source.backbone.shape[-1])
    return Ingredients(source, pictures, student_init, adapted, steps)


def _refuse_other_shape(source: Model, other: Model) -> None:
    ours, theirs = source.backbone.state_dict(), other.backbone.state_dict()
    differs = [k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape]
    if differs:
        raise ModelError(
            f"'{other.name}' is of another architecture than '{source.name}' ({len(differs)} weights differ, such as {sorted(differs)[0]})."
        )
    if source.scheduler["prediction_type"] != other.scheduler["prediction_type"]:
        raise ModelError(
            f"'{other.name}' predicts {other.scheduler['prediction_type']}, '{source.name}' {source.scheduler['prediction_type']}."
        )
    ours_bar, theirs_bar = source.backbone.schedule.alphas_cumprod, other.backbone.schedule.alphas_cumprod
    if ours_bar.shape != theirs_bar.shape or not torch.allclose(ours_bar, theirs_bar):
        raise ModelError(f"'{other.name}' has another noise schedule than '{source.name}'.")


def build_method(settings: TrainSettings, parts: Ingredients, device: torch.device, generator: torch.Generator) -> Method:
    """The method that the settings name, on fresh copies of the source model (or of the student and target teacher it starts from)."""

    def network(model: Model | None) -> UNet2DBackbone:
        backbone = copy.deepcopy((model or parts.source).backbone).to(device)
        assert isinstance(backbone, UNet2DBackbone)
        return backbone.requires_grad_(False)

    values = as_dict(settings)
    label = None if settings.class_label < 0 else settings.class_label
    if settings.method in ("finetune", "distill-then-adapt"):
        start = network(parts.student_init if parts.student_steps else None)
        return Finetune(start, generator, settings.denoising, label, parts.student_steps)
    objective = Objective(**{name: values[name] for name in Objective.__dataclass_fields__ if name in values})
    fake = network(None)
    assert parts.student_steps is not None
    heads = build_heads(settings.heads, fake.feature_channels(objective.features), settings.seed).to(device)
    common: dict[str, Any] = {
        "student": network(parts.student_init),
        "fake_teacher": fake,
        "heads": heads if objective.uses_gan else None,
        "objective": objective,
        "student_steps": parts.student_steps,
        "batch_size": settings.batch_size,
        "generator": generator,
        "label": label,
    }
    if settings.method == "adapt-then-distill":
        fresh = parts.student_init is None
        return AdaptThenDistill(
            target_teacher=network(None), adapt_cycles=settings.target_warmup, student_from_teacher=fresh, **common
        )
    return UniDAD(
        source_teacher=network(None) if objective.uses_source else None,
        target_teacher=network(parts.adapted) if objective.uses_target else None,
        train_target=parts.adapted is None,
        target_warmup=settings.target_warmup,
        target_cycles=settings.target_cycles or None,
        **common,
    )


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
    settings = settings or TrainSettings()
    parts = gather(settings, target)
    device = pick_device(settings.device)
    accelerator = make_accelerator(settings, RunFolder(Path(out)), several=True)
    device = accelerator.device if accelerator.num_processes > 1 else device
    say = console.print if console is not None else _silent
    for note in parts.pictures.notes:
        say(f"Note: {note}")
    facts = describe(settings, parts, target, device) | {"processes": accelerator.num_processes}
    refuse_other_inputs(facts["hashes"], expected)
    ranks = Ranks(accelerator)
    with open_run(out, facts, resume) if ranks.first else nullcontext(RunFolder(Path(out))) as run:
        ranks.wait()  # the first one has made the folder, or was refused
        start_trackers(accelerator)
        torch.manual_seed(settings.seed)
        generator = torch.Generator(device).manual_seed(settings.seed)
        method = build_method(settings, parts, device, generator)
        stream = PictureStream(parts.pictures.pixels, hflip=settings.hflip, seed=settings.seed, device=device)
        log = Log(run, accelerator, console)
        sampler, rates = _sampler(parts, settings), network_rates(settings)
        trainer = Trainer(method, stream, settings, run, log, generator, accelerator, sampler, rates)
        found = checkpoint.latest(run.checkpoints) if resume else None
        if found:
            trainer.restore(found[1])
            say(f"Going on from cycle {trainer.place.cycle} of {settings.cycles}.")
        else:
            log.rewind(0)
        del found
        try:
            trainer.fit(until)
        finally:
            accelerator.end_training()
        if ranks.first:
            finish(run, trainer.product, parts, settings, target)
    return run


def _silent(*_: object) -> None:
    return None


def _sampler(parts: Ingredients, settings: TrainSettings) -> Callable[[nn.Module], Tensor]:
    label = None if settings.class_label < 0 else settings.class_label

    def sample(product: nn.Module) -> Tensor:
        assert isinstance(product, UNet2DBackbone)
        return draw(product, GRID_SAMPLES, steps=parts.student_steps, label=label)

    return sample


def describe(settings: TrainSettings, parts: Ingredients, target: str | Path, device: torch.device) -> dict[str, Any]:
    """What run.json says: enough to know, repeat and check the run."""
    hashes = {"source": parts.source.digest, "pictures": parts.pictures.digest}
    hashes |= {"student_init": parts.student_init.digest} if parts.student_init else {}
    hashes |= {"target_teacher": parts.adapted.digest} if parts.adapted else {}
    return {
        "kind": "train",
        "product": parts.product_folder,
        "settings": as_dict(settings),
        "hashes": hashes,
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


def finish(run: RunFolder, product: nn.Module, parts: Ingredients, settings: TrainSettings, target: str | Path) -> None:
    """Write student/, grid.png and report.html from the trained product."""
    assert isinstance(product, UNet2DBackbone)
    name = public_name(target)
    about = f"Draws pictures like the {len(parts.pictures)} in '{name}', made from '{public_name(settings.source)}' with unidad."
    facts: dict[str, Any] = {
        "about": about,
        "source": public_name(settings.source),
        "target": f"{name} ({len(parts.pictures)} pictures)",
        "made": made(as_dict(settings)),
    }
    if settings.class_label >= 0:
        facts["class_label"] = settings.class_label
    if parts.student_steps is None:
        save_source(
            product.eval(),
            parts.source.scheduler,
            run.path / parts.product_folder,
            facts | {"title": "A fine-tuned diffusion model"},
        )
    else:
        save_student(product.eval(), parts.source.scheduler, parts.student_steps, run.student, facts)
    label = None if settings.class_label < 0 else settings.class_label
    source = parts.source.backbone.to(next(product.parameters()).device)
    assert isinstance(source, UNet2DBackbone)
    write_report(run, parts.pictures, product, source, parts.student_steps, label)
