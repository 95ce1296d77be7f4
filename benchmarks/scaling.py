"""How cost grows: a cycle with the batch, memory with the number of target pictures and with the length of a run.

    python benchmarks/scaling.py                          the bundled model's shape; a few minutes
    python benchmarks/scaling.py --arch adm-32x64 --cycles 50

Random weights and pictures, the real loop. On a CPU memory is that of the process; it is read after the cycles named.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import torch

from unidad.bench import Cycle
from unidad.device import pick_device

CYCLE = {"fake_updates": 1}  # the shortest: what grows here grows alike in longer ones


def memory() -> float:
    """GB that this process holds now, on a GPU those allocated there."""
    if pick_device("auto").type == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def by_batch(arch: str, batches: list[int], folder: Path) -> list[dict[str, float]]:
    """GFLOP and seconds of a cycle (median of three after one), and both for each picture of the batch."""
    rows = []
    for batch in batches:
        cycle = Cycle.build(arch, CYCLE | {"batch_size": batch}, folder / f"batch{batch}")
        cycle.run()
        seconds = statistics.median(sum(cycle.run().values()) for _ in range(3))
        gflop = sum(cycle.flops().values()) / 1e9
        rows.append(
            {"batch": batch, "gflop": gflop, "gflop_each": gflop / batch, "seconds": seconds, "seconds_each": seconds / batch}
        )
    return rows


def with_pictures(arch: str, count: int, folder: Path) -> dict[str, float]:
    """GB after two cycles on so many target pictures."""
    cycle = Cycle.build(arch, CYCLE | {"batch_size": 1}, folder / f"pictures{count}", count)
    for _ in range(2):
        cycle.run()
    return {"pictures": count, "gb": memory()}


def by_pictures(arch: str, counts: list[int], folder: Path) -> list[dict[str, float]]:
    """The same for several counts, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(with_pictures, [arch] * len(counts), counts, [folder] * len(counts)))


def by_length(arch: str, cycles: int, folder: Path) -> list[dict[str, float]]:
    """GB at ten places along a run."""
    cycle, rows = Cycle.build(arch, CYCLE | {"batch_size": 1}, folder / "length"), []
    for i in range(1, cycles + 1):
        cycle.run()
        if i % max(1, cycles // 10) == 0:
            cycle.trainer.write_log()
            rows.append({"cycle": i, "gb": memory()})
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="avatars")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--pictures", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "arch": args.arch,
            "threads": torch.get_num_threads(),
            "length": by_length(args.arch, args.cycles, folder),
            "pictures": by_pictures(args.arch, args.pictures, folder),
            "batch": by_batch(args.arch, args.batches, folder),
        }
    for part in ("length", "pictures", "batch"):
        print(part)
        for row in found[part]:
            print("  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
