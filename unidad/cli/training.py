"""The commands that train: train, finetune, distill, pretrain."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from unidad.cli.common import Commands, add_settings, command, flags, tell
from unidad.errors import CheckpointError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from unidad.config import TrainSettings

EMPTY: Mapping[str, object] = {}


def add_train(commands: Commands) -> None:
    """`unidad train`."""
    from unidad.presets import SUMMARIES

    presets = "\n".join(f"  {name:14} {about}" for name, about in SUMMARIES.items())
    parser = command(
        commands,
        "train",
        "Adapt and distil a source model to about ten pictures, in one stage (Uni-DAD).",
        f"""  unidad train --target my_pictures --out runs/mine
  unidad train --target bundled:bottts --preset avatars-demo --out runs/robots
  unidad train --source path/to/pipeline --target my_pictures --preset fsig-near --out runs/faces --device cuda
  unidad train --source SD_FOLDER --target photos --prompt "a prt cat" --class-prompt "a cat" --preset sdp --out runs/cat
  unidad train --target my_pictures --out runs/mine --set a=0.5 --set student_init=source
  unidad train --source path/to/pipeline --preset fsig-near --plan
  unidad train --out runs/mine --resume
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
    parser.add_argument("--prompt", metavar="TEXT", help="what the pictures show, for a text-to-image source ('a prt cat')")
    parser.add_argument("--class-prompt", metavar="TEXT", help="the same without the rare word ('a cat')")
    _add_job(parser)


def _add_job(parser: argparse.ArgumentParser, few_steps: bool = True) -> None:
    parser.add_argument("--out", metavar="RUN", help="folder to make: the product, report.html, grid.png, checkpoints/, samples/")
    parser.add_argument("--source", metavar="MODEL", help="bundled:avatars, a diffusers folder, or a hub id (bundled:avatars)")
    parser.add_argument(
        "--source-config",
        metavar="FOLDER",
        help="with a single Stable Diffusion .safetensors file as --source: a diffusers folder of its family or a hub id, of which only "
        "the small files are used; the file becomes a folder of the same name beside it, once",
    )
    parser.set_defaults(steps=None)
    if few_steps:
        parser.add_argument("--steps", type=int, metavar="K", help="network evaluations per picture, usually 1 to 4 (3)")
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="named settings, which `unidad train --help` lists (the command's own for the bundled source)",
    )
    parser.add_argument("--list-settings", action="store_true", help="print every setting with its value, and stop")
    parser.add_argument(
        "--plan", action="store_true", help="print the memory and computation to expect, refuse what cannot fit, and stop"
    )
    add_settings(parser)


def add_finetune(commands: Commands) -> None:
    """`unidad finetune`."""
    parser = command(
        commands,
        "finetune",
        "Fine-tune a source model to about ten pictures: a many-step model, the rival FT.",
        """  unidad finetune --target my_pictures --out runs/ft
  unidad sample runs/ft -n 16 --steps 50 --out pictures""",
        _finetune,
    )
    parser.add_argument("--target", metavar="FOLDER", help="folder of pictures, or bundled:NAME")
    _add_job(parser, few_steps=False)


def add_distill(commands: Commands) -> None:
    """`unidad distill`."""
    parser = command(
        commands,
        "distill",
        "Distil a source model to few steps on pictures of its own domain, by DMD2: the source teacher alone, a single head.",
        """  unidad distill --data source_pictures --out runs/student
  unidad distill --data cats --source SD_FOLDER --preset sdp --prompt "a cat" --out runs/student
  unidad train --target my_pictures --out runs/mine --set student_init=runs/student/student""",
        _distill,
    )
    parser.add_argument("--data", dest="target", metavar="FOLDER", help="pictures of the source's own domain")
    parser.add_argument("--prompt", metavar="TEXT", help="what the pictures show, for a text-to-image source ('a cat')")
    _add_job(parser)


def add_pretrain(commands: Commands) -> None:
    """`unidad pretrain`."""
    parser = command(
        commands,
        "pretrain",
        "Train a source diffusion model on thousands of pictures, from scratch or on from another.",
        """  unidad pretrain --data many_pictures --out runs/source --set size=32 --set cycles=20000
  unidad pretrain --data many_pictures --out runs/better --set init=runs/source --set lr=7e-4
  unidad pretrain --data captioned_pictures --out runs/told --set init=SD_FOLDER""",
        _pretrain,
    )
    parser.add_argument("--data", metavar="FOLDER", help="thousands of pictures; captioned ones with a text-to-image init")
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to make: model/, checkpoints/, samples/")
    add_settings(parser)


def add_reproduce(commands: Commands) -> None:
    """`unidad reproduce`."""
    parser = command(
        commands,
        "reproduce",
        "Run a run again from what its run.json says, and say whether the result is the same (exit code 1 if not).",
        """  unidad reproduce runs/mine --out runs/again
  unidad reproduce runs/from_elsewhere --target my_pictures --out runs/again""",
        _reproduce,
    )
    parser.add_argument("name", metavar="RUN", help="only read")
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to make for the repetition")
    parser.add_argument("--target", metavar="FOLDER", help="its pictures, if they lie elsewhere now")


def _train(args: argparse.Namespace, console: Console) -> int:
    from unidad.presets import TWO_STAGE

    rival = f"-{args.method}" if args.method not in (None, "uni-dad") else ""
    command = TWO_STAGE if args.method == "adapt-then-distill" else EMPTY
    return _job(args, console, f"avatars{rival}", flags(args, ("method", "prompt", "class_prompt")), command)


def _finetune(args: argparse.Namespace, console: Console) -> int:
    return _job(args, console, "avatars-finetune", {"method": "finetune"})


