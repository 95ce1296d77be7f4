"""The command line: parses, calls, prints. Bad input ends in one sentence and exit code 2; nothing here computes."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from unidad import __version__
from unidad.errors import NonFiniteError, SettingsError, UserError, did_you_mean

Commands = argparse._SubParsersAction  # argparse has no public name for it

EPILOG = """the usual way:
  unidad train --target my_pictures --out runs/mine          adapt and distil; leaves a report and a generator
  unidad sample runs/mine -n 64 --out pictures               draw from it
  unidad export runs/mine --out my_generator                 a folder for stock diffusers
  unidad info runs/mine                                      what is this?
`unidad COMMAND --help` has examples for each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 bad input, 130/143 stopped and saved)."""
    args = build_parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    warnings.showwarning = lambda message, *_rest, **_more: console.print(f"Note: {message}", highlight=False)
    _quiet_libraries()
    try:
        code = args.run(args, console)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"unidad: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        print(
            f"unidad: reading or writing{where} failed: {error.strerror or error}. Free some space or give another folder.",
            file=sys.stderr,
        )
        return 1
    except NonFiniteError as error:
        print(_non_finite_advice(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("unidad: stopped.", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(_memory_advice(error), file=sys.stderr)
        return 1


def _quiet_libraries() -> None:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\..*")
    warnings.filterwarnings("ignore", module=r"diffusers\..*")


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _memory_advice(error: BaseException) -> str:
    first = " ".join(str(error).split())[:200] or "the system refused more memory"
    return (
        f"unidad: out of memory ({first}). What lowers it: --set batch_size=1 (with accumulation= to make up for it), "
        "--set rollout_grad=last, a smaller --steps, --set precision=bf16. The last checkpoint is whole: go on with --resume."
    )


def _non_finite_advice(error: NonFiniteError) -> str:
    return (
        f"unidad: {error}. The update was not applied and the last checkpoint is whole. Lower the rate, for example "
        "--set lr=1e-5, or set precision=fp32, and start anew."
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"unidad: {message}. See `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(
        prog="unidad",
        description="About ten pictures and a diffusion model in, a generator of that domain that draws in 1 to 4 steps out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unidad {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_train(commands)
    _add_finetune(commands)
    _add_distill(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_pretrain(commands)
    _add_info(commands)
    _add_doctor(commands)
    return parser


def _command(commands: Commands, name: str, about: str, examples: str, run: object) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=about, description=about, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to compute (auto)")
    parser.add_argument("--seed", type=int, help="same seed, same machine, same result (0)")


def _add_train(commands: Commands) -> None:
    from unidad.presets import SUMMARIES

    presets = "\n".join(f"  {name:14} {about}" for name, about in SUMMARIES.items())
    parser = _command(
        commands,
        "train",
        "Adapt and distil a source model to about ten pictures, in one stage (Uni-DAD).",
        f"""  unidad train --target my_pictures --out runs/mine
  unidad train --target bundled:bottts --preset avatars-demo --out runs/robots
  unidad train --source path/to/pipeline --target my_pictures --preset fsig-near --out runs/faces --device cuda
  unidad train --target my_pictures --out runs/mine --set a=0.5 --set student_init=source
  unidad train --target my_pictures --out runs/mine --resume
