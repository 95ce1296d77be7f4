"""The command that changes formats: convert."""

from __future__ import annotations

import argparse

from rich.console import Console

from unidad.cli.common import Commands, Parser, command, flags
from unidad.cli.converting_sd import add_stable_diffusion


def add_convert(commands: Commands) -> None:
    """`unidad convert KIND`."""
    about = "Checkpoints of other code to diffusers folders, and back."
    more = "`unidad convert KIND --help` has examples for each."
    parser = commands.add_parser("convert", help=about, description=about, epilog=more)
    kinds = parser.add_subparsers(metavar="KIND", required=True, parser_class=Parser)
    _add_from(kinds)
    _add_to(kinds)
    add_stable_diffusion(kinds)


def _add_from(kinds: Commands) -> None:
    parser = command(
        kinds,
        "guided-diffusion",
        "A guided-diffusion checkpoint (.pt) becomes a diffusers folder, to be used as --source.",
        """  unidad convert guided-diffusion ffhq.pt --arch ffhq256 --out models/ffhq256
  unidad convert guided-diffusion mine.pt --head-width 64 --schedule linear --size 128 --out models/mine""",
        _from,
    )
    parser.add_argument("file", metavar="CKPT.pt", help="read without running anything in it; ema weights where there are some")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--arch",
        default="auto",
        help="auto, or a published model: ffhq256, lsun256, imagenet64, imagenet256, imagenet256-uncond (imagenet128 cannot be converted)",
    )
    parser.add_argument(
        "--head-width", type=int, metavar="C", help="channels of an attention head (guided-diffusion's num_head_channels)"
    )
    parser.add_argument("--schedule", choices=("linear", "cosine"), help="noise schedule, of 1000 steps")
    parser.add_argument("--size", type=int, metavar="PX", help="side of its pictures")
    parser.add_argument(
        "--attention-order", choices=("legacy", "new"), help="new if it was trained with use_new_attention_order (legacy)"
    )
    parser.add_argument("--unconditional", action="store_true", help="refuse a class-conditional network")


def _add_to(kinds: Commands) -> None:
    parser = command(
        kinds,
        "to-guided-diffusion",
        "The network of a diffusers folder becomes a guided-diffusion checkpoint: its weights alone, float32.",
        "  unidad convert to-guided-diffusion models/ffhq256 --out ffhq_again.pt",
        _to,
    )
    parser.add_argument("folder", metavar="DIR", help="a diffusers folder or a run")
    parser.add_argument("--out", required=True, metavar="FILE.pt", help="new file")
    parser.add_argument("--attention-order", choices=("legacy", "new"), help="(that of the checkpoint it came from, else legacy)")


def _from(args: argparse.Namespace, _console: Console) -> int:
    from unidad.convert.guided_diffusion import from_guided_diffusion

    unsaid = flags(args, ("head_width", "schedule", "size", "attention_order"))
    facts = from_guided_diffusion(args.file, args.out, args.arch, args.unconditional, **unsaid)
    under = f" (found under '{facts['under'].rstrip('.')}')" if facts["under"] else ""
    classes = f"{facts['classes']} classes" if facts["classes"] else "unconditional"
    print(
        f"{args.out}: {facts['parameters'] / 1e6:.1f} M parameters{under}, {classes}, {facts['size']} px, "
        f"{facts['schedule']} schedule of 1000 steps, heads of {facts['head_width']} channels in {facts['attention_order']} order"
    )
    return 0


def _to(args: argparse.Namespace, _console: Console) -> int:
    from unidad.convert.guided_diffusion import to_guided_diffusion

    facts = to_guided_diffusion(args.folder, args.out, args.attention_order)
    print(f"{args.out}: {facts['parameters'] / 1e6:.1f} M parameters, attention in {facts['attention_order']} order")
    return 0