def _distill(args: argparse.Namespace, console: Console) -> int:
    from unidad.presets import DISTILL

    told = {"prompt": args.prompt, "class_prompt": args.prompt} if args.prompt else {}  # every network is told the same
    return _job(args, console, "avatars-distill", told, DISTILL)


def _job(
    args: argparse.Namespace, console: Console, preset: str, given: Mapping[str, object], command: Mapping[str, object] = EMPTY
) -> int:
    """Settings: a preset, what the command asks for and what is given; or of a run that goes on its own, and what is given."""
    from unidad.config import TrainSettings, build_settings, parse_overrides, read_config
    from unidad.presets import PRESETS

    own, pictures = _going_on(args, "train")
    chosen = read_config(args.config) if args.config else {}
    overrides = flags(args, ("source", "steps", "device", "seed")) | parse_overrides(args.set)
    source = overrides.get("source", chosen.get("source", "bundled:avatars"))
    if args.source_config:
        overrides["source"] = source = _unpacked(str(source), args.source_config)
    preset = args.preset or (preset if source == "bundled:avatars" and not own else "")
    if preset and preset not in PRESETS:
        raise SettingsError(f"There is no preset '{preset}'.{did_you_mean(preset, PRESETS)} Known: {', '.join(PRESETS)}.")
    first = (own,) if own and not args.preset else (PRESETS.get(preset, {}), command)
    settings = build_settings(TrainSettings, *first, given, chosen, overrides)
    if args.list_settings:
        print(_listed(settings))
        return 0
    if args.plan:
        return _plan(settings)
    if not pictures or not args.out:
        asked = "--data" if args.run is _distill else "--target"
        raise SettingsError(f"{asked} FOLDER and --out RUN are needed. Add --help for examples.")
    from unidad.adapt import train

    return _stoppable(lambda: train(pictures, args.out, settings, args.resume, console).path / "report.html", args.out, args.resume)


def _going_on(args: argparse.Namespace, kind: str) -> tuple[dict[str, object], str | None]:
    """Settings and pictures of the run in --out that --resume goes on with, or none of the former; pictures that are given win."""
    from unidad.run import RUN_FILE, RunFolder

    given = args.data if kind == "pretrain" else args.target
    if not (args.resume and args.out and (Path(args.out) / RUN_FILE).exists()):
        return {}, given
    facts = RunFolder(Path(args.out)).read()
    if facts["kind"] != kind:
        raise CheckpointError(f"'{args.out}' is a {facts['kind']} run: go on with `unidad {facts['kind']}`, or give another --out.")
    found = facts.get("data", {}).get("given")
    return facts["settings"], given or (found if isinstance(found, str) else None)


def _listed(settings: TrainSettings) -> str:
    from unidad.config import TrainSettings, as_dict, told

    values = {f"{key}: {value}": key for key, value in as_dict(settings).items()}
    width, said = min(40, max(map(len, values))), told(TrainSettings)
    return "\n".join(f"{line:{width}}  # {said[key]}" if key in said else line for line, key in values.items())


def _unpacked(source: str, config: str) -> str:
    from unidad.convert.single_file import unpacked

    if Path(source).is_dir():
        raise SettingsError(f"--source-config goes with a .safetensors file, and --source '{source}' is a folder. Leave it out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            f"In several processes give a folder as --source: unidad convert single-file {source} --config {config} --out DIR"
        )
    folder = unpacked(source, config)
    tell(f"'{source}' is used as the folder '{folder}'.")
    return str(folder)


def _plan(settings: TrainSettings) -> int:
    from unidad.device import pick_device
    from unidad.offload import refuse_useless_offload
    from unidad.plan import computation_text, memory_text, phase_costs, plan, refuse_too_large, sharing

    refuse_useless_offload(settings, pick_device(settings.device))
    found = plan(settings, sharing(settings))
    print(memory_text(found, settings))
    refuse_too_large(found, settings)
    print(computation_text(phase_costs(settings), settings))
    return 0


def _stoppable(job: Callable[[], Path], out: str, resume: bool) -> int:
    from unidad.run import refuse_taken
    from unidad.signals import Stopped

    first = os.environ.get("RANK", "0") == "0"
    if first:
        refuse_taken(out, resume)
    try:
        done = job()
        if first:
            print(done)
    except Stopped as stop:
        tell(f"stopped by {stop} {stop.place}; saved in '{out}'. Go on with the same command and --resume.")
        return stop.code
    except KeyboardInterrupt:  # while models are loaded, or what comes after training is written
        if not (Path(out) / "run.json").exists():
            raise
        tell(f"stopped. What '{out}' holds is whole; go on with the same command and --resume.")
        return 130
    return 0


def _reproduce(args: argparse.Namespace, console: Console) -> int:
    from unidad.reproduce import reproduce
    from unidad.signals import Stopped

    try:
        verdict = reproduce(args.name, args.out, args.target, console)
    except Stopped as stop:
        tell(f"stopped by {stop} {stop.place}; a repetition starts anew, in another folder.")
        return stop.code
    print(verdict.text)
    return 0 if verdict.same else 1


def _pretrain(args: argparse.Namespace, console: Console) -> int:
    from unidad.config import PretrainSettings, build_settings, parse_overrides, read_config

    own, pictures = _going_on(args, "pretrain")
    layers = [read_config(args.config) if args.config else {}, flags(args, ("device", "seed")), parse_overrides(args.set)]
    settings = build_settings(PretrainSettings, own, *layers)
    if not pictures:
        raise SettingsError("--data FOLDER is needed. Add --help for examples.")
    from unidad.pretrain import pretrain

    return _stoppable(lambda: pretrain(pictures, args.out, settings, args.resume, console).path / "model", args.out, args.resume)