presets:
{presets}
settings: see `unidad train --list-settings`""",
        _train,
    )
    parser.add_argument(
        "--method",
        choices=("uni-dad", "adapt-then-distill", "distill-then-adapt"),
        help="the paper's, or a two-stage rival (uni-dad)",
    )
    parser.add_argument("--target", metavar="FOLDER", help="folder of pictures, or bundled:toonHead|lorelei|bottts|sunglasses")
    _add_job(parser)


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="RUN", help="folder to make: the product, report.html, grid.png, checkpoints/, samples/")
    parser.add_argument("--source", metavar="MODEL", help="bundled:avatars, a diffusers folder, or a hub id (bundled:avatars)")
    parser.add_argument("--steps", type=int, metavar="K", help="network evaluations per picture, 1 to 4 (3)")
    parser.add_argument("--preset", metavar="NAME", help="named settings, below (avatars for the bundled source)")
    parser.add_argument("--list-settings", action="store_true", help="print every setting with its value, and stop")
    _add_settings(parser)


def _add_finetune(commands: Commands) -> None:
    parser = _command(
        commands,
        "finetune",
        "Fine-tune a source model to about ten pictures: a many-step model, the rival FT.",
        """  unidad finetune --target my_pictures --out runs/ft
  unidad sample runs/ft -n 16 --steps 50 --out pictures""",
        _finetune,
    )
    parser.add_argument("--target", metavar="FOLDER", help="folder of pictures, or bundled:NAME")
    _add_job(parser)


def _add_distill(commands: Commands) -> None:
    parser = _command(
        commands,
        "distill",
        "Distil a source model to few steps on pictures of its own domain, by DMD2: the source teacher alone, a single head.",
        """  unidad distill --data source_pictures --out runs/student
  unidad train --target my_pictures --out runs/mine --set student_init=runs/student/student""",
        _distill,
    )
    parser.add_argument("--data", dest="target", metavar="FOLDER", help="pictures of the source's own domain")
    _add_job(parser)


def _add_class_label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--class-label", type=int, metavar="N", help="class to draw from a class-conditional model")


def _add_sample(commands: Commands) -> None:
    parser = _command(
        commands,
        "sample",
        "Draw pictures from a run, an exported student, or a many-step model.",
        """  unidad sample runs/mine -n 64 --out pictures
  unidad sample bundled:avatars -n 16 --steps 50 --out source_pictures""",
        _sample,
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL")
    parser.add_argument("-n", type=int, default=16, help="how many (16)")
    parser.add_argument(
        "--steps", type=int, metavar="K", help="steps; those it was distilled for, or 50 of DDIM for a many-step model"
    )
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on seed + i alone (0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the PNG files and grid.png")
    _add_class_label(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="changes speed and memory, never the pictures (32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def _add_evaluate(commands: Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        "Score samples against held-out pictures: Frechet distance, KID, precision and recall, variety, copying.",
        """  unidad evaluate runs/mine --reference heldout_pictures --train my_pictures
  unidad evaluate folder_of_samples --reference heldout_pictures --json scores.json""",
        _evaluate,
    )
    parser.add_argument("samples", metavar="RUN_OR_MODEL_OR_FOLDER", help="a run or model to draw from, or a folder of pictures")
    parser.add_argument("--reference", required=True, metavar="FOLDER", help="pictures of the domain that training never saw")
    parser.add_argument("--train", metavar="FOLDER", help="the training pictures (or bundled:NAME), for copying and variety")
    parser.add_argument("--extractor", default="efficientnet-lite0", help="features to compare in (efficientnet-lite0)")
    parser.add_argument("--n", type=int, default=1000, help="samples to draw (1000)")
    parser.add_argument("--steps", type=int, metavar="K", help="steps to draw with; as for `unidad sample`")
    parser.add_argument("--seed", type=int, default=0)
    _add_class_label(parser)
    parser.add_argument("--json", metavar="FILE", help="write the scores there too")
    parser.add_argument("--panel", metavar="FILE.png", help="picture of the samples nearest to training pictures")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def _add_export(commands: Commands) -> None:
    parser = _command(
        commands,
        "export",
        "Write a run's student as a stock diffusers folder with a model card.",
        "  unidad export runs/mine --out my_generator\n  unidad export runs/mine --out my_generator --half",
        _export,
    )
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--half", action="store_true", help="store float16 weights")


def _add_pretrain(commands: Commands) -> None:
    parser = _command(
        commands,
        "pretrain",
        "Train a source diffusion model on thousands of pictures, from scratch or on from another.",
        """  unidad pretrain --data many_pictures --out runs/source --set size=32 --set cycles=20000
  unidad pretrain --data many_pictures --out runs/better --set init=runs/source --set lr=7e-4""",
        _pretrain,
    )
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--out", required=True, metavar="RUN")
    _add_settings(parser)


def _add_info(commands: Commands) -> None:
    parser = _command(
        commands,
        "info",
        "Say in plain words what a model, run or folder of pictures is.",
        "  unidad info runs/mine\n  unidad info bundled:avatars",
        _info,
    )
    parser.add_argument("path", metavar="PATH")


def _add_doctor(commands: Commands) -> None:
    _command(commands, "doctor", "Check this machine: versions, device, memory, disk, known trouble.", "  unidad doctor", _doctor)


def _flags(args: argparse.Namespace, names: Sequence[str]) -> dict[str, object]:
    given = vars(args)
    return {name: given[name] for name in names if given[name] is not None}


def _train(args: argparse.Namespace, console: Console) -> int:
    rival = f"-{args.method}" if args.method not in (None, "uni-dad") else ""
    return _job(args, console, f"avatars{rival}", _flags(args, ("method",)))


def _finetune(args: argparse.Namespace, console: Console) -> int:
    return _job(args, console, "avatars-finetune", {"method": "finetune"})


def _distill(args: argparse.Namespace, console: Console) -> int:
    from unidad.presets import DISTILL

    return _job(args, console, "avatars-distill", DISTILL)


def _job(args: argparse.Namespace, console: Console, preset: str, layer: Mapping[str, object]) -> int:
    from unidad.config import TrainSettings, as_dict, build_settings, parse_overrides, read_config
    from unidad.presets import PRESETS

    chosen = read_config(args.config) if args.config else {}
    overrides = _flags(args, ("source", "steps", "device", "seed")) | parse_overrides(args.set)
    source = overrides.get("source", chosen.get("source", "bundled:avatars"))
    preset = args.preset or (preset if source == "bundled:avatars" else "")
    if preset and preset not in PRESETS:
        raise SettingsError(f"There is no preset '{preset}'.{did_you_mean(preset, PRESETS)} Known: {', '.join(PRESETS)}.")
    settings = build_settings(TrainSettings, PRESETS.get(preset, {}), layer, chosen, overrides)
    if args.list_settings:
        print("\n".join(f"{key}: {value}" for key, value in as_dict(settings).items()))
        return 0
    if not args.target or not args.out:
        pictures = "--data" if args.run is _distill else "--target"
        raise SettingsError(f"{pictures} FOLDER and --out RUN are needed. Add --help for examples.")
    from unidad.adapt import train

    return _stoppable(lambda: train(args.target, args.out, settings, args.resume, console).path / "report.html", args.out)


def _stoppable(job: Callable[[], Path], out: str) -> int:
    from unidad.train import Stopped

    try:
        print(job())
    except Stopped as stop:
        print(f"unidad: stopped by {stop}; saved in '{out}'. Go on with the same command and --resume.", file=sys.stderr)
        return stop.code
    return 0


def _pretrain(args: argparse.Namespace, console: Console) -> int:
    from unidad.config import PretrainSettings, build_settings, parse_overrides, read_config
    from unidad.pretrain import pretrain

    layers = [read_config(args.config) if args.config else {}, _flags(args, ("device", "seed")), parse_overrides(args.set)]
    settings = build_settings(PretrainSettings, *layers)
    return _stoppable(lambda: pretrain(args.data, args.out, settings, args.resume, console).path / "model", args.out)


def _sample(args: argparse.Namespace, _console: Console) -> int:
    from unidad.commands import sample_to_folder

    print(sample_to_folder(args.model, args.n, args.out, args.steps, args.seed, args.batch_size, args.device, args.class_label))
    return 0


def _evaluate(args: argparse.Namespace, _console: Console) -> int:
    from unidad.commands import evaluate_command

    print(evaluate_command(args))
    return 0


def _export(args: argparse.Namespace, _console: Console) -> int:
    from unidad.commands import export_run

    print(export_run(args.model, Path(args.out), args.half))
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


if __name__ == "__main__":
    raise SystemExit(main())
