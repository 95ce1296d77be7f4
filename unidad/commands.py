"""What the commands sample, evaluate and export do, as functions a program can call too."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from unidad import checkpoint
from unidad.backbones.load import STUDENT_FILE, Model, bundled_path, find_folder, read_json, student_steps
from unidad.backbones.load_text import (
    TextModel,
    decode_latents,
    encode_prompts,
    is_text_to_image,
    load_vae,
    open_model,
    pipeline_name,
    refuse_long,
)
from unidad.backbones.lora import LoraRole
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.config import TrainSettings, build_settings
from unidad.convert.single_file import to_single_file
from unidad.data import list_pictures, load_files, load_folder, open_picture
from unidad.device import pick_device
from unidad.distributed import Ranks, connected
from unidad.errors import CheckpointError, DataError, SettingsError
from unidad.export import made, save_source, save_student
from unidad.export_text import save_text_student
from unidad.run import RUN_FILE, RunFolder
from unidad.sample import at_once, draw
from unidad.samples_folder import GRID, fill, grid_of, new_folder, open_samples, refuse_full_folder, weights_digest
from unidad.sheets import labelled_grid
from unidad.signals import Stopped, passing_on

DEFAULT_DDIM_STEPS = 50
DRAWN_AT_ONCE = 50  # pictures to be scored


def load_product(name: str | Path) -> Model:
    """A model folder, a bundled model, or a run: its finished student or model, else the newest checkpoint's.

    Raises:
        UserError: if it is none of these, or a run without a checkpoint.
    """
    path = Path(name)
    if not (path / RUN_FILE).exists():
        return open_model(name)
    run = RunFolder(path)
    facts = run.read()
    for finished in (run.student, run.path / "model"):
        if finished.is_dir():
            _note_newer(run, finished)
            return open_model(finished)
    if facts["kind"] != "train":
        raise CheckpointError(f"'{path}' is a {facts['kind']} run that has not finished. Go on with --resume.")
    found = checkpoint.latest(run.checkpoints)
    if found is None:
        raise CheckpointError(f"'{path}' has no checkpoint yet. Go on with --resume.")
    settings = build_settings(TrainSettings, facts["settings"])
    model = open_model(settings.source)
    warnings.warn(f"'{path}' has not finished: this is its checkpoint of cycle {found[0].lstrip('0')}.", stacklevel=2)
    tensors = found[1].tensors
    averaged = {k.removeprefix("module."): v for k, v in tensors.get("ema", {}).items() if k.startswith("module.")}
    try:
        weights = averaged or tensors[f"network.{facts.get('product', 'student')}"]
        model = _with_weights(model, weights, settings.lora_rank)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint in '{path}' does not fit its source: {' '.join(str(error).split())[:200]}") from None
    steps = student_steps(facts.get("student_steps"), len(model.backbone.schedule), path / RUN_FILE)
    model = replace(
        model, name=str(name), student_steps=steps, class_label=None if settings.class_label < 0 else settings.class_label
    )
    return replace(model, prompt=settings.prompt) if isinstance(model, TextModel) else model


def _note_newer(run: RunFolder, product: Path) -> None:
    """Say so where a run has gone on since its product was written."""
    notes = read_json(product / STUDENT_FILE) if (product / STUDENT_FILE).exists() else {}
    written, last = notes.get("cycle"), (checkpoint.names(run.checkpoints) or ["0"])[-1].split("-")[0]
    if isinstance(written, int) and last.isdigit() and int(last) > written:
        warnings.warn(
            f"'{product}' is of cycle {written}, and its run has gone on to {int(last)}: finish it with --resume to have that.",
            stacklevel=3,
        )


def _with_weights(model: Model, weights: dict[str, Tensor], lora_rank: int) -> Model:
    if lora_rank and isinstance(model.backbone, UNet2DCondBackbone):
        role = LoraRole(model.backbone, "student", lora_rank, model.backbone.prompts)
        role.load_state_dict(weights, strict=True)
        return replace(model, backbone=role.merged())
    model.backbone.load_state_dict(weights, strict=True)
    return model


def draw_from(model: Model, n: int, steps: int | None, seed: int, batch_size: int, device: str, label: int | None = None) -> Tensor:
    """N pictures, [n, 3, H, W] uint8: with `steps` student steps or DDIM steps, or as many as the model was made for.

    Raises:
        SettingsError: if a number cannot be used.
    """
    _check_numbers(n, steps, seed, batch_size)
    if isinstance(model, TextModel):
        raise SettingsError(f"'{model.name}' needs prompts: draw with `unidad sample --prompt TEXT` and give that folder instead.")
    backbone, label = model.backbone.to(pick_device(device)), _check_drawing(model, steps, label)
    if model.student_steps is None:
        return draw(backbone, n, seed, ddim_steps=steps or DEFAULT_DDIM_STEPS, batch_size=batch_size, label=label)
    return draw(backbone, n, seed, steps=_grid(model, steps), batch_size=batch_size, label=label)


def _check_drawing(model: Model, steps: int | None, label: int | None) -> int | None:
    """The class to draw; raises SettingsError where the model has no such class or steps."""
    classes, label = model.backbone.num_classes, model.class_label if label is None else label
    if (classes is None) != (label is None) or not 0 <= (label or 0) < (classes or 1):
        knows = "knows no classes" if classes is None else f"needs --class-label 0..{classes - 1}"
        raise SettingsError(f"'{model.name}' {knows}.")
    if model.student_steps is None and (steps or 0) > len(model.backbone.schedule):
        raise SettingsError(f"--steps must be at most {len(model.backbone.schedule)}.")
    if model.student_steps is not None:
        _grid(model, steps)
    return label


def _check_numbers(n: int, steps: int | None, seed: int, batch_size: int) -> None:
    if n < 1 or batch_size < 1 or (steps is not None and steps < 1):
        raise SettingsError("-n, --batch-size and --steps must be at least 1.")
    if not 0 <= seed <= 2**31:
        raise SettingsError(f"--seed must lie between 0 and 2147483648, not {seed}.")


def _grid(student: Model, steps: int | None) -> list[int]:
    assert student.student_steps is not None
    if steps is None or steps == len(student.student_steps):
        return student.student_steps
    try:
        other = student.backbone.schedule.student_steps(steps)
    except ValueError as error:
        raise SettingsError(f"--steps: {error}.") from None
    learnt = len(student.student_steps)
    warnings.warn(
        f"The student learnt to draw in {learnt} steps; expect worse pictures in {steps}. Leave --steps out.", stacklevel=1
    )
    return other


def draw_prompts(
    model: TextModel, prompts: Sequence[str], n: int, steps: int | None, seed: int, batch_size: int, device: str
) -> Tensor:
    """For each prompt the same n seeds, [prompts, n, 3, S, S] uint8, without guidance.

    Raises:
        SettingsError: if a number cannot be used, a prompt is too long, or the model is no few-step student.
    """
    check_prompts(model, prompts, n, steps, seed, batch_size)
    chip, backbone = pick_device(device), model.backbone
    assert isinstance(backbone, UNet2DCondBackbone)
    backbone.set_prompts(encode_prompts(model.folder, [*prompts, ""]))
    backbone, grid = backbone.to(chip), _grid(model, steps)
    decode = partial(decode_latents, load_vae(model.folder).to(chip))
    rows = [draw(backbone, n, seed, grid, batch_size=batch_size, label=i, decode=decode) for i in range(len(prompts))]
    return torch.stack(rows)


def check_prompts(model: TextModel, prompts: Sequence[str], n: int, steps: int | None, seed: int, batch_size: int) -> None:
    """Raise the SettingsError that `draw_prompts` would, without drawing."""
    _check_numbers(n, steps, seed, batch_size)
    if model.student_steps is None:
        raise SettingsError(f"'{model.name}' is a many-step model. Draw from it with diffusers' {pipeline_name(model.folder)}.")
    _grid(model, steps)
    refuse_long(model.folder, list(prompts))


def sample_to_folder(
    name: str,
    n: int,
    out: str | Path,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    label: int | None = None,
    prompts: Sequence[str] = (),
    resume: bool = False,
) -> Path | None:
    """Draw n pictures into a folder, named by their seed, with a grid.png; returns the grid's path.

    Several processes, as `torchrun` starts them, share the pictures out; None in all but the first.

    With `resume` a folder that was broken off is gone on with, and ends as if it had not been; also with a larger n.

    A `batch_size` of None is `at_once` of the pictures' side. From a text-to-image student n for each prompt (none: that it was trained with), a row of the grid each.

    Raises:
        UserError: as `load_product`, `draw_from` and `open_samples` do.
        Stopped: by SIGINT, SIGTERM or SIGHUP while pictures were drawn; those that are there are whole.
    """
    model = load_product(name)
    place = None if isinstance(model, TextModel) else pick_device(device)
    batch_size = at_once(model.backbone.shape[-1], device=place) if batch_size is None else batch_size
    with connected(Accelerator(cpu=pick_device(device).type == "cpu")) as ranks:
        if isinstance(model, TextModel):
            if resume or ranks.count > 1:
                raise SettingsError("Text-to-image students are drawn from in one process, without --resume, into a new --out.")
            refuse_full_folder(Path(out))
            prompts = prompts or [model.prompt]
            return _save_prompts(draw_prompts(model, prompts, n, steps, seed, batch_size, device), prompts, seed, new_folder(out))
        if prompts:
            raise SettingsError(f"'{model.name}' is no text-to-image model: leave out --prompt.")
        _check_numbers(n, steps, seed, batch_size)
        made_with = {"model": weights_digest(model.backbone), "steps": steps, "seed": seed, "label": label}
        _check_drawing(model, steps, label)
        if ranks.first:
            open_samples(out, made_with, resume)
        ranks.wait()
        folder = Path(out)
        draw_some = partial(_draw_some, model, steps, batch_size, device, label)
        with passing_on(_stop_drawing):
            fill(folder, n, seed, batch_size, draw_some, ranks.rank, ranks.count)
            ranks.wait()
            return grid_of(folder, n, seed) if ranks.first else None


def _stop_drawing(signum: int) -> None:
    raise Stopped(signum, "while drawing; the pictures that are there are whole")


def _draw_some(model: Model, steps: int | None, batch_size: int, device: str, label: int | None, n: int, seed: int) -> Tensor:
    return draw_from(model, n, steps, seed, batch_size, device, label)


def _save_prompts(pixels: Tensor, prompts: Sequence[str], seed: int, folder: Path) -> Path:
    for row in range(len(prompts)):
        for i, picture in enumerate(pixels[row]):
            Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{row:02d}-{seed + i:06d}.png")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    seeds = [f"seed {seed + i}" for i in range(pixels.shape[1])]
    labelled_grid(list(pixels), prompts, seeds, scale=max(1, 64 // pixels.shape[-1])).save(folder / GRID)
    return folder / GRID


def evaluate_command(args: argparse.Namespace) -> str | None:
    """`unidad evaluate`: returns the table; writes --json and --panel.

    Several processes, as `torchrun` starts them, share the drawing and the features out; None in all but the first.

    Raises:
        UserError: as loading and drawing do.
    """
    from unidad.metrics.evaluate import evaluate, nearest_panel, score_names, table
    from unidad.metrics.extractors import load_extractor
    from unidad.metrics.lpips import Lpips
    from unidad.metrics.reference import load_statistics
    from unidad.metrics.shared import share_features
    from unidad.metrics.weights import cache_folder

    _check_evaluate(args)
    with connected(Accelerator(cpu=pick_device(args.device).type == "cpu")) as ranks:
        statistics = load_statistics(args.reference) if args.reference.endswith(".npz") else None
        extractor = load_extractor(args.extractor, args.weights, args.download, pick_device(args.device))
        samples, facts = _samples(args, ranks)
        size = samples.shape[-1]
        reference = statistics or load_folder(bundled_path(args.reference, "targets"), size).pixels
        train = load_folder(bundled_path(args.train, "targets"), size).pixels if args.train else None
        cache = None if args.no_cache else cache_folder() / "features"
        if not isinstance(extractor, Lpips):  # which compares pairs, in the first process
            sets = ((samples, None), (reference, cache), (train, cache))
            extractor = share_features(extractor, [(x, place) for x, place in sets if isinstance(x, Tensor)], ranks)
    if not ranks.first:
        return None
    seed = args.seed if facts["drawn_with"] else None
    scores = evaluate(samples, reference, train, extractor, mode=args.mode, seed=seed, cache_dir=cache) | facts
    if args.json:
        written = {k: v for k, v in scores.items() if k != "nearest"} | {"names": score_names(extractor.name)}
        Path(args.json).write_text(json.dumps(written, indent=1) + "\n")
    if args.panel:
        assert train is not None
        nearest_panel(samples, train, scores["nearest"]).save(args.panel)
    return table(scores)


def _check_evaluate(args: argparse.Namespace) -> None:
    """Raise SettingsError or DataError for what would otherwise come out after minutes of drawing."""
    if args.panel and not args.train:
        raise SettingsError("--panel needs --train FOLDER.")
    if args.extractor.startswith("lpips-") and not args.train:
        raise SettingsError(f"{args.extractor} scores variety and copying, which need the training pictures: add --train FOLDER.")
    if args.n < 2:
        raise SettingsError("--n must be at least 2.")
    for flag, file in (("--json", args.json), ("--panel", args.panel)):
        if file and not Path(file).absolute().parent.is_dir():
            raise SettingsError(f"{flag}: there is no folder '{Path(file).parent}'. Make it first or give another file.")
        if file and Path(file).is_dir():
            raise SettingsError(f"{flag}: '{file}' is a folder. Give the name of a file to write.")
    if args.panel and Path(args.panel).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise SettingsError(f"--panel writes a picture: '{args.panel}' must end in .png or .jpg or .jpeg or .webp.")
    for folder in filter(None, (args.train, None if args.reference.endswith(".npz") else args.reference)):
        list_pictures(bundled_path(folder, "targets"))


def _samples(args: argparse.Namespace, ranks: Ranks) -> tuple[Tensor, dict[str, object]]:
    path = Path(args.samples)
    is_model = args.samples.startswith("bundled:") or (path / RUN_FILE).exists() or (path / "model_index.json").exists()
    if not is_model:
        files = [file for file in list_pictures(path) if file.name != GRID]
        if not files:
            raise DataError(f"'{path}' holds no pictures but a grid.")
        if args.n != len(files):
            warnings.warn(f"'{path}' holds {len(files)} pictures, --n is {args.n}: the fewer are scored.", stacklevel=2)
        size = min(open_picture(files[0])[0].size)
        return load_files(files[: args.n], size, path).pixels, {"drawn_with": None}
    model = load_product(args.samples)
    pixels = _draw_together(model, args, ranks)
    nfe = args.steps or (len(model.student_steps) if model.student_steps else DEFAULT_DDIM_STEPS)
    return pixels, {"drawn_with": {"nfe": nfe, "seed": args.seed}}


def _draw_together(model: Model, args: argparse.Namespace, ranks: Ranks) -> Tensor:
    """The pictures that one process draws, to the bit: of its batches each process draws every count-th."""
    together = at_once(model.backbone.shape[-1], DRAWN_AT_ONCE, pick_device(args.device))
    draw_some = partial(_draw_some, model, args.steps, together, args.device, args.class_label)
    if ranks.count == 1:
        return draw_some(args.n, args.seed)
    pixels = torch.zeros(args.n, *model.backbone.shape, dtype=torch.uint8)
    for start in range(ranks.rank * together, args.n, ranks.count * together):
        some = draw_some(min(together, args.n - start), args.seed + start)
        pixels[start : start + len(some)] = some
    return ranks.filled(pixels)


def export_run(name: str, out: Path, half: bool = False) -> Path:
    """Write a run's product as a stock diffusers folder; returns `out`.

    Raises:
        UserError: no run or model there, or `out` is not empty.
    """
    model = load_product(name)
    refuse_full_folder(out)
    assert isinstance(model.backbone, UNet2DBackbone)
    run = RunFolder(Path(name))
    facts: dict[str, object] = {"about": "Exported with unidad."}
    if model.class_label is not None:
        facts["class_label"] = model.class_label
    if (run.path / RUN_FILE).exists() and run.read()["kind"] == "train":
        data, settings = run.read().get("data", {}), run.read()["settings"]
        facts |= {
            "source": Path(str(settings.get("source", ""))).name,
            "target": f"{data.get('target')} ({data.get('count')} pictures)",
            "made": made(settings),
        }
    if isinstance(model, TextModel):
        if model.student_steps is None:
            raise SettingsError(f"'{name}' is no few-step student; there is nothing to export.")
        assert isinstance(model.backbone, UNet2DCondBackbone)
        prompt = facts | {"prompt": model.prompt}
        save_text_student(model.backbone, model.scheduler, model.student_steps, model.folder, out, prompt, half)
    elif model.student_steps is None:
        save_source(model.backbone, model.scheduler, out, facts, half)
    else:
        save_student(model.backbone, model.scheduler, model.student_steps, out, facts, half)
    return out


def export_single_file(name: str, out: Path, half: bool = False) -> Path:
    """Write a text-to-image run's product as one `.safetensors` file in the original layout; returns `out`.

    Raises:
        UserError: it is no text-to-image model; or as `export_run` and `to_single_file` do.
    """
    if (find_folder(name) / "model_index.json").exists():  # finished
        _refuse_pixels(name, find_folder(name))
        to_single_file(name, out, half)
        return out
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unidad-", dir=out.absolute().parent) as place:
        student = export_run(name, Path(place) / "student")
        _refuse_pixels(name, student)
        to_single_file(student, out, half)
    return out


def _refuse_pixels(name: str, folder: Path) -> None:
    if not is_text_to_image(folder):
        raise SettingsError(
            f"'{name}' draws pixels; only Stable Diffusion (1.x, 2.x, XL) has a layout in one file. Leave out --single-file."
        )
