"""What a run on a Stable Diffusion source is made from: pictures as latents, prompts as embeddings, and the UNet.

The VAE and the text encoder are read, used and let go of; the VAE comes back for as long as a sample grid takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from unidad.backbones.base import Backbone, guided
from unidad.backbones.load import Model, bundled_path
from unidad.backbones.load_text import (
    TextModel,
    decode_latents,
    encode_pictures,
    encode_prompts,
    load_text_model,
    load_vae,
    picture_side,
    split_tokens,
)
from unidad.backbones.lora import LoraRole
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.captions import read_captions
from unidad.config import TrainSettings
from unidad.data import LatentStream, PictureSet, PictureStream, load_folder, to_signed
from unidad.device import pick_device
from unidad.errors import SettingsError
from unidad.export_text import save_lora, save_text_student
from unidad.ingredients import Ingredients, Networks, mirroring_notes, mirrors, refuse_other_shape, student_notes, student_steps
from unidad.masks import with_masks
from unidad.noise import from_x0
from unidad.prompts import in_contexts, read_templates
from unidad.report import write_report
from unidad.run import RunFolder
from unidad.sample import draw

GRID_SAMPLES = 8
SCORED = 16
DRAWN_AT_ONCE = 4


@dataclass(frozen=True)
class TextIngredients(Ingredients):
    """Of a run on a text-to-image source.

    Attributes:
        latents, mirrored: [N, c, s, s], of the target pictures and of their mirror images.
        captions: [N] int64, the row of each picture's caption in the table of "student".
        lora_rank: of the adapters; 0 trains whole networks.
        told: tables of prompts, [P + 1, L, D]: the prompt, alone and in contexts, and the empty one; for "source_teacher" the same of
            the class prompt. The pictures' captions stand after the contexts, where the source teacher has none.
    """

    latents: Tensor
    mirrored: Tensor
    captions: Tensor
    lora_rank: int
    told: dict[str, Tensor]

    @property
    def contexts(self) -> int:
        """How many prompts student samples are drawn under."""
        return len(self.told["source_teacher"]) - 1

    @property
    def folder(self) -> Path:
        """The source's pipeline folder."""
        assert isinstance(self.source, TextModel)
        return self.source.folder

    def hashes(self) -> dict[str, str]:
        """sha256 of all that the run depends on."""
        assert isinstance(self.source, TextModel)
        told = hashlib.sha256(self.told["student"].numpy().tobytes() + self.captions.numpy().tobytes()).hexdigest()
        return super().hashes() | {"vae": self.source.parts[0], "text_encoder": self.source.parts[1], "prompts": told}

    def label(self, settings: TrainSettings) -> int | None:
        """The first row of each role's table."""
        return 0

    def networks(self, device: torch.device) -> Networks:
        """Frozen copies as for other sources, or adapters on one copy; each network has the table of its role."""
        copied, told = super().networks(device), self.told
        base = copied("base") if self.lora_rank else None

        def network(role: str, model: Model | None = None) -> Backbone:
            prompts = told.get(role, told["student"])
            if base is not None:
                assert isinstance(base, UNet2DCondBackbone)
                return LoraRole(base, role, 0 if role == "source_teacher" else self.lora_rank, prompts).requires_grad_(False).eval()
            whole = copied(role, model)
            assert isinstance(whole, UNet2DCondBackbone)
            whole.set_prompts(prompts)
            return whole

        return network

    def stream(self, settings: TrainSettings, device: torch.device) -> PictureStream:
        """The pictures' latents, for ever."""
        masks = self.pictures.masks
        masks = None if masks is None else adaptive_avg_pool2d(masks, self.latents.shape[-1])
        hflip = mirrors(settings, self.pictures)
        return LatentStream(self.latents, self.mirrored, self.captions, hflip=hflip, seed=settings.seed, device=device, masks=masks)

    def draw(self, product: Backbone, settings: TrainSettings) -> Tensor:
        """Pictures of a sample grid, [N, 3, H, W] uint8."""
        decode = self._decoder(product)
        return draw(product, GRID_SAMPLES, steps=self.student_steps, batch_size=DRAWN_AT_ONCE, label=0, decode=decode)

    def save(self, product: Backbone, out: Path, facts: dict[str, Any]) -> None:
        """Write the product as a stock folder of the source's own pipeline."""
        assert isinstance(product, UNet2DCondBackbone)
        assert self.student_steps is not None
        if isinstance(product, LoraRole):
            save_lora(product, self.source.scheduler, self.student_steps, self.folder, out.with_name("lora"), facts)
            product = product.merged()
        save_text_student(product, self.source.scheduler, self.student_steps, self.folder, out, facts)

    def report(self, run: RunFolder, product: Backbone, settings: TrainSettings) -> None:
        """Write grid.png and report.html; the source draws under the class prompt, guided."""
        source = guided(self.networks(next(product.parameters()).device)("source_teacher"), settings.guidance)
        decode = self._decoder(product)
        counts = {"scored": SCORED, "shown": GRID_SAMPLES, "batch_size": DRAWN_AT_ONCE}
        write_report(run, self.pictures, product, source, self.student_steps, 0, decode, **counts)

    def _decoder(self, product: Backbone) -> Callable[[Tensor], Tensor]:
        return partial(decode_latents, load_vae(self.folder).to(next(product.parameters()).device))


