"""What one GPU shows at the true size of the paper's few-shot track: random weights of the FFHQ 256 shape, the real loop, `fsig-near`.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json           some ten minutes on an H100 or H200, without `plan`
    python benchmarks/gpu.py --rows batches                               one group of rows
    python benchmarks/gpu.py --rows plan                                  what `--plan` counts for the rows of `memory`

Groups: `batches` (seconds and share of a matrix product's rate over batch size), `memory` (peak and seconds of every setting that saves
memory), `levers` (settings that are for speed, at batch 1), `sampling` (three evaluations a picture), `plan`. FLOPs are those of batch 1 times the
batch, without what is computed again. Peak: the most that was allocated, less the random model, which a run keeps in the computer's memory. A row that does not fit says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from plan_memory import counted

from unidad.architectures import architecture_names, random_model
from unidad.backbones.load import Model
from unidad.bench import Cycle, bench_sample, matmul_rate, peak_memory
from unidad.cli.measuring import LENGTHS
from unidad.errors import SettingsError
from unidad.presets import PRESETS

Values = dict[str, Any]
PRESET = {key: value for key, value in PRESETS["fsig-near"].items() if key not in LENGTHS} | {"ema": 0.999}
CHECKPOINTING: Values = {"gradient_checkpointing": True}
_SAVERS: dict[str, Values] = {
    "preset": {},
    "bf16 source": {"source_teacher_dtype": "bf16"},
    "8 bits": {"optimizer": "adamw8bit"},
    "offload": {"offload_optimizer": True},
    "bf16 source, 8 bits": {"source_teacher_dtype": "bf16", "optimizer": "adamw8bit"},
    "bf16 source, offload": {"source_teacher_dtype": "bf16", "offload_optimizer": True},
}
MEMORY: dict[str, Values] = _SAVERS | {f"{name}, checkpointing": values | CHECKPOINTING for name, values in _SAVERS.items()}
MEMORY |= {"last-step gradient": {"rollout_grad": "last"}, "float32": {"precision": "fp32"}}
BATCHES: dict[str, Values] = {f"batch {n}": {"batch_size": n} for n in (1, 2, 4, 8)}
BATCHES |= {f"batch {n}, checkpointing": {"batch_size": n} | CHECKPOINTING for n in (4, 8, 16)}
LEVERS: dict[str, Values] = {
    "joint batch": {"joint_batch": True},
    "channels last": {"channels_last": True},
    "channels last, batch 4": {"channels_last": True, "batch_size": 4},
    "separate forwards": {"shared_forward": False},
    "no batch reused": {"reuse_batch": False},
    "compile": {"compile": True},
}
SAMPLING = ((2, "fp32", 64), (2, "bf16", 64), (16, "fp32", 256), (16, "bf16", 1024), (64, "bf16", 5000))  # at once, precision, n


@cache
def source(arch: str) -> Model:
    """The random model, made once and kept on the GPU, so that its copies are quickly made."""
    model = random_model(arch)
    model.backbone.to("cuda")
    return model


def train_row(arch: str, values: Values, cycles: int) -> dict[str, Any]:
    """Median seconds of a cycle and its phases after the first, the first's own, and the peak."""
    model = source(arch)
    aside = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        cycle = Cycle.build(arch, PRESET | {"device": "cuda"} | values, Path(folder), model=model)
        first = sum(cycle.run().values())
        runs = [cycle.run() for _ in range(cycles)]
        peak = peak_memory(cycle.device) - aside
    phases = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    total = statistics.median(sum(run.values()) for run in runs)
    return {"seconds": total, "phases": phases, "first_seconds": first, "peak_gb": peak / 1e9}


def cycle_flops(arch: str) -> int:
    """FLOPs of the preset's cycle at batch 1."""
    with tempfile.TemporaryDirectory() as folder:
        cycle = Cycle.build(arch, PRESET | {"device": "cuda"}, Path(folder), model=source(arch))
        cycle.run()
        return sum(cycle.flops().values())


def measured(group: str, arch: str, cycles: int) -> Any:
    """The rows of a group, each as soon as it is there."""
    flops, rate = 0, 0.0
    if group == "batches":
        flops, rate = cycle_flops(arch), matmul_rate(torch.device("cuda"), torch.bfloat16)
        yield {"row": "a cycle at batch 1", "flops": flops, "matmul_flops_per_second": rate}
    rows: dict[str, Values] = {"batches": BATCHES, "memory": MEMORY, "levers": LEVERS}[group]
    for name, values in rows.items():
        gc.collect()
        torch.cuda.empty_cache()
        try:
            row = train_row(arch, values, cycles)
        except torch.cuda.OutOfMemoryError:
            row = {"out_of_memory": True}
        except (SettingsError, RuntimeError) as error:
            row = {"refused": str(error)[:300]}
        if flops and "seconds" in row:
            row |= {"share": flops * values["batch_size"] / row["seconds"] / rate}
        yield {"row": name} | row


def drawn(arch: str) -> Any:
    """Rows of `sampling`."""
    for batch, precision, n in SAMPLING:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield {"row": f"{batch} at once, {precision}"} | bench_sample(arch, n, 3, batch, "cuda", precision)


def planned(arch: str) -> Any:
    """Rows of `plan`."""
    for name, values in MEMORY.items():
        with tempfile.TemporaryDirectory() as folder:
            yield {"row": name, "counted_gb": counted(arch, PRESET | {"device": "cuda"} | values, Path(folder))}


def main() -> None:
    """Print every row as a line of JSON, and keep all of them in a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = ["batches", "memory", "levers", "sampling", "plan"]
    parser.add_argument("--rows", nargs="+", default=groups[:-1], choices=groups)
    parser.add_argument("--arch", choices=architecture_names(), default="adm-256")
    parser.add_argument("--cycles", type=int, default=3, help="after the first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This needs an NVIDIA GPU that torch sees. See `unidad doctor`.")
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "arch": args.arch}
    begun, found = time.perf_counter(), []
    for group in args.rows:
        rows = (
            planned(args.arch)
            if group == "plan"
            else drawn(args.arch)
            if group == "sampling"
            else measured(group, args.arch, args.cycles)
        )
        for row in rows:
            found.append({"group": group} | row)
            print(json.dumps(found[-1] | {"at": round(time.perf_counter() - begun)}), flush=True)
            if args.json:
                args.json.write_text(json.dumps(facts | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
