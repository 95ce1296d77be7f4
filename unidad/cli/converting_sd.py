"""Formats of Stable Diffusion: convert single-file, to-single-file, lora."""

from __future__ import annotations

import argparse

from rich.console import Console

from unidad.cli.common import Commands, command


def add_stable_diffusion(kinds: Commands) -> None:
    """`unidad convert single-file`, `to-single-file` and `lora`."""
    _add_from(kinds)
    _add_to(kinds)
    _add_lora(kinds)


def _add_from(kinds: Commands) -> None:
    parser = command(
        kinds,
        "single-file",
        "A Stable Diffusion 1.x, 2.x or XL checkpoint in one .safetensors file becomes a diffusers folder, to be used as --source.",
        "  unidad convert single-file dream.safetensors --config SD_FOLDER --out models/dream",
        _from,
    )
    parser.add_argument("file", metavar="FILE.safetensors", help="in the original layout; pickled .ckpt files are refused")
    parser.add_argument(
        "--config",
        required=True,
        metavar="FOLDER",
        help="a diffusers folder of the same family: its small files are used (networks' configurations, tokenizer, noise schedule and "
        "prediction type), its weights are not and may be missing; or a hub id, which is fetched",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--half", action="store_true", help="store float16 weights (float32)")


def _add_to(kinds: Commands) -> None:
    parser = command(
        kinds,
        "to-single-file",
        "A Stable Diffusion 1.x, 2.x or XL folder or run becomes one .safetensors file in the original layout (UNet, VAE, text encoders).",
        "  unidad convert to-single-file runs/cat --out cat.safetensors --half",
        _to,
    )
    parser.add_argument("folder", metavar="DIR", help="a diffusers folder, an exported student, or a finished run")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="new file")
    parser.add_argument("--half", action="store_true", help="store float16 weights (float32)")


def _add_lora(kinds: Commands) -> None:
    parser = command(
        kinds,
        "lora",
        "A LoRA of Stable Diffusion 1.x, 2.x or XL changes the names of its weights: diffusers' or kohya's, which ComfyUI reads too.",
        """  unidad convert lora runs/cat --out cat.safetensors --format kohya
  unidad convert lora cat.safetensors --out diffusers/pytorch_lora_weights.safetensors --format diffusers""",
        _lora,
    )
    parser.add_argument("file", metavar="FILE_OR_RUN", help="a .safetensors file of either format, or a run with LoRA roles")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="new file")
    parser.add_argument("--format", required=True, choices=("kohya", "diffusers"), help="of the new file")


def _from(args: argparse.Namespace, _console: Console) -> int:
    from unidad.convert.single_file import from_single_file

    facts = from_single_file(args.file, args.config, args.out, args.half)
    print(
        f"{args.out}: {facts['parameters'] / 1e6:.1f} M parameters; noise schedule, prediction type ({facts['prediction_type']}) and "
        f"tokenizer are those of {args.config}"
    )
    return 0


def _to(args: argparse.Namespace, _console: Console) -> int:
    from unidad.convert.single_file import to_single_file

    facts = to_single_file(args.folder, args.out, args.half)
    print(
        f"{args.out}: {facts['parameters'] / 1e6:.1f} M parameters, text encoder in {facts['text_encoder']}'s layout, no scheduler"
    )
    return 0


def _lora(args: argparse.Namespace, _console: Console) -> int:
    from unidad.convert.kohya import convert_lora

    facts = convert_lora(args.file, args.out, args.format)
    folded = f", alpha folded into {facts['folded']} of them" if facts["folded"] else ""
    print(f"{args.out}: {facts['layers']} layers of rank {facts['rank']} by the names of {args.format}{folded}")
    return 0
