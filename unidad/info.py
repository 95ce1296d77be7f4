"""Plain words about a path (`unidad info`) and about this machine (`unidad doctor`)."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from unidad.backbones.load import BUNDLED, bundled_names, bundled_path, load_model
from unidad.backbones.load_text import TextModel, open_model
from unidad.backbones.single_file import CONVERTED, family, read_shapes
from unidad.config import TrainSettings, build_settings
from unidad.data import list_pictures, open_picture
from unidad.device import pick_device, use_bf16
from unidad.errors import DataError, ModelError, UserError
from unidad.export import is_dmd2
from unidad.run import RUN_FILE, RunFolder, package_version

# As in pyproject.toml, with what an older one lacks.
LEAST: dict[str, tuple[tuple[int, ...], str]] = {
    "torch": ((2, 10), "its files could run code"),
    "diffusers": ((0, 36), "beside transformers 5 it cannot be imported"),
    "accelerate": ((1, 0), "devices and trackers were never tried with it"),
    "safetensors": ((0, 5), "it was never tried"),
    "pillow": ((11,), "its picture decoders have known holes"),
}


def describe_path(name: str) -> str:
    """What a bundled name, run, model folder, folder of pictures or `.safetensors` file is.

    Raises:
        UserError: if it is none of these; says what it looks like instead.
    """
    if name.startswith(BUNDLED):
        targets = bundled_names("targets")
        return _pictures(bundled_path(name, "targets")) if name.removeprefix(BUNDLED) in targets else _model(name)
    path = Path(name)
    if not path.exists():
        known = ", ".join(BUNDLED + n for n in bundled_names("models") + bundled_names("targets"))
        raise DataError(f"There is nothing at '{name}'. Bundled: {known}.")
    if path.is_file() and path.suffix == ".safetensors":
        return _weights_file(path)
    if (path / RUN_FILE).exists():
        return _run(path)
    if (path / "model_index.json").exists() or (path / "config.json").exists():
        return _model(name)
    try:
        return _pictures(path)
    except DataError as error:
        raise DataError(f"'{name}' is no run, no diffusers model, and no folder of pictures. {error}") from None


def _weights_file(path: Path) -> str:
    shapes = read_shapes(path)
    kind, numbers = family(shapes), sum(prod(shape) for shape in shapes.values())
    hint = f"\n  use it       unidad convert single-file {path} --config FOLDER --out DIR" if kind in CONVERTED else ""
    return f"{path}: looks like {kind}\n  size         {numbers / 1e6:.1f} million numbers in {len(shapes)} tensors{hint}"


def _model(name: str) -> str:
    model = open_model(name)
    channels, height, width = model.backbone.shape
    parameters = sum(p.numel() for p in model.backbone.parameters())
    kind = (
        f"a {len(model.student_steps)}-step student (timesteps {model.student_steps})"
        if model.student_steps
        else "a many-step diffusion model"
    )
    classes = f", {model.backbone.num_classes} classes" if model.backbone.num_classes else ""
    what = "latents " if isinstance(model, TextModel) else "pictures"
    return (
        f"{name}: {kind}\n  {what}   {width}x{height}, {channels} channels{classes}\n  size       {parameters / 1e6:.1f} million parameters\n"
        f"  predicts   {model.scheduler['prediction_type']}, schedule {model.scheduler['beta_schedule']}, "
        f"{len(model.backbone.schedule)} timesteps\n  sha256     {model.digest}"
    )


def _run(path: Path) -> str:
    from unidad import checkpoint
    from unidad.report import read_log

    run = RunFolder(path)
    facts, rows = run.read(), read_log(run.log)
    settings, data = facts["settings"], facts.get("data", {})
    saved = checkpoint.names(run.checkpoints)
    cycle = max(rows[-1]["cycle"] if rows else 0, int(saved[-1]) if saved and saved[-1].isdigit() else 0)
    minutes = rows[-1]["seconds"] / 60 if rows else 0.0
    of = settings.get("cycles", "?")
    product = next((p for p in (run.student, run.path / "model") if p.is_dir()), None)
    early = (
        f", ended early ({settings.get('max_minutes')} minutes at the most)"
        if product and settings.get("max_minutes") and cycle < of
        else ""
    )
    lines = [
        f"{path}: a {facts['kind']} run, cycle {cycle} of {of}, {f'{minutes:.1f} minutes' if rows else 'no log line yet'}{early}",
        f"  pictures     {data.get('count', '?')} in {data.get('target', data.get('folder', '?'))}",
        f"  checkpoints  {', '.join(saved) or 'none'}",
        f"  product      {product or 'not written yet'}",
    ]
    if facts["kind"] == "train":
        lines.insert(1, f"  method       {_method(facts)}")
    return "\n".join(lines)


def _method(facts: dict[str, Any]) -> str:
    """What made it, with the numbers that mattered to that."""
    settings, steps = build_settings(TrainSettings, facts["settings"]), facts.get("student_steps")
    alone = is_dmd2(facts["settings"])
    words = ["distribution matching with the source teacher alone, as `unidad distill`" if alone else settings.method]
    words += ["without a target teacher"] if settings.target_teacher == "off" and not alone else []
    words += [f"K={len(steps)}"] if isinstance(steps, list) else []
    words += [f"a={settings.a}"] if settings.method == "uni-dad" and not alone else []
    words += [] if settings.method in ("finetune", "distill-then-adapt") else [f"k={settings.fake_updates}"]
    return ", ".join([*words, f"source {settings.source}"])


def _pictures(path: Path) -> str:
    files = list_pictures(path)
    sizes, notes, refused = [], [], []
    for file in files[:1000]:
        try:
            image, more = open_picture(file)
            sizes.append(image.size)
            notes += more
        except UserError as error:
            refused.append(str(error))
    shortest = min((min(size) for size in sizes), default=0)
    text = f"{path}: a folder of {len(files)} pictures, shorter side {shortest} pixels or more"
    if refused:
        refused.append(f"{len(refused)} of them cannot be used, and no command takes the folder until they are gone.")
    return text + "".join(f"\n  note: {note}" for note in refused[-20:] + notes[:20])


def doctor() -> tuple[str, bool]:
    """A page about this machine, and whether nothing on it is known to be broken."""
    lines = [f"python       {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    lines += [
        f"{name:12} {package_version(name) or 'missing'}"
        for name in ("unidad", "torch", "diffusers", "accelerate", "safetensors", "pillow")
    ]
    trouble = _trouble()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        lines.append(f"device       {torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    else:
        threads = torch.get_num_threads()
        kind = "mps" if torch.backends.mps.is_available() else "cpu"
        lines.append(f"device       {kind}, {threads} thread{'s' if threads > 1 else ''}")
    lines.append(f"precision    {_number_formats()}")
    memory = _free_memory()
    lines.append(f"memory       {'unknown' if memory is None else f'{memory / 1e9:.1f} GB free'}")
    disk = shutil.disk_usage(Path.cwd()).free
    lines.append(f"disk         {disk / 1e9:.1f} GB free here")
    if disk < 1e9:
        trouble.append("Under 1 GB of disk is free here: checkpoints may not fit. Give --out on another disk.")
    if memory is not None and memory < 2e9:
        trouble.append("Under 2 GB of memory is free: close other programs before training.")
    lines.append(
        f"bundled      models: {', '.join(bundled_names('models')) or 'none'}; targets: {', '.join(bundled_names('targets'))}"
    )
    lines += [f"trouble      {sentence}" for sentence in trouble] or ["No known trouble."]
    return "\n".join(lines), not trouble


def _trouble() -> list[str]:
    found = []
    for name, (least, why) in LEAST.items():
        installed = package_version(name)
        if installed is not None and _release(installed) < least:
            wanted = ".".join(str(part) for part in least)
            found.append(f"{name} {installed} is too old ({why}): pip install '{name}>={wanted}'.")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        found.append("There is an NVIDIA driver here, but this torch finds no GPU: install a CUDA build of torch, see pytorch.org.")
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except Exception as error:  # a broken torchvision raises whatever its extension raises
            found.append(f"torchvision is installed but broken ({error}); it breaks other imports: pip uninstall torchvision.")
    elif importlib.util.find_spec("torch_fidelity") is not None:
        found.append("torch-fidelity without torchvision breaks torchmetrics: pip uninstall torch-fidelity.")
    for name in bundled_names("models"):
        try:
            load_model(BUNDLED + name)
        except ModelError as error:
            found.append(f"{error} Install unidad again.")
    return found


def _release(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _number_formats() -> str:
    """Which number format precision=auto takes here, and what is not to be combined with it."""
    device = pick_device("auto")
    if use_bf16("auto", device):
        trap = (
            "; not together with compile=true (torch 2.13 gives zero gradients), which is refused" if device.type == "cpu" else ""
        )
        return f"bf16 autocast{trap}"
    return "fp32" + ("; bf16 is emulated by this CPU, many times slower" if device.type == "cpu" else "")


def _free_memory() -> int | None:
    try:
        with Path("/proc/meminfo").open() as handle:
            return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
