"""`unidad evaluate --track sdp`: a subject under a list of prompts, drawn from a run or read from a folder with metadata.jsonl."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unidad.backbones.load import bundled_path
from unidad.backbones.load_text import TextModel, picture_side
from unidad.captions import METADATA, read_captions
from unidad.commands import GRID, check_prompts, draw_prompts, load_product
from unidad.data import list_pictures, load_files, load_folder, open_picture
from unidad.device import pick_device
from unidad.errors import DataError, SettingsError
from unidad.metrics.extractors import load_extractor
from unidad.metrics.lpips import Lpips
from unidad.metrics.subject import image_likeness, prompt_likeness, prompt_variety
from unidad.metrics.vision import VisionFeatures, dino_family
from unidad.prompts import in_contexts, read_templates
from unidad.run import RUN_FILE, RunFolder
from unidad.sheets import labelled_grid

SCORES = ("dino", "clip", "lpips")
ROWS = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "intra_lpips": "Intra-LPIPS", "inter_lpips": "Inter-LPIPS"}
PER_PROMPT = 4
DRAWN_AT_ONCE = 4


@dataclass(frozen=True)
class Drawn:
    """Samples [N, 3, S, S] uint8, those of one prompt together, and the row of each one's text, [N] int64, in `texts`."""

    pixels: Tensor
    texts: list[str]
    prompt_of: Tensor
    facts: dict[str, Any]


