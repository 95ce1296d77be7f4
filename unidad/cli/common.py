"""What every command's parser shares: its shape, the flags of a training run, and their values."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

Commands = argparse._SubParsersAction  # argparse has no public name for it
DEVICES = ("auto", "cpu", "cuda", "mps")


def tell(text: str) -> None:
    """One sentence on stderr about how a command ended; of several processes only the first that has something to say says it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from unidad.distributed import first_to_speak

        if not first_to_speak():
            return
    print(f"unidad: {text}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Bad arguments end in one sentence that names the help to read, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        tell(f"{message}. See `{self.prog} --help`.")
        raise SystemExit(2)


def command(commands: Commands, name: str, about: str, examples: str, run: object) -> argparse.ArgumentParser:
    """A command with its one-line description, and examples at the end of its help; `run` takes (args, console), returns the exit code."""
    parser = commands.add_parser(
        name, help=about, description=about, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--config, --set, --resume, --device, --seed."""
    parser.set_defaults(kind="trains", several=True)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, if there is one; its settings and pictures need not be given again",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to compute (auto)")
    parser.add_argument("--seed", type=int, help="same seed, same machine, same result (0)")


def add_class_label(parser: argparse.ArgumentParser) -> None:
    """--class-label."""
    parser.add_argument("--class-label", type=int, metavar="N", help="class to draw from a class-conditional model")


def flags(args: argparse.Namespace, names: Sequence[str]) -> dict[str, object]:
    """Those of the named flags that were given."""
    given = vars(args)
    return {name: given[name] for name in names if given[name] is not None}