def gather_text(settings: TrainSettings, target: str | Path) -> TextIngredients:
    """Read models and pictures, check that they fit each other, and encode pictures and prompts.

    Raises:
        UserError: something is missing, damaged or does not fit; says which.
    """
    check_text_settings(settings)
    source = load_text_model(settings.source)
    student_init = None if settings.student_init == "source" else load_text_model(settings.student_init)
    adapted = None if settings.target_teacher in ("online", "off") else load_text_model(settings.target_teacher)
    for model in (student_init, adapted):
        if model is not None:
            refuse_other_shape(source, model)
    steps = student_steps(settings, source.backbone.schedule)
    place = bundled_path(str(target), "targets")
    pictures = with_masks(load_folder(place, picture_side(source.folder)), place)
    told, captions = _tell(settings, source.folder, read_captions(place, pictures.names) or [settings.prompt] * len(pictures))
    vae = load_vae(source.folder).to(pick_device(settings.device))
    signed = to_signed(pictures.pixels).to(vae.device)
    latents = encode_pictures(vae, signed).cpu()
    mirrored = encode_pictures(vae, signed.flip(-1)).cpu() if mirrors(settings, pictures) else latents
    notes = [*mirroring_notes(settings, pictures), *student_notes(settings, student_init, steps), *_notes(source.folder, settings)]
    notes += declared_wrongly(source.backbone, latents[:1], told["student"])
    pictures = replace(pictures, notes=[*pictures.notes, *notes])
    return TextIngredients(source, pictures, student_init, adapted, steps, latents, mirrored, captions, settings.lora_rank, told)


def gather_nothing(settings: TrainSettings, backbone: UNet2DCondBackbone, pictures: int = 1) -> TextIngredients:
    """For a network alone, as counting and measuring have it: random latents, and prompts that are the network's own table.

    Raises:
        SettingsError: settings do not fit a text-to-image source.
    """
    check_text_settings(settings)
    source = TextModel(backbone, {}, settings.source, "")
    init = None if settings.student_init == "source" else source
    adapted = None if settings.target_teacher in ("online", "off") else source
    latents = torch.randn(pictures, *backbone.shape, generator=torch.Generator().manual_seed(settings.seed))
    shown = PictureSet(torch.zeros(pictures, 3, 8, 8, dtype=torch.uint8), ["none"] * pictures, "none")
    told = dict.fromkeys(("student", "source_teacher"), backbone.prompts)
    steps, rows = student_steps(settings, backbone.schedule), torch.zeros(pictures, dtype=torch.long)
    return TextIngredients(source, shown, init, adapted, steps, latents, latents, rows, settings.lora_rank, told)


