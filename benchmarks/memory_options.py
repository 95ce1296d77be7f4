"""What each setting that saves memory saves and costs: peak and seconds of a training cycle, beside what `--plan` counts.

    python benchmarks/memory_options.py                              adm-32x64 under the preset fsig-near, on a CPU
    python benchmarks/memory_options.py --arch adm-256 --device cuda          for a GPU of 48 GB or more

Random weights and pictures, the real loop, no sample grids. Every setting has a process of its own, and the settings take turns, `--rounds`
times over, so that a busy machine is as busy for all; ratios are of processor seconds within a round (on a GPU of seconds) to the first
row's. Memory is the most that the process held less what it held after the imports, on a GPU the most that was allocated there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
from plan_memory import counted

from unidad.architectures import ARCHITECTURES
from unidad.bench import Cycle, peak_memory
from unidad.config import TrainSettings, build_settings, parse_overrides
from unidad.device import pick_device
from unidad.errors import SettingsError
from unidad.optimizers import refuse_missing_optimizer
from unidad.presets import PRESETS

Values = dict[str, Any]
# All but the second without averaging.
SAVERS: dict[str, Values] = {
    "float32, ema=0": {},
    "ema=0.999, as the preset": {"ema": 0.999},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "rollout_grad=last": {"rollout_grad": "last"},
    "both": {"gradient_checkpointing": True, "rollout_grad": "last"},
    "source_teacher_dtype=bf16": {"source_teacher_dtype": "bf16"},
    "optimizer=adamw8bit": {"optimizer": "adamw8bit"},
    "offload_optimizer": {"offload_optimizer": True},
    "precision=bf16": {"precision": "bf16"},
    "all but the last two": {
        "gradient_checkpointing": True,
        "rollout_grad": "last",
        "source_teacher_dtype": "bf16",
        "optimizer": "adamw8bit",
    },
}


def measured(arch: str, values: Values, cycles: int, folder: Path) -> dict[str, float]:
    """Peak in GB, and seconds of the processor and of the clock a cycle after one to warm up (the first also makes the moments)."""
    device = pick_device(str(values["device"]))
    before = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    cycle = Cycle.build(arch, values, folder)
    cycle.run()
    cpu, clock = time.process_time(), time.perf_counter()
    for _ in range(cycles):
        cycle.run()
    return {
        "gb": (peak_memory(device) - before) / 1e9,
        "cpu": (time.process_time() - cpu) / cycles,
        "clock": (time.perf_counter() - clock) / cycles,
    }


def fresh_processes() -> BaseContext:
    """Of processes that have done nothing before; where it can be, one that has only imported makes all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unidad.bench", "unidad.plan"])
    return context


def fits_here(values: Values) -> bool:
    """Whether this machine can run it: 8 bits need their library, offloading a GPU."""
    device = pick_device(str(values["device"]))
    if values.get("offload_optimizer") and device.type != "cuda":
        return False
    try:
        refuse_missing_optimizer(build_settings(TrainSettings, values), device)
    except SettingsError:
        return False
    return True


def main() -> None:
    """Print a row of JSON for each setting, and what was measured as soon as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="adm-32x64")
    parser.add_argument("--preset", choices=[name for name in PRESETS if name.startswith("fsig")], default="fsig-near")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(SAVERS), metavar="ROW", choices=list(SAVERS), help="some of the rows")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every row")
    args = parser.parse_args()
    common = PRESETS[args.preset] | {"precision": "fp32", "ema": 0.0, "device": args.device} | parse_overrides(args.set)
    rows = {name: common | SAVERS[name] for name in args.only if fits_here(common | SAVERS[name])}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    processes = fresh_processes()
    with tempfile.TemporaryDirectory() as place:
        for _ in range(args.rounds):
            for name, values in rows.items():
                with ProcessPoolExecutor(1, processes) as pool:
                    folder = Path(tempfile.mkdtemp(dir=place))
                    found[name].append(pool.submit(measured, args.arch, values, args.cycles, folder).result())
                print(name, found[name][-1], file=sys.stderr, flush=True)
        first = found[next(iter(rows))]
        for name, values in rows.items():
            clock = "cpu" if args.device == "cpu" else "clock"
            ratios = [mine[clock] / its[clock] for mine, its in zip(found[name], first, strict=True)]
            expected = counted(args.arch, values, Path(place) / "source")
            peak = max(each["gb"] for each in found[name])
            row = {"row": name, "counted_gb": expected, "measured_gb": peak, "measured_over_counted": peak / expected}
            row |= {f"{key}_seconds": statistics.median(each[key] for each in found[name]) for key in ("cpu", "clock")}
            print(json.dumps(row | {"times_the_first": sorted(ratios)}), flush=True)


if __name__ == "__main__":
    main()
