"""The commands that use what was trained: sample, evaluate, export, info, doctor."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from unidad.cli.common import DEVICES, Commands, add_class_label, command, tell
from unidad.errors import SettingsError


def add_sample(commands: Commands) -> None:
    """`unidad sample`."""
    parser = command(
        commands,
        "sample",
        "Draw pictures from a run, an exported student, or a many-step model.",
        """  unidad sample runs/mine -n 64 --out pictures
  unidad sample runs/cat -n 4 --prompt "a prt cat on the beach" --prompt "a prt cat in the snow" --out pictures
  unidad sample bundled:avatars -n 16 --steps 50 --out source_pictures
  unidad sample runs/mine -n 5000 --out many --resume""",
        _sample,
    )
    parser.set_defaults(kind="draws", several=True)
    parser.add_argument("model", metavar="RUN_OR_MODEL")
    parser.add_argument("-n", type=int, default=16, help="how many (16)")
    parser.add_argument(
        "--steps", type=int, metavar="K", help="steps; those it was distilled for, or 50 of DDIM for a many-step model"
    )
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on seed + i alone (0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the PNG files and grid.png")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="of a text-to-image student; may be repeated, a row of the grid each",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a folder that was broken off: only what is missing is drawn"
    )
    add_class_label(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        help="changes speed and memory, never the pictures (32 up to 64 pixels or latents a side, fewer above: 2 at 256; without prompts on a GPU four times as many)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")


def add_evaluate(commands: Commands) -> None:
    """`unidad evaluate`."""
    parser = command(
        commands,
        "evaluate",
        "Score samples against held-out pictures: Frechet distance, kernel distance, precision and recall, variety, copying.",
        """  unidad evaluate runs/mine --reference heldout_pictures --train my_pictures
  unidad evaluate folder_of_samples --reference heldout_pictures --json scores.json
  unidad evaluate runs/mine --reference all_pictures --extractor inception-fid --weights pt_inception-2015-12-05-6726825d.pth
  unidad evaluate runs/mine --reference all_pictures --train my_pictures --extractor lpips-vgg --mode paper
  unidad evaluate runs/cat --track sdp --train photos --dino DINO_FOLDER --clip CLIP_FOLDER --scores dino clip""",
        _evaluate,
    )
    parser.set_defaults(several=True)
    parser.add_argument("samples", metavar="RUN_OR_MODEL_OR_FOLDER", help="a run or model to draw from, or a folder of pictures")
    parser.add_argument(
        "--reference",
        metavar="FOLDER",
        help="pictures of the domain that training never saw, or a .npz with mu and sigma",
    )
    parser.add_argument("--train", metavar="FOLDER", help="the training pictures (or bundled:NAME), for copying and variety")
    parser.add_argument(
        "--extractor",
        default="efficientnet-lite0",
        metavar="NAME",
        help="features to compare in: efficientnet-lite0 (default; needs no file), inception-fid, lpips-vgg, lpips-alex, dino, dinov2, clip",
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="FILE",
        help="a weights file of that extractor, whatever its name; may be repeated (or put it into the folder $UNIDAD_WEIGHTS, else "
        "`weights` beside the cached features); for dino, dinov2 and clip a folder saved by transformers, or a hub id",
    )
    parser.add_argument("--download", action="store_true", help="fetch weights that are missing; nothing is fetched without this")
    parser.add_argument(
        "--mode",
        choices=("correct", "paper"),
        default="correct",
        help="how variety is scored; `paper` repeats what the public code computes (correct)",
    )
    _add_subject(parser)
    # `torchrun` takes --n for its own, wherever it stands
    parser.add_argument(
        "-n", "--n", type=int, help="samples to draw, or pictures of a folder to take (1000); with --track sdp of each prompt (4)"
    )
    parser.add_argument("--steps", type=int, metavar="K", help="steps to draw with; as for `unidad sample`")
    parser.add_argument("--seed", type=int, default=0)
    add_class_label(parser)
    parser.add_argument("--json", metavar="FILE", help="write the scores there too")
    parser.add_argument("--panel", metavar="FILE.png", help="picture of the samples nearest to training pictures")
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="do not keep the features of --reference and --train; they are kept by content in ~/.cache/unidad/features (macOS "
        "~/Library/Caches/unidad, Windows %%LOCALAPPDATA%%/unidad/Cache, or $XDG_CACHE_HOME/unidad if that is set)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--track", choices=("fsig", "sdp"), default="fsig", help="sdp: a subject under a list of prompts (fsig)")
    parser.add_argument("--prompts", default="object", metavar="LIST", help="sdp: object, live, or a file of templates (object)")
    parser.add_argument(
        "--scores", nargs="+", choices=("dino", "clip", "lpips"), help="sdp: only these; lpips takes its files from --weights (all)"
    )
    parser.add_argument(
        "--dino",
        metavar="FOLDER",
        help="sdp: a DINO (ViT) or DINOv2 model saved by transformers, or a hub id (facebook/dino-vits16)",
    )
    parser.add_argument("--clip", metavar="FOLDER", help="sdp: a CLIP model saved by transformers with its tokenizer, or a hub id")


def add_export(commands: Commands) -> None:
    """`unidad export`."""
    parser = command(
        commands,
        "export",
        "Write a run's student as a stock diffusers folder with a model card.",
        """  unidad export runs/mine --out my_generator
  unidad export runs/mine --out my_generator --half
  unidad export runs/cat --out cat.safetensors --single-file""",
        _export,
    )
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--half", action="store_true", help="store float16 weights")
    parser.add_argument(
        "--single-file",
        action="store_true",
        help="--out is one .safetensors file in the original layout of Stable Diffusion 1.x, 2.x or XL (UNet, VAE, text encoders)",
    )


def add_info(commands: Commands) -> None:
    """`unidad info`."""
    parser = command(
        commands,
        "info",
        "Say in plain words what a model, run, folder of pictures or .safetensors file is.",
        "  unidad info runs/mine\n  unidad info bundled:avatars\n  unidad info dream.safetensors",
        _info,
    )
    parser.add_argument("path", metavar="PATH")


def add_doctor(commands: Commands) -> None:
    """`unidad doctor`."""
    command(commands, "doctor", "Check this machine: versions, device, memory, disk, known trouble.", "  unidad doctor", _doctor)


def _sample(args: argparse.Namespace, _console: Console) -> int:
    from unidad.commands import sample_to_folder
    from unidad.signals import Stopped

    numbers = (args.steps, args.seed, args.batch_size, args.device, args.class_label)
    try:
        grid = sample_to_folder(args.model, args.n, args.out, *numbers, args.prompt, args.resume)
    except Stopped as stop:
        tell(f"stopped by {stop} {stop.place}. Go on with the same command and --resume.")
        return stop.code
    if grid is not None:  # in the first of several processes
        print(grid)
    return 0


def _evaluate(args: argparse.Namespace, _console: Console) -> int:
    if args.track == "sdp":
        from unidad.evaluate_subject import evaluate_subject

        print(evaluate_subject(args))
        return 0
    from unidad.commands import evaluate_command

    args.n = 1000 if args.n is None else args.n
    if not args.reference:
        raise SettingsError("--reference FOLDER is needed: pictures of the domain that training never saw.")
    scores = evaluate_command(args)
    if scores is not None:  # in the first of several processes
        print(scores)
    return 0


def _export(args: argparse.Namespace, _console: Console) -> int:
    from unidad.commands import export_run, export_single_file

    write = export_single_file if args.single_file else export_run
    print(write(args.model, Path(args.out), args.half))
    return 0


def _info(args: argparse.Namespace, _console: Console) -> int:
    from unidad.info import describe_path

    print(describe_path(args.path))
    return 0


def _doctor(_args: argparse.Namespace, _console: Console) -> int:
    from unidad.info import doctor

    text, healthy = doctor()
    print(text)
    return 0 if healthy else 1