def _tell(settings: TrainSettings, folder: Path, captions: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The tables of prompts, and the row of each picture's caption."""
    templates = read_templates(settings.prompts) if settings.prompts else []
    ours, general = ([text, *in_contexts(templates, text)] for text in (settings.prompt, settings.class_prompt))
    ours += [caption for caption in dict.fromkeys(captions) if caption not in ours]
    told = {role: encode_prompts(folder, [*texts, ""]) for role, texts in (("student", ours), ("source_teacher", general))}
    return told, torch.tensor([ours.index(caption) for caption in captions])


def check_text_settings(settings: TrainSettings) -> None:
    """Raise SettingsError where settings do not fit a text-to-image source."""
    if settings.method != "uni-dad":
        raise SettingsError(f"'method' {settings.method} is not there yet for text-to-image sources; use uni-dad.")
    if not settings.prompt.strip():
        raise SettingsError(
            f"'{settings.source}' is a text-to-image model: say what the pictures show, for example --prompt 'a prt cat' --class-prompt 'a cat'."
        )
    if settings.a < 1 and settings.dmd_weight > 0 and not settings.class_prompt.strip():
        raise SettingsError(
            "The source teacher needs the prompt without the rare word, for example --class-prompt 'a cat'; or set a=1 to do without it."
        )
    if settings.lora_rank and (settings.student_init != "source" or settings.target_teacher not in ("online", "off")):
        raise SettingsError(
            "'lora_rank' puts every network on the source as base: leave student_init=source and target_teacher=online, or set it to 0."
        )
    for name in ("channels_last", "compile", "transfer"):
        if getattr(settings, name):
            raise SettingsError(f"'{name}' is not there yet for text-to-image sources. Leave it off.")
    for name, none in (("cutmix_above", 1), ("recombine", 0)):
        if getattr(settings, name) != none:
            raise SettingsError(f"'{name}' is not there for text-to-image sources. Leave it at {none}.")
    if settings.class_label >= 0:
        raise SettingsError("'class_label' means nothing to a text-to-image model. Leave it at -1.")


def _notes(folder: Path, settings: TrainSettings) -> list[str]:
    return [
        f"The tokenizer knows '{word}' only in pieces ({', '.join(pieces)}), each with a meaning of its own; another rare word may be better."
        for word, pieces in split_tokens(folder, settings.prompt, settings.class_prompt).items()
    ]


@torch.no_grad()
def declared_wrongly(backbone: Backbone, latents: Tensor, prompts: Tensor) -> list[str]:
    """A note where a network's output looks like v though its scheduler says epsilon, or the other way round.

    Clean latents [B, c, s, s] are noised half way, where epsilon and v point most apart, and the output is compared with the direction of
    each; a network that follows neither gives no note.
    """
    assert isinstance(backbone, UNet2DCondBackbone)
    schedule, kind = backbone.schedule, backbone.prediction_type
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}.get(kind)
    if other is None:
        return []
    half = int((schedule.alphas_cumprod - 0.5).abs().argmin())
    t = torch.full((len(latents),), half)
    alpha, sigma = schedule.alpha_sigma(t)
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    x_t = alpha * latents + sigma * eps
    output = backbone.unet(x_t, t, **backbone.told(prompts[:1].expand(len(latents), -1, -1)), return_dict=False)[0]
    likeness = {
        name: float(torch.cosine_similarity(output.flatten(), from_x0(latents, x_t, alpha, sigma, name).flatten(), dim=0))
        for name in (kind, other)
    }
    if likeness[other] < 0.6 or likeness[other] < likeness[kind] + 0.1:
        return []
    return [
        f"The source says that it predicts {kind}, but its output looks like {other} (likeness {likeness[other]:.2f} against "
        f"{likeness[kind]:.2f}). If samples are grey or noisy, correct prediction_type in its scheduler/scheduler_config.json."
    ]
