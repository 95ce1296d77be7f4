"""The README's numbers for the bundled avatars: how near each student comes to its target domain, and how fast it draws.

    python benchmarks/avatars.py                        both targets, full preset, about an hour each on two CPU cores
    python benchmarks/avatars.py --targets bottts --preset avatars-demo

Held-out pictures are drawn once by scripts/avatars/draw.mjs (needs node and npm). Runs already finished are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from unidad.adapt import train
from unidad.backbones.load import bundled_path, load_model
from unidad.commands import load_product
from unidad.config import TrainSettings, build_settings, parse_overrides
from unidad.data import load_folder
from unidad.metrics.evaluate import evaluate
from unidad.metrics.features import EfficientNetLite0
from unidad.presets import PRESETS
from unidad.sample import draw

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "avatars"
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "intra_diversity", "copying")


def heldout(domain: str, folder: Path, count: int = 2000) -> Path:
    """Folder of held-out pictures of a domain, drawn if it is not there."""
    out = folder / domain
    if not out.is_dir() or sum(1 for _ in out.glob("*.png")) < count:
        if not (SCRIPTS / "node_modules").is_dir():
            subprocess.run(["npm", "ci"], cwd=SCRIPTS, check=True)
        command = [
            "node",
            "draw.mjs",
            "--domain",
            domain,
            "--count",
            str(count),
            "--prefix",
            "heldout",
            "--out",
            str(out.resolve()),
        ]
        subprocess.run(command, cwd=SCRIPTS, check=True)
    return out


def speed(source_name: str, student_name: str, n: int = 64) -> dict[str, float]:
    """Seconds a picture of the source with 50 DDIM steps and of the student, alternating in this process; medians of three."""
    source, student = load_model(source_name), load_product(student_name)
    seconds: dict[str, list[float]] = {"source": [], "student": []}
    for _ in range(3):
        for name, model in (("source", source), ("student", student)):
            began = time.perf_counter()
            draw(model.backbone, n, steps=model.student_steps, ddim_steps=50)
            seconds[name].append((time.perf_counter() - began) / n)
    middle = {name: sorted(values)[1] for name, values in seconds.items()}
    return middle | {"ratio": middle["source"] / middle["student"]}


def score_target(target: str, args: argparse.Namespace) -> dict[str, object]:
    """Train (unless done), draw, and score student and source against the target's held-out pictures."""
    out = args.runs / f"{args.preset}-{target}"
    settings = build_settings(TrainSettings, PRESETS[args.preset], parse_overrides(args.set))
    run = train(f"bundled:{target}", out, settings, resume=True)
    minutes = json.loads(run.log.read_text().splitlines()[-1])["seconds"] / 60
    student, source = load_product(out), load_model(settings.source)
    extractor = EfficientNetLite0()
    size = student.backbone.shape[-1]
    reference = load_folder(heldout(target, args.heldout), size).pixels
    pictures = load_folder(bundled_path(f"bundled:{target}", "targets"), size).pixels
    rows = {}
    for name, model in (("student", student), ("source", source)):
        samples = draw(model.backbone, args.n, seed=1_000_000, steps=model.student_steps)
        scores = evaluate(samples, reference, pictures, extractor, cache_dir=args.heldout / "features")
        rows[name] = {key: scores[key] for key in SCORES}
    ratio = rows["student"]["frechet_distance"] / rows["source"]["frechet_distance"]
    return {
        "target": target,
        "minutes": minutes,
        "n": args.n,
        "frechet_ratio": ratio,
        **rows,
        "speed": speed(settings.source, str(out)),
    }


def table(results: list[dict]) -> str:
    """Results as a Markdown table."""
    head = "| target | minutes | FD source | FD student | ratio | coverage | intra diversity | copying | sampling speed-up |"
    lines = [head, "|---" * 9 + "|"]
    for r in results:
        s = r["student"]
        lines.append(
            f"| {r['target']} | {r['minutes']:.0f} | {r['source']['frechet_distance']:.0f} | {s['frechet_distance']:.0f} "
            f"| {r['frechet_ratio']:.2f} | {s['coverage']:.2f} | {s['intra_diversity']:.1f} | {s['copying']:.3f} | {r['speed']['ratio']:.1f}x |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what is asked for and write benchmarks/results/avatars.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["toonHead", "bottts"])
    parser.add_argument("--preset", default="avatars", choices=sorted(PRESETS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--n", type=int, default=1000, help="samples to score")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--heldout", type=Path, default=ROOT / "data" / "heldout")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    results = [score_target(target, args) for target in args.targets]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "preset": args.preset,
        "set": args.set,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    (args.out / f"{args.preset}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / f"{args.preset}.md").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
