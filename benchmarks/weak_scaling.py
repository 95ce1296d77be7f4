"""A training cycle of one process against that of two that hold a batch of the same size each, and against what paper says it costs.

    python benchmarks/weak_scaling.py --arch avatars --batch-size 2

Processes of one thread each on this machine's CPU cores, gloo between them. One and two are measured in alternation; seconds are medians.
Paper: the two need what one needs, and for each update the time that averaging so many gradients takes, measured by itself. Where more runs on the
machine than it has cores for, wall time says how busy it was; processor seconds (of a process with its gloo threads) say what was added.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unidad.bench import Cycle
from unidad.distributed import connected


def measure(arch: str, batch_size: int, cycles: int, folder: Path) -> dict[str, Any]:
    """In each of the processes: wall and processor seconds of its cycles, bytes reduced, and what those take alone."""
    cycle = Cycle.build(arch, {"batch_size": batch_size, "device": "cpu", "fake_updates": 1}, folder)
    with connected(cycle.trainer.accelerator) as ranks:
        ranks.wait()
        cycle.run()
        rows = []
        for _ in range(cycles):
            busy = time.process_time()
            rows.append((sum(cycle.run().values()), time.process_time() - busy))
        method = cycle.trainer.method
        size = {name: sum(p.numel() for p in method.networks[name].parameters()) for name in method.trained()}
        reduced = sum(phase.repeats * sum(size[name] for name in phase.trains) for phase in method.phases)
        largest, alone = method.networks[max(size, key=size.__getitem__)], []
        for p in largest.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(2 * cycles if ranks.count > 1 else 0):
            ranks.wait()
            begin, busy = time.perf_counter(), time.process_time()
            ranks.average_gradients([largest])
            alone.append((time.perf_counter() - begin, time.process_time() - busy))
        found = {"rows": rows, "bytes": 4 * reduced}
        return found | ({"alone": [[t * reduced / max(size.values()) for t in pair] for pair in alone]} if alone else {})


def launched(count: int, arguments: list[str]) -> dict[str, Any]:
    """What the first of `count` processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)} if count > 1 else {}
    command = [sys.executable, __file__, "--worker", *arguments]
    environments = [{**os.environ, "OMP_NUM_THREADS": "1", **several} for _ in range(count)]
    for rank, environment in enumerate(environments if count > 1 else []):
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for environment in environments]
    texts = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a process failed")
    return json.loads(texts[0].splitlines()[-1])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="avatars")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--cycles", type=int, default=5, help="of each round (5)")
    parser.add_argument("--rounds", type=int, default=3, help="of one process and two (3)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with tempfile.TemporaryDirectory(prefix="unidad-weak-") as folder:
            print(json.dumps(measure(args.arch, args.batch_size, args.cycles, Path(folder))), flush=True)
        return 0
    arguments = ["--arch", args.arch, "--batch-size", str(args.batch_size), "--cycles", str(args.cycles)]
    rounds = [[launched(count, arguments) for count in (1, 2)] for _ in range(args.rounds)]
    one, two = ([row for pair in rounds for row in pair[i]["rows"]] for i in range(2))
    alone = [row for pair in rounds for row in pair[1]["alone"]]
    print(
        f"{rounds[0][0]['bytes'] / 1e6:.1f} MB reduced a cycle; {len(one)} cycles each; load of the machine {os.getloadavg()[0]:.1f}"
    )
    for name, i in (("wall seconds", 0), ("processor seconds", 1)):
        a, b, c = (statistics.median(row[i] for row in rows) for rows in (one, two, alone))
        print(
            f"{name:18} one {a:.3f}  two {b:.3f}  reducing alone {c:.3f}  on paper {a + c:.3f}  efficiency {a / b:.2f}, on paper {a / (a + c):.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
