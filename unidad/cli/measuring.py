"""The command that measures this machine: bench."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from unidad.cli.common import DEVICES, Commands, command
from unidad.errors import SettingsError


def add_bench(commands: Commands) -> None:
    """`unidad bench`."""
    parser = command(
        commands,
        "bench",
        "Measure here what a training cycle, drawing or scoring costs, on random weights of a named shape.",
        """  unidad bench train --arch adm-32x64 --set batch_size=4
  unidad bench train --arch avatars --compare shared_forward=true shared_forward=false
  unidad bench sample --arch avatars -n 1000 --steps 3
  unidad bench evaluate -n 256
  unidad bench train --arch sd-1.5 --preset sdp --set lora_rank=64
architectures: avatars (the bundled model), adm-32x64 (for CPUs), adm-256 (the FFHQ model's shape), sd-1.5 and sdxl (these three are
for GPUs)""",
        _bench,
    )
    parser.add_argument("what", choices=("train", "sample", "evaluate"))
    parser.add_argument("--arch", default="avatars", help="which network (avatars)")
    parser.add_argument(
        "--preset", metavar="NAME", help="settings of this preset; else K = 3, k = 5, both teachers, a head per layer"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--cycles", type=int, default=5, help="cycles, or pairs of them, to measure (5)")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two settings, such as a=0 a=0.5 (several joined by commas), in alternation: the ratio of their times",
    )
    parser.add_argument("-n", type=int, default=256, help="pictures to draw or score (256)")
    parser.add_argument("--steps", type=int, default=3, metavar="K", help="network evaluations per picture (3)")
    parser.add_argument("--batch-size", type=int, default=32, help="of drawing (32)")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures to score (32)")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def _bench(args: argparse.Namespace, _console: Console) -> int:
    result = _measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(_as_text(result) if args.what == "train" else _drawn_or_scored(result))
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from unidad import bench
    from unidad.config import parse_overrides
    from unidad.presets import PRESETS

    if args.what == "evaluate":
        return bench.bench_evaluate(args.extractor, args.n, args.size)
    if args.what == "sample":
        return bench.bench_sample(args.arch, args.n, args.steps, args.batch_size, args.device)
    if args.preset and args.preset not in PRESETS:
        raise SettingsError(f"There is no preset '{args.preset}'. Known: {', '.join(PRESETS)}.")
    values = {k: v for k, v in PRESETS.get(args.preset, {}).items() if k not in LENGTHS} if args.preset else {}
    values = values | {"device": args.device} | parse_overrides(args.set)
    with tempfile.TemporaryDirectory(prefix="unidad-bench-") as folder:
        if args.compare:
            first, second = (values | parse_overrides(side.split(",")) for side in args.compare)
            return bench.compare_train(args.arch, first, second, args.cycles, Path(folder))
        return bench.bench_train(args.arch, values, args.cycles, Path(folder))


# Of a preset's settings, those that say how long it runs or where from; a cycle costs the same without.
LENGTHS = frozenset(
    {"source", "student_init", "cycles", "max_minutes", "sample_every", "save_every", "target_warmup", "target_cycles", "transfer"}
)


def _as_text(result: Mapping[str, Any]) -> str:
    if "ratio" in result:
        return (
            f"A takes {result['ratio']:.3f} of B's time ({result['low']:.3f} to {result['high']:.3f}, quartiles of {result['pairs']} pairs): "
            f"{result['first']:.3f} s against {result['second']:.3f} s a cycle"
        )
    lines = [f"{result['arch']} on {result['device']}, {result['threads']} threads, median of {result['cycles']} cycles"]
    for name, seconds in result["seconds"].items():
        flops = result["flops"][name]
        lines.append(f"  {name:<16}{seconds:>9.3f} s{flops / 1e9:>12.1f} GFLOP{flops / seconds / 1e9:>10.1f} GFLOP/s")
    rate = result["matmul_flops_per_second"] / 1e9
    lines.append(f"  {result['forwards']:.1f} forwards of the batch a cycle; {result['images_per_second']:.2f} student samples/s")
    lines.append(
        f"  {result['share']:.0%} of a matrix product's rate here ({rate:.0f} GFLOP/s); peak {result['peak_bytes'] / 1e9:.2f} GB; "
        f"log lines add {result['log_share']:.2%}"
    )
    return "\n".join(lines)


def _drawn_or_scored(result: Mapping[str, Any]) -> str:
    if "extractor" in result:
        what = f"{result['extractor']}: features of {result['n']} pictures of {result['size']} pixels"
    else:
        what = (
            f"{result['arch']}, {result['threads']} threads: {result['n']} pictures in {result['steps']} steps, {result['batch_size']} at once, "
            f"peak {result['peak_bytes'] / 1e9:.2f} GB"
        )
    return f"{what}\n  {result['seconds']:.2f} s, {result['images_per_second']:.1f} pictures/s"
