"""AvatarShift: every method on the same source model and the same ten pictures, scored against pictures none of them saw.

    python benchmarks/avatarshift.py                                       Uni-DAD on toonHead and bottts by the long preset
    python benchmarks/avatarshift.py --targets toonHead my_folder --methods all --seeds 0 1 2
    python benchmarks/avatarshift.py --short --targets toonHead lorelei bottts sunglasses --methods main     a quarter of an hour a cell
    python benchmarks/avatarshift.py --methods uni-dad ft-50 --set batch_size=4 --runs runs/bench-4

A target is toonHead, lorelei, bottts or sunglasses, whose 2,000 held-out pictures scripts/avatars/draw.mjs draws once (needs node
and npm), or a folder with two folders in it, train/ (the first ten are taken) and heldout/. Every cell (target, method, seed) is a run of its own under
--runs; finished ones are not repeated and broken-off ones go on. Results: a JSON file to which rows are added, a Markdown table of those
asked for, and a grid for each target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidad.backbones.load import Model, bundled_names, bundled_path
from unidad.commands import draw_from, load_product
from unidad.config import TrainSettings
from unidad.data import list_pictures, load_folder, picture_grid
from unidad.device import pick_device, use_bf16
from unidad.metrics.evaluate import evaluate
from unidad.metrics.features import EfficientNetLite0
from unidad.presets import PRESETS
from unidad.report import read_log
from unidad.signals import passing_on

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "avatars"
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "intra_diversity", "copying")
SAMPLE_SEED = 1_000_000
# What else a row's numbers depend on a little: the same cell is within 0.3 with and without bf16.
MADE_BY = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": pick_device("auto").type}
MADE_BY |= {"chip_has_bf16": use_bf16("auto", pick_device("auto"))}


@dataclass(frozen=True)
class Row:
    """One line of the table: which run it draws from, how that is trained, and in how many steps it draws."""

    run: str  # rows that share it share the training; "" is the source model itself
    preset: str = "avatars"
    settings: dict[str, Any] = field(default_factory=dict)
    nfe: int | None = None
    shots: int = 10


ALONE: dict[str, Any] = {"target_warmup": 0, "target_cycles": 0, "transfer": 0.0}  # no target teacher learns first


def _uni_dad(name: str, **settings: Any) -> Row:
    return Row(name, settings=settings)


METHODS: dict[str, Row] = {
    "source-50": Row("", nfe=50),
    "ft-50": Row("ft", "avatars-finetune", nfe=50),
    "ft-25": Row("ft", "avatars-finetune", nfe=25),
    "ft-dmd2": Row("ft-dmd2", "avatars-adapt-then-distill"),
    "dmd2-ft": Row("dmd2-ft", "avatars-distill-then-adapt"),
    "uni-dad": _uni_dad("uni-dad"),
    "uni-dad-k1": _uni_dad("uni-dad-k1", steps=1),
    "uni-dad-k2": _uni_dad("uni-dad-k2", steps=2),
    "uni-dad-k3": _uni_dad("uni-dad-k3", steps=3),
    "uni-dad-k4": _uni_dad("uni-dad-k4", steps=4),
    "no-target-teacher": _uni_dad("no-target-teacher", a=0.0, target_teacher="off", **ALONE),
    "gan-only": _uni_dad("gan-only", dmd_weight=0.0, anchor_weight=0.0, **ALONE),
    "dmd-source": _uni_dad("dmd-source", a=0.0, target_teacher="off", gan_weight=0.0, disc_weight=0.0, **ALONE),
    "dmd-target": _uni_dad("dmd-target", a=1.0, gan_weight=0.0, disc_weight=0.0),
    "single-head": _uni_dad("single-head", heads="single"),
    "mean-logit": _uni_dad("mean-logit", gan_aggregation="mean_logit"),
    "no-transfer": _uni_dad("no-transfer", transfer=0.0),
    "ft-dmd2-no-transfer": Row("ft-dmd2-no-transfer", "avatars-adapt-then-distill", {"transfer": 0.0}),
    "no-anchor": _uni_dad("no-anchor", anchor_weight=0.0),
    # a = 0 is no-target-teacher, a = 0.75 is uni-dad
    **{f"a-{a:g}": _uni_dad(f"a-{a:g}", a=a) for a in (0.25, 0.5, 1.0)},
    "shots-1": Row("shots-1", shots=1),
    "shots-5": Row("shots-5", shots=5),
}


MAIN = ("source-50", "ft-50", "ft-25", "ft-dmd2", "dmd2-ft", "uni-dad")

# --short: every method as long as `make demo`, for each preset. Uni-DAD and FT-DMD2 have the demo's value of every setting that the long preset
# has another of; FT learns as their target teachers do, and DMD2-FT's student is fine-tuned for as many updates.
_LONG, _DEMO = PRESETS["avatars"], PRESETS["avatars-demo"]
_SHORT: dict[str, Any] = {name: _DEMO.get(name, getattr(TrainSettings(), name)) for name in _LONG if _LONG[name] != _DEMO.get(name)}
_PLAIN: dict[str, Any] = {name: _SHORT[name] for name in ("denoising_law", "cutmix_above", "recombine", "target_epochs")}
SHORT: dict[str, dict[str, Any]] = {
    "avatars": _SHORT,
    "avatars-adapt-then-distill": _SHORT,
    "avatars-finetune": _PLAIN | {"cycles": _SHORT["target_cycles"], "lr": _DEMO["lr_target"]},
    "avatars-distill-then-adapt": {"cycles": _SHORT["target_cycles"], "recombine": _SHORT["recombine"]},
}


@dataclass(frozen=True)
class Target:
    """Ten pictures to learn from and held-out ones to be judged by."""

    name: str
    train: Path
    heldout: Path


def drawn(domain: str, out: Path, count: int, prefix: str, *more: str) -> Path:
    """A folder with that many pictures of a domain, drawn unless they are there."""
    if not out.is_dir() or sum(1 for _ in out.glob("*.png")) < count:
        if not (SCRIPTS / "node_modules").is_dir():
            subprocess.run(["npm", "ci"], cwd=SCRIPTS, check=True)
        options = {"--domain": domain, "--count": str(count), "--prefix": prefix, "--out": str(out.resolve())}
        subprocess.run(["node", "draw.mjs", *(word for pair in options.items() for word in pair), *more], cwd=SCRIPTS, check=True)
    return out


def find_target(name: str, folder: Path, count: int = 2000) -> Target:
    """A bundled target, its held-out pictures drawn if they are not there, or a folder with train/ and heldout/."""
    if name not in bundled_names("targets"):
        path = Path(name)
        for part in ("train", "heldout"):
            if not (path / part).is_dir():
                known = ", ".join(bundled_names("targets"))
                raise SystemExit(
                    f"There is no folder '{path / part}'. A target is one of {known}, or a folder with train/ and heldout/ in it."
                )
        if path.name in bundled_names("targets"):
            raise SystemExit(f"'{path}' has the name of a bundled target, whose results it would be taken for. Rename the folder.")
        return Target(path.name, path / "train", path / "heldout")
    return Target(name, bundled_path(f"bundled:{name}", "targets"), drawn(name, folder / name, count, "heldout"))


def few(target: Target, shots: int, folder: Path) -> Path:
    """The target's folder of pictures, or one with copies of its first `shots`."""
    pictures = list_pictures(target.train)
    if shots >= len(pictures):
        return target.train
    out = folder / f"{target.name}-{shots}"
    out.mkdir(parents=True, exist_ok=True)
    for path in pictures[:shots]:
        shutil.copy(path, out / path.name)
    return out


