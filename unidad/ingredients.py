"""What a run is made from, all read and checked before anything is written: models and pictures, and how each is used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unidad.backbones.base import Backbone
from unidad.backbones.load import Model, bundled_path, load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.config import TrainSettings
from unidad.data import PictureSet, PictureStream, load_folder, looks_one_way
from unidad.errors import ModelError, SettingsError
from unidad.export import save_source, save_student
from unidad.masks import with_masks
from unidad.noise import NoiseSchedule
from unidad.recombine import with_more
from unidad.report import write_report
from unidad.run import RunFolder, public_name
from unidad.sample import draw

GRID_SAMPLES = 48


class Networks(Protocol):
    """Makes the network of a role."""

    def __call__(self, role: str, model: Model | None = None) -> Backbone: ...


def tuned(network: Networks, settings: TrainSettings) -> Networks:
    """The same maker; its networks compute as `gradient_checkpointing`, `channels_last` and `compile` say, and the source teacher's weights
    are held as `source_teacher_dtype` says.
    """
    half = settings.source_teacher_dtype == "bf16"
    if not (settings.gradient_checkpointing or settings.channels_last or settings.compile or half):
        return network

    def made(role: str, model: Model | None = None) -> Backbone:
        backbone = network(role, model)
        assert isinstance(backbone, UNet2DBackbone)
        if half and role == "source_teacher":
            backbone.hold_in_bf16()
        if settings.gradient_checkpointing:
            backbone.recompute_activations()
        if settings.channels_last:
            backbone.unet.to(memory_format=torch.channels_last)
        if settings.compile:
            backbone.compile_unet()
        return backbone

    return made


@dataclass(frozen=True)
class Ingredients:
    """Of a run on a pixel-space source."""

    source: Model
    pictures: PictureSet
    student_init: Model | None
    adapted: Model | None
    student_steps: list[int] | None  # None where the product is a many-step model

    @property
    def product_folder(self) -> str:
        """Where in the run folder the product goes."""
        return "model" if self.student_steps is None else "student"

    @property
    def contexts(self) -> int:
        """How many labels student samples are drawn under."""
        return 1

    def hashes(self) -> dict[str, str]:
        """sha256 of all that the run depends on."""
        others = {"student_init": self.student_init, "target_teacher": self.adapted}
        return {"source": self.source.digest, "pictures": self.pictures.digest} | {k: m.digest for k, m in others.items() if m}

    def label(self, settings: TrainSettings) -> int | None:
        """The condition of every picture."""
        return None if settings.class_label < 0 else settings.class_label

    def networks(self, device: torch.device) -> Networks:
        """A maker of the networks of one method: for a role, a frozen copy of the model given, or of the source where there is none."""

        def network(role: str, model: Model | None = None) -> Backbone:
            return copy.deepcopy((model or self.source).backbone).to(device).requires_grad_(False)

        return network

    def stream(self, settings: TrainSettings, device: torch.device) -> PictureStream:
        """The target pictures, for ever."""
        masks = self.pictures.masks
        hflip = mirrors(settings, self.pictures)
        return PictureStream(self.pictures.learnt_from, hflip=hflip, seed=settings.seed, device=device, masks=masks)

    def draw(self, product: Backbone, settings: TrainSettings) -> Tensor:
        """Pictures of a sample grid, [N, 3, H, W] uint8."""
        return draw(product, GRID_SAMPLES, steps=self.student_steps, label=self.label(settings))

    def save(self, product: Backbone, out: Path, facts: dict[str, Any]) -> None:
        """Write the product as a stock diffusers folder."""
        assert isinstance(product, UNet2DBackbone)
        if self.student_steps is None:
            save_source(product, self.source.scheduler, out, facts | {"title": "A fine-tuned diffusion model"})
        else:
            save_student(product, self.source.scheduler, self.student_steps, out, facts)

    def report(self, run: RunFolder, product: Backbone, settings: TrainSettings) -> None:
        """Write grid.png and report.html."""
        source = self.source.backbone.to(next(product.parameters()).device)
        write_report(run, self.pictures, product, source, self.student_steps, self.label(settings))


def gather(settings: TrainSettings, target: str | Path) -> Ingredients:
    """Read models and pictures and check that they fit each other.

    Raises:
        UserError: the source, student or target teacher cannot be used, or the pictures cannot.
    """
    if settings.prompt or settings.class_prompt or settings.prompts or settings.guidance != 1 or settings.lora_rank:
        raise SettingsError(
            f"'{settings.source}' is no text-to-image model: leave out prompt, class_prompt, prompts, "
            "guidance and lora_rank, or give a Stable Diffusion model as --source, which the preset sdp needs."
        )
    source = load_model(settings.source)
    student_init = None if settings.student_init == "source" else load_model(settings.student_init)
    adapted = None if settings.target_teacher in ("online", "off") else load_model(settings.target_teacher)
    for model in (student_init, adapted):
        if model is not None:
            refuse_other_shape(source, model)
    steps = fitting_steps(settings, source)
    place = bundled_path(str(target), "targets")
    pictures = with_masks(load_folder(place, source.backbone.shape[-1]), place)
    pictures = with_more(pictures, settings.recombine, settings.seed, Path(place))
    pictures.notes.extend([*mirroring_notes(settings, pictures), *student_notes(settings, student_init, steps)])
    if pictures.masks is not None and settings.cutmix_above < 1:
        pictures.notes.append("These pictures have masks, so none is pieced together with another ('cutmix_above').")
    return Ingredients(source, pictures, student_init, adapted, steps)


def mirrors(settings: TrainSettings, pictures: PictureSet) -> bool:
    """Whether pictures are mirrored at random: as `hflip` says, but with `hflip_check` not where they look one way."""
    return settings.hflip and not (settings.hflip_check and looks_one_way(pictures.pixels))


def mirroring_notes(settings: TrainSettings, pictures: PictureSet) -> list[str]:
    """What a person should know of `hflip` and these pictures."""
    if not settings.hflip or not looks_one_way(pictures.pixels):
        return []
    if settings.hflip_check:
        return ["These pictures all look one way, so none is mirrored; hflip_check=false does it all the same."]
    return ["These pictures all look one way, and 'hflip' mirrors half of them: hflip=false may be better."]


def fitting_steps(settings: TrainSettings, source: Model) -> list[int] | None:
    """The student's timesteps on the source's schedule, or None where the product is a many-step model.

    Raises:
        SettingsError: the class label or the steps do not fit the source.
    """
    classes = source.backbone.num_classes
    if classes is None and settings.class_label >= 0:
        raise SettingsError(f"'class_label' is {settings.class_label}, but '{source.name}' knows no classes. Leave it at -1.")
    if classes is not None and not 0 <= settings.class_label < classes:
        raise SettingsError(f"'{source.name}' is class-conditional: set class_label to a number in 0..{classes - 1}.")
    return None if settings.method == "finetune" else student_steps(settings, source.backbone.schedule)


def student_notes(settings: TrainSettings, init: Model | None, steps: list[int] | None) -> list[str]:
    """What there is to say of a student that begins as `init` and is to draw at `steps`.

    Raises:
        SettingsError: distill-then-adapt, which knows no other timesteps than those of `init`, is asked for others.
    """
    if init is None or steps is None or init.student_steps == steps:
        return []
    name, own = settings.student_init, init.student_steps
    if settings.method == "distill-then-adapt":
        if own is None:
            raise SettingsError(f"'method' distill-then-adapt starts from a few-step student, and '{name}' is a many-step model.")
        wanted = ",".join(map(str, own))
        raise SettingsError(
            f"'method' distill-then-adapt trains a student at its own timesteps: those of '{name}' are {own}, and the settings ask "
            f"for {steps}. Set timesteps={wanted}."
        )
    if own is None:
        return [f"The student begins as '{public_name(name)}', a many-step model."]
    return [f"The student begins as '{public_name(name)}', which draws at the timesteps {own}; here it learns to draw at {steps}."]


def student_steps(settings: TrainSettings, schedule: NoiseSchedule) -> list[int]:
    """tau_1 > ... > tau_K, as the settings name them or by their grid.

    Raises:
        SettingsError: the schedule has no such timesteps.
    """
    if settings.timesteps:
        if settings.timesteps[0] >= len(schedule):
            raise SettingsError(f"'timesteps' begins with {settings.timesteps[0]}, but this model's last is {len(schedule) - 1}.")
        return list(settings.timesteps)
    try:
        return schedule.student_steps(settings.steps, settings.grid)
    except ValueError as error:
        raise SettingsError(f"'steps' and 'grid': {error}.") from None


def refuse_other_shape(source: Model, other: Model) -> None:
    """Raise ModelError where two models differ in architecture, prediction type or noise schedule."""
    ours, theirs = source.backbone.state_dict(), other.backbone.state_dict()
    differs = [k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape]
    if differs:
        raise ModelError(
            f"'{other.name}' is of another architecture than '{source.name}' ({len(differs)} weights differ, such as {sorted(differs)[0]})."
        )
    mine: Mapping[str, Any] = source.scheduler
    if mine["prediction_type"] != other.scheduler["prediction_type"]:
        raise ModelError(
            f"'{other.name}' predicts {other.scheduler['prediction_type']}, '{source.name}' {mine['prediction_type']}."
        )
    ours_bar, theirs_bar = source.backbone.schedule.alphas_cumprod, other.backbone.schedule.alphas_cumprod
    if ours_bar.shape != theirs_bar.shape or not torch.allclose(ours_bar, theirs_bar):
        raise ModelError(f"'{other.name}' has another noise schedule than '{source.name}'.")
