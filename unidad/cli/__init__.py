"""The command line: parses, calls, prints. Bad input ends in one sentence and exit code 2; nothing here computes."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from unidad import __version__
from unidad.cli import converting, measuring, training, using
from unidad.cli.common import Parser, tell
from unidad.errors import LostProcessError, NonFiniteError, UserError
from unidad.run import refuse_holder

EPILOG = """the usual way:
  unidad train --target my_pictures --out runs/mine          adapt and distil; leaves a report and a generator
  unidad sample runs/mine -n 64 --out pictures               draw from it
  unidad export runs/mine --out my_generator                 a folder for stock diffusers
  unidad info runs/mine                                      what is this?
`unidad COMMAND --help` has examples for each."""
# What to do next, by the kind of command.
LOST = {
    "trains": "Start all of them again with the same command and --resume: the run goes on from its last whole checkpoint.",
    "draws": "The pictures drawn so far are whole: start all of them again with the same command and --resume for the rest.",
    "other": "Start all of them again.",
}
MEMORY = {
    "trains": "What lowers it: --set batch_size=1 (with accumulation= to make up for it), --set rollout_grad=last, a smaller --steps, "
    "--set precision=bf16, --set gradient_checkpointing=true; `--plan` tells how much. Other settings are another run, in another --out; "
    "with more memory free this one goes on with --resume.",
    "draws": "What lowers it: a smaller --batch-size, into another --out.",
    "other": "Close other programs, or ask for less at once.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 bad input, 130/143 stopped and saved)."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun or accelerate started
    console = Console(
        stderr=True, quiet=not first, highlight=False, markup=False, soft_wrap=True
    )  # file names may look like markup
    warnings.showwarning = lambda message, *_rest, **_more: console.print(f"Note: {message}", highlight=False)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not args.several:
            raise UserError(f"`unidad {args.command}` runs in one process, and several were launched. Start it by itself.")
        if first and args.out:
            refuse_holder(Path(args.out))  # before the libraries are loaded, which takes seconds
        _quiet_libraries()
        code = args.run(args, console)
        sys.stdout.flush()
        return code
    except LostProcessError as error:
        tell(f"{error} {LOST[args.kind]}")
        return 2
    except UserError as error:
        tell(str(error))
        return 2
    except BrokenPipeError:  # whoever read our output has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        tell(f"reading or writing{where} failed: {error.strerror or error}. Free some space or give another folder.")
        return 1
    except NonFiniteError as error:
        tell(
            f"{error}. The update was not applied. Go on from the last checkpoint with --resume --set non_finite=skip, which leaves such "
            "updates out; or start anew with a lower rate, for example --set lr=1e-5, or with precision=fp32."
        )
        return 1
    except KeyboardInterrupt:
        tell("stopped.")
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first_line = " ".join(str(error).split())[:200] or "the system refused more memory"
        tell(f"out of memory ({first_line}). {MEMORY[args.kind]}")
        return 1


def _quiet_libraries() -> None:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\..*")
    warnings.filterwarnings("ignore", module=r"diffusers\..*")


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="unidad",
        description="About ten pictures and a diffusion model in, a generator of that domain that draws in 1 to 4 steps out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(kind="other", several=False, out=None)
    parser.add_argument("--version", action="version", version=f"unidad {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=Parser)
    training.add_train(commands)
    training.add_finetune(commands)
    training.add_distill(commands)
    using.add_sample(commands)
    using.add_evaluate(commands)
    using.add_export(commands)
    training.add_pretrain(commands)
    training.add_reproduce(commands)
    using.add_info(commands)
    using.add_doctor(commands)
    measuring.add_bench(commands)
    converting.add_convert(commands)
    return parser