def settings_of(row: Row, short: bool) -> dict[str, Any]:
    """What a row changes of its preset; where no target teacher learns first, the student has as many updates all the same."""
    usual = SHORT[row.preset] if short else {}
    settings = usual | row.settings
    if settings.get("target_cycles") == 0:
        usual = PRESETS[row.preset] | usual
        settings["cycles"] = usual["cycles"] - usual["target_cycles"]
    return settings


def read_cost(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What the run in `out` cost, or None where it is not done; SystemExit where something else was asked of it."""
    done = out / "cost.json"
    if not done.exists():
        return None
    found = json.loads(done.read_text())
    told = {key: found.pop(key, "others") for key in asked}
    other = "; ".join(f"{key} {told[key]} instead of {asked[key]}" for key in asked if told[key] != asked[key])
    if other:
        raise SystemExit(f"The run in {out} was trained with {other}. Give another --runs.")
    return found


def asked_of(row: Row, pictures: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What makes a run this one: its settings and pictures, and the bundled models it starts from, these by digest."""
    settings = PRESETS[row.preset] | settings_of(row, args.short)
    asked = {"short": args.short, "set": args.set, "pictures": load_folder(pictures, 32).digest}
    return asked | {"settings": digest(json.dumps(settings, sort_keys=True).encode()), "models": bundled_models()}


def digest(data: bytes) -> str:
    """Eight letters of a sha256."""
    return hashlib.sha256(data).hexdigest()[:8]


@cache
def bundled_models() -> str:
    """Digest of the bundled source model and its student, which every method starts from."""
    folders = [bundled_path(f"bundled:{name}", "models") for name in ("avatars", "avatars-3step")]
    return digest(b"".join((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders))


def run_to_its_end(command: list[str]) -> tuple[int, Any]:
    """Status and resources of a process; asked to stop, this one passes that on and waits until the other has saved its work."""
    process = subprocess.Popen(command)

    def ask(signum: int) -> None:
        if signum != signal.SIGINT:  # which a terminal sends to both
            process.send_signal(signum)

    with passing_on(ask):
        _, status, usage = os.wait4(process.pid, 0)
    return status, usage


def train_cell(row: Row, pictures: Path, out: Path, seed: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Run `unidad train` in a process of its own; what it cost is kept beside it, with what was asked."""
    short, overrides = asked["short"], asked["set"]
    pairs = [f"{k}={v}" for k, v in settings_of(row, short).items()] + overrides
    options = [word for pair in pairs for word in ("--set", pair)]
    command = [sys.executable, "-m", "unidad.cli", "train", "--target", str(pictures), "--out", str(out), "--preset", row.preset]
    status, usage = run_to_its_end([*command, "--seed", str(seed), "--resume", *options])
    if status:
        raise SystemExit(f"The run in {out} failed; its own message is above. Start the benchmark again to go on.")
    last = read_log(out / "log.jsonl")[-1]
    cost = {"minutes": last["seconds"] / 60, "updates": last["updates"], "peak_gb": usage.ru_maxrss / 1e6}
    (out / "cost.json").write_text(json.dumps(cost | asked) + "\n")
    return cost


def samples_of(model: Model, nfe: int | None, n: int, kept: Path | None) -> Tensor:
    """Samples of a model; those of the source, which every target is compared with, are drawn once and kept in a file."""
    if kept is not None and kept.exists():
        return load_file(kept)["samples"]
    samples = draw_from(model, n, nfe, SAMPLE_SEED, 50, "auto")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"samples": samples}, kept)
    return samples


def cell(target: Target, name: str, seed: int, args: argparse.Namespace, extractor: EfficientNetLite0) -> dict[str, Any]:
    """Train if need be, draw, score; the result is kept beside the run."""
    row = METHODS[name]
    out = args.runs / target.name / f"{row.run}-seed{seed}" if row.run else None
    kept = args.runs / target.name / f"{name}-seed{seed}-n{args.n}.json"
    pictures = few(target, row.shots, args.runs)
    asked = asked_of(row, pictures, args)
    cost = read_cost(out, asked) if out else {}
    if kept.exists():
        found = json.loads(kept.read_text())
        for key in ("set", "models"):
            if found.get(key) != asked[key]:
                raise SystemExit(f"{kept} was measured with {key} {found.get(key)}, not {asked[key]}. Give another --runs.")
        return found
    if cost is None:
        assert out is not None
        cost = train_cell(row, pictures, out, seed, asked)
    model = load_product(out or "bundled:avatars")
    samples = samples_of(
        model, row.nfe, args.n, None if out else args.runs / f"source-{asked['models']}-{row.nfe}-n{args.n}.safetensors"
    )
    size = samples.shape[-1]
    reference, train = load_folder(target.heldout, size).pixels, load_folder(target.train, size).pixels
    scores = evaluate(samples, reference, train, extractor, cache_dir=args.runs / "features")
    nfe = row.nfe or len(model.student_steps or [])
    result = {"target": target.name, "method": name, "seed": seed, "nfe": nfe, "n": args.n, "short": args.short, "set": args.set}
    result |= {"models": asked["models"], **MADE_BY} | {key: scores[key] for key in SCORES} | cost
    kept.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(samples[:16], 16, 2).save(kept.with_suffix(".png"))
    kept.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Results as Markdown: mean over seeds, and the spread where there are several."""
    columns = {"FD": "frechet_distance", "KID": "kernel_distance", "precision": "precision", "recall": "recall"}
    columns |= {"coverage": "coverage", "diversity": "intra_diversity", "copying": "copying", "minutes": "minutes", "GB": "peak_gb"}
    lines = [f"| target | method | NFE | updates of the product | {' | '.join(columns)} |", "|---" * (4 + len(columns)) + "|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["target"], result["method"]), []).append(result)
    for (target, method), rows in groups.items():
        updates = rows[0].get("updates", {})
        cells = [target, method, str(rows[0]["nfe"]), str(updates.get("student", updates.get("model", "")))]
        for key in columns.values():
            values = [row[key] for row in rows if row.get(key) is not None]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}" if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid(target: Target, results: list[dict[str, Any]], args: argparse.Namespace) -> Image.Image:
    """One labelled row of samples for each method, the training pictures first."""
    strips = {"the ten pictures": picture_grid(load_folder(target.train, 32).pixels, 16, 2)}
    for result in results:
        if result["target"] == target.name and result["seed"] == args.seeds[0]:
            stem = f"{result['method']}-seed{result['seed']}-n{args.n}.png"
            strips[f"{result['method']}, NFE {result['nfe']}"] = Image.open(args.runs / target.name / stem)
    height, left = max(strip.height for strip in strips.values()) + 4, 170
    sheet = Image.new("RGB", (left + max(strip.width for strip in strips.values()), height * len(strips)), "white")
    for i, (label, strip) in enumerate(strips.items()):
        ImageDraw.Draw(sheet).text((6, i * height + height // 2 - 8), label, fill="black", font_size=14)
        sheet.paste(strip, (left, i * height))
    return sheet


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["toonHead", "bottts"])
    parser.add_argument("--methods", nargs="+", default=["source-50", "uni-dad"], choices=["all", "main", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every trained method")
    parser.add_argument("--n", type=int, default=1000, help="samples to score")
    parser.add_argument("--short", action="store_true", help="every method as long as `make demo`")
    parser.add_argument("--runs", type=Path, help="default: runs/bench, with --short runs/bench-short")
    parser.add_argument("--heldout", type=Path, default=ROOT / "data" / "heldout")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.n < 2:
        parser.error("--n must be at least 2.")
    if min(args.seeds) < 0:
        parser.error("--seeds must be at least 0.")
    args.methods = list(METHODS) if "all" in args.methods else list(MAIN) if "main" in args.methods else args.methods
    args.runs = args.runs or ROOT / "runs" / ("bench-short" if args.short else "bench")
    return args


def keep(results: list[dict[str, Any]], path: Path, features: str) -> None:
    """Add results to those in a file, in the place of what was measured alike before."""
    alike = ("target", "method", "seed", "n", "short", "set")
    before = json.loads(path.read_text())["results"] if path.exists() else []
    new = [[row[key] or None for key in alike] for row in results]  # older rows have no "set" where there was none
    rows = [row for row in before if [row.get(key) or None for key in alike] not in new] + results
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "features": features, "results": rows}
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    """Run what is asked for; results are written after every cell."""
    args, extractor, results = parse(), EfficientNetLite0(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for target in [find_target(name, args.heldout) for name in args.targets]:
        for seed in args.seeds:
            for method in args.methods:
                results.append(cell(target, method, seed, args, extractor))
                stem = args.out / ("avatarshift-short" if args.short else "avatarshift")
                keep(results, stem.with_suffix(".json"), extractor.name)
                stem.with_suffix(".md").write_text(table(results) + "\n")
        grid(target, results, args).save(args.out / f"{target.name}.png")
    print(table(results))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished cells are kept; start the benchmark again to go on.")
