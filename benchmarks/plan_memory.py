"""What `unidad train --plan` counts against what a few cycles of the same run take.

    python benchmarks/plan_memory.py --set batch_size=4                       adm-32x64 on a CPU; a minute or two a row
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/plan_memory.py --set batch_size=4

Random weights and pictures, the real loop, no sample grids. On a CPU: the most that the process held less what it held after the imports;
on a GPU: the most that was allocated there. The variable makes glibc give memory back that was freed, so that no pieces of it are held: on a
CPU the plan counts them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil

from unidad.architectures import TEXT_UNETS, architecture_names, random_model
from unidad.bench import REFERENCE, TOLD, Cycle, peak_memory
from unidad.config import TrainSettings, build_settings, parse_overrides
from unidad.device import pick_device
from unidad.export import save_source
from unidad.plan import FIRST_USE, PIECES, plan


def measured(arch: str, values: dict[str, str], cycles: int, folder: Path) -> float:
    """GB at the most while these cycles run."""
    device = pick_device(values.get("device", "auto"))
    before = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    cycle = Cycle.build(arch, values, folder)
    for _ in range(cycles):
        cycle.run()
    return (peak_memory(device) - before) / 1e9


def counted(arch: str, values: dict[str, str], folder: Path) -> float:
    """GB that `--plan` expects at the most, leaving out the sample grids, which are not drawn here."""
    source, told = arch, TOLD
    if arch not in TEXT_UNETS:
        model = random_model(arch)
        save_source(model.backbone, model.scheduler, folder, {})
        source, told = str(folder), {}
    found = plan(build_settings(TrainSettings, REFERENCE, told, values, {"source": source}))
    undrawn = replace(found, drawing=0, aside=0)
    return replace(undrawn, aside=round(PIECES * undrawn.passing) + FIRST_USE if found.aside else 0).total / 1e9


def main() -> None:
    """Print both and their ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=architecture_names(), default="adm-32x64")
    parser.add_argument("--cycles", type=int, default=2, help="at least 2: the first makes the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    values = parse_overrides(args.set)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measured, args.arch, values, args.cycles, folder / "run").result()
        expected = counted(args.arch, values, folder / "source")
    row = {
        "arch": args.arch,
        "set": values,
        "counted_gb": expected,
        "measured_gb": found,
        "measured_over_counted": found / expected,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