def evaluate_subject(args: argparse.Namespace) -> str:
    """Returns the table; writes --json and --panel.

    Raises:
        UserError: a folder, flag or weights file is missing or does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError("--track sdp is scored in one process, and several were launched. Start it by itself.")
    if not args.train:
        raise SettingsError("--track sdp compares with the subject's photos: add --train PHOTOS.")
    for flag, file in (("--json", args.json), ("--panel", args.panel)):
        if file and not Path(file).absolute().parent.is_dir():
            raise SettingsError(f"{flag}: there is no folder '{Path(file).parent}'. Make it first or give another file.")
    draw, side = _looked_at(args)
    photos = load_folder(bundled_path(args.train, "targets"), side).pixels
    judges = _judges(args)
    drawn = draw()
    result = score_subject(drawn, photos, judges) | drawn.facts
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.panel:
        _panel(drawn).save(args.panel)
    return _table(result)


def _panel(drawn: Drawn) -> Image.Image:
    """A row for each prompt as it was drawn, and the seeds where they are known."""
    told = drawn.facts["drawn_with"]
    rows = [drawn.pixels[drawn.prompt_of == i] for i in range(len(drawn.texts))]
    seeds = [f"seed {seed}" for seed in range(told["seeds"][0], told["seeds"][1] + 1)] if told else []
    return labelled_grid(rows, told["prompts"] if told else drawn.texts, seeds, scale=max(1, 64 // drawn.pixels.shape[-1]))


def _judges(args: argparse.Namespace) -> dict[str, Any]:
    """The extractors of the scores asked for; nothing is drawn before they are there."""
    given = {"dino": [args.dino] if args.dino else [], "clip": [args.clip] if args.clip else [], "lpips": args.weights}
    scores, device = args.scores or SCORES, pick_device(args.device)
    names = {"dino": dino_family(args.dino, args.download) if "dino" in scores else "", "clip": "clip", "lpips": "lpips-vgg"}
    return {score: load_extractor(names[score], given[score], args.download, device) for score in scores}


def score_subject(drawn: Drawn, photos: Tensor, judges: dict[str, Any]) -> dict[str, Any]:
    """Scores of samples against photos [M, 3, S, S] uint8 by extractors under "dino", "clip", "lpips"; None for those left out."""
    result: dict[str, Any] = dict.fromkeys(ROWS)
    if "dino" in judges:
        result["dino"] = image_likeness(judges["dino"](drawn.pixels), judges["dino"](photos))
    if "clip" in judges:
        clip: VisionFeatures = judges["clip"]
        samples = clip(drawn.pixels)
        result["clip_i"] = image_likeness(samples, clip(photos))
        result["clip_t"] = prompt_likeness(samples, clip.texts(drawn.texts), drawn.prompt_of)
    if "lpips" in judges:
        lpips: Lpips = judges["lpips"]
        variety = prompt_variety(lpips.batches(drawn.pixels), drawn.prompt_of)
        result |= {"intra_lpips": variety.intra, "inter_lpips": variety.inter}
    used = {name: {"name": judge.name, "digest": judge.digest, "resize": judge.resize} for name, judge in judges.items()}
    counts = {"samples": len(drawn.pixels), "prompts": len(drawn.texts), "photos": len(photos)}
    return result | counts | {"extractors": used, "texts": drawn.texts}


def _looked_at(args: argparse.Namespace) -> tuple[Callable[[], Drawn], int]:
    """What gives the samples, and their side, once everything about the run or folder is known to be usable."""
    if (Path(args.samples) / RUN_FILE).exists():
        return _from_run(args)
    read = _from_folder(Path(args.samples))
    return lambda: read, read.pixels.shape[-1]


def _from_folder(path: Path) -> Drawn:
    if not (path / METADATA).exists():
        raise DataError(f"'{path}' is neither a run nor a folder of pictures with a {METADATA} that tells each one's prompt.")
    files = [file for file in list_pictures(path) if file.name != GRID]
    if not files:
        raise DataError(f"'{path}' holds no pictures but a grid.")
    captions = read_captions(path, [file.name for file in files])
    if captions is None:
        raise DataError(
            f'\'{path / METADATA}\' names no picture. Give a line such as {{"file_name": "1.png", "text": "a cat"}} each.'
        )
    texts = list(dict.fromkeys(captions))
    order = sorted(range(len(files)), key=lambda i: texts.index(captions[i]))
    size = min(open_picture(files[0])[0].size)
    pixels = load_files([files[i] for i in order], size, path).pixels
    if len(pixels) != len(files):
        raise DataError(f"Of the pictures in '{path}' some cannot be read. Repair or remove them, and their lines of {METADATA}.")
    return Drawn(pixels, texts, torch.tensor([texts.index(captions[i]) for i in order]), {"drawn_with": None})


def _from_run(args: argparse.Namespace) -> tuple[Callable[[], Drawn], int]:
    model = load_product(args.samples)
    settings = RunFolder(Path(args.samples)).read()["settings"]
    if not isinstance(model, TextModel):
        raise SettingsError(f"'{args.samples}' is no text-to-image run: leave out --track sdp.")
    if not settings.get("class_prompt"):
        raise SettingsError(
            f"'{args.samples}' was trained without class_prompt, which CLIP-T compares with. Score a folder of its samples."
        )
    templates, n = read_templates(args.prompts), PER_PROMPT if args.n is None else args.n
    prompts, texts = (in_contexts(templates, settings[which]) for which in ("prompt", "class_prompt"))
    check_prompts(model, prompts, n, args.steps, args.seed, DRAWN_AT_ONCE)

    def draw() -> Drawn:
        drawn = draw_prompts(model, prompts, n, args.steps, args.seed, DRAWN_AT_ONCE, args.device)
        steps = args.steps or len(model.student_steps or [])
        facts = {"drawn_with": {"nfe": steps, "seeds": [args.seed, args.seed + n - 1], "prompts": prompts}}
        return Drawn(drawn.flatten(0, 1), texts, torch.arange(len(texts)).repeat_interleave(n), facts)

    return draw, picture_side(model.folder)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['samples']} samples of {result['prompts']} prompts against {result['photos']} photos"]
    lines += [f"  {name:<12}{'-' if result[key] is None else format(result[key], '.4f'):>9}" for key, name in ROWS.items()]
    lines += [f"  {score}: {used['name']}, {used['digest'][:12]}" for score, used in result["extractors"].items()]
    return "\n".join(lines)
