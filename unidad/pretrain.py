"""The job `unidad pretrain`: a source diffusion model, from scratch or on from another, on a folder of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from rich.console import Console
from torch import Tensor, nn

from unidad import checkpoint
from unidad.backbones.load import SCHEDULE_KEYS, Model
from unidad.backbones.load_text import TextModel, open_model
from unidad.backbones.unet2d import UNet2DBackbone, random_unet
from unidad.config import PretrainSettings, as_dict
from unidad.data import PictureStream, load_folder
from unidad.device import make_accelerator, start_trackers, use_bf16
from unidad.distributed import connected
from unidad.errors import ModelError
from unidad.export import save_source
from unidad.log import Log
from unidad.methods.finetune import Finetune
from unidad.noise import NoiseSchedule
from unidad.optimizers import checked_device
from unidad.pretrain_text import Captioned
from unidad.run import RunFolder, open_run, public_name, refuse_other_inputs, surroundings
from unidad.sample import draw
from unidad.train import Trainer


def pretrain(
    data: str | Path,
    out: str | Path,
    settings: PretrainSettings,
    resume: bool = False,
    console: Console | None = None,
    until: int | None = None,
    expected: Mapping[str, str] | None = None,
) -> RunFolder:
    """Train a source model and leave it in `out/model`, a stock diffusers folder.

    Args:
        data: folder of pictures; thousands of them. With captions, where `init` is a text-to-image model.
        out: run folder; new, or with `resume` one of the same settings and pictures.
        until, expected: as for `unidad.adapt.train`.

    Raises:
        UserError: as `start`, `load_folder`, `open_run` and `checkpoint.latest` do.
        Stopped: after SIGINT or SIGTERM, saved.
    """
    device = checked_device(settings)
    accelerator = make_accelerator(settings, RunFolder(Path(out)))
    device = accelerator.device if accelerator.num_processes > 1 else device
    model = start(settings)
    given = (Path(data), settings, device)
    job = Captioned(model, *given) if isinstance(model, TextModel) else Plain(model, *given)
    facts: dict[str, Any] = {
        "kind": "pretrain",
        "settings": as_dict(settings),
        "hashes": {"pictures": job.digest} | ({"init": model.digest} if model.digest else {}),
        "device": device.type,
        "precision": "bf16" if use_bf16(settings.precision, device) else "fp32",
        "data": {"count": job.count, "folder": Path(data).name, "given": str(data)},
        "surroundings": surroundings(str(device)),
        "processes": accelerator.num_processes,
    }
    refuse_other_inputs(facts["hashes"], expected)
    with connected(accelerator) as ranks, open_run(out, facts, resume) if ranks.first else nullcontext(RunFolder(Path(out))) as run:
        ranks.wait()  # the first one has made the folder, or was refused
        start_trackers(accelerator)
        torch.manual_seed(settings.seed)
        backbone = model.backbone.to(device)
        assert isinstance(backbone, UNet2DBackbone)
        if settings.compile:
            backbone.compile_unet()
        generator = torch.Generator(device).manual_seed(settings.seed)
        method = Finetune(backbone, generator, settings.denoising, law=settings.denoising_law)
        log = Log(run, accelerator, console)
        trainer = Trainer(method, job.stream, settings, run, log, generator, accelerator, job.draw)
        found = checkpoint.latest(run.checkpoints) if resume else None
        if found:
            trainer.restore(found[1])
        else:
            log.rewind(0)
        trainer.fit(until)
        ranks.end()  # the others need not wait for what the first one writes
        if ranks.first:
            _finish(run, trainer, job, settings)
    return run


def _finish(run: RunFolder, trainer: Trainer, job: Plain | Captioned, settings: PretrainSettings) -> None:
    began = "from scratch" if settings.init == "scratch" else f"on from '{public_name(settings.init)}'"
    about = f"Trained {began} with `unidad pretrain` on {job.count} pictures, {trainer.place.cycle} updates."
    job.save(
        trainer.product, run.path / "model", {"title": "A source diffusion model", "about": about, "cycle": trainer.place.cycle}
    )


class Plain:
    """What `unidad pretrain` needs of a pixel model and a folder of pictures; `Captioned` has the same names."""

    def __init__(self, model: Model, folder: Path, settings: PretrainSettings, device: torch.device):
        pictures = load_folder(folder, model.backbone.shape[-1])
        self.scheduler, self.digest, self.count = dict(model.scheduler), pictures.digest, len(pictures)
        self.stream = PictureStream(pictures.pixels, hflip=settings.hflip, seed=settings.seed, device=device)

    def draw(self, product: nn.Module) -> Tensor:
        """Pictures of a sample grid, [N, 3, S, S] uint8."""
        assert isinstance(product, UNet2DBackbone)
        return draw(product, 48)

    def save(self, product: nn.Module, out: Path, facts: dict[str, Any]) -> None:
        """Write a stock folder."""
        assert isinstance(product, UNet2DBackbone)
        save_source(product, self.scheduler, out, facts, half=True)


def start(settings: PretrainSettings) -> Model:
    """The network to train and its noise schedule; a random one has no digest.

    Raises:
        UserError: if `init` names no model that can be trained.
    """
    if settings.init == "scratch":
        scheduler = scheduler_settings(settings)
        schedule = NoiseSchedule(DDPMScheduler.from_config(scheduler).alphas_cumprod)
        unet = random_unet((3, settings.size, settings.size), settings.widths, settings.seed)
        return Model(UNet2DBackbone(unet, schedule, settings.prediction_type), scheduler, "scratch", "")
    model = open_model(settings.init)
    if isinstance(model, TextModel) or (isinstance(model.backbone, UNet2DBackbone) and model.backbone.num_classes is None):
        return model
    raise ModelError(
        f"'{settings.init}' is class-conditional; `unidad pretrain` trains unconditional and text-to-image models only."
    )


def scheduler_settings(settings: PretrainSettings) -> dict[str, object]:
    """The noise schedule as diffusers' schedulers name it."""
    chosen = {"beta_schedule": settings.beta_schedule, "prediction_type": settings.prediction_type}
    config = dict(DDPMScheduler(**chosen).config)
    return {key: config[key] for key in SCHEDULE_KEYS}
