"""Several processes are one: N of them with b pictures each learn what one with N * b learns."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from loop import make
from test_export import V
from test_soak import wait_for
from tiny import words

from unidad import checkpoint
from unidad.augment import CutMix, augment
from unidad.cli import main
from unidad.distributed import _Rows, shared_draws
from unidad.export import save_source
from unidad.signals import STOPPING, Stopped

pytestmark = pytest.mark.usefixtures("no_report")
CODE = "import sys; from unidad import adapt, cli; adapt.write_report = lambda *_, **__: None; sys.exit(cli.main(sys.argv[1:]))"
ANCHORED = ("--set", "anchor=teacher", "--set", "anchor_weight=1", "--set", "anchor_pool=8", "--set", "anchor_steps=1",
            "--set", "rollout_grad=random", "--set", "augment=flip,translate", "--set", "fake_updates=2", "--set", "warmup=5",
            "--set", "lr=1e-4")  # fmt: skip


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
# As by a power cut, in the second checkpoint: after its first file, before the manifest.
DYING = """
import os, signal
from unidad import checkpoint
save, written = checkpoint.save_file, []
def dying(*args, **more):
    save(*args, **more)
    written.append(args)
    if len({str(path.parent) for _, path in written}) == 2 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = dying
"""


def launched(tmp_path: Path, launcher: tuple[str, ...], arguments: list[str], first: str = "") -> subprocess.Popen:
    """The command line by `torchrun` or another launcher; each process writes its number to a file of its own."""
    script = tmp_path / "unidad_without_report.py"
    script.write_text(
        f"import os, pathlib\npathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK']).write_text(str(os.getpid()))\n{first}{CODE}"
    )
    command = [sys.executable, "-m", *launcher, str(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(tmp_path: Path, count: int, arguments: list[str], first: str = "") -> str:
    process = launched(tmp_path, (*TORCHRUN, str(count)), arguments, first)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def state(run: Path, cycle: int) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint.load(run / "checkpoints" / f"{cycle:08d}").tensors


def assert_close(a: dict, b: dict) -> None:
    """Keys' biases are left out: softmax makes their gradient 0, so that Adam only magnifies rounding."""
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name, tensor in a[group].items():
            if group == "random":
                assert torch.equal(tensor, b[group][name]), "the generators stand at the same place"
            elif (group.startswith("network.") or group == "ema") and not name.endswith("to_k.bias"):
                assert torch.allclose(tensor, b[group][name], rtol=1e-3, atol=2e-5), (group, name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels in each group of the normalisation: with one, biases in front of it would have no gradient but rounding."""
    folder = tmp_path_factory.mktemp("source") / "model"
    save_source(tiny.backbone(1, widths=(16, 16)), V, folder, {})
    return folder


class Table:
    """Stands for accelerate where the processes are threads: they put their tensors down, wait, and all take the result."""

    def __init__(self, count: int):
        self.barrier, self.down = threading.Barrier(count, timeout=60), [torch.empty(0)] * count

    def meet(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.down[rank] = x.clone()
        self.barrier.wait()
        taken = list(self.down)
        self.barrier.wait()
        return taken


class Seat:
    device, trackers = torch.device("cpu"), ()

    def __init__(self, table: Table, rank: int):
        self.table, self.process_index, self.num_processes = table, rank, len(table.down)
        self.is_main_process = rank == 0

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        total = torch.stack(self.table.meet(self.process_index, x)).sum(dim=0, dtype=x.dtype)
        return total / self.num_processes if reduction == "mean" else total

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.table.meet(self.process_index, x))


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {
            "anchor_weight": 1.0,
            "anchor": "teacher",
            "anchor_pool": 8,
            "anchor_steps": 1,
            "rollout_grad": "random",
            "augment": "flip",
            "augment_target": 0.1,
        },
    ],
    ids=["paper", "anchored"],
)
def test_two_threads_are_one(numbers: dict, picture_folder: Path, tmp_path: Path) -> None:
    """The same sum without starting processes: every trained network after two cycles, and its losses."""
    settings = {"cycles": 2, "accumulation": 2, "lr": 1e-4, "precision": "fp32"}
    table = Table(2)
    trainers = [make(tmp_path / "two", picture_folder, tiny.unidad(2, **numbers), Seat(table, rank), **settings) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for finished in [pool.submit(trainer.fit) for trainer in trainers]:
            finished.result()
    one = make(tmp_path / "one", picture_folder, tiny.unidad(4, **numbers), batch_size=4, **settings)
    one.fit()
    for name, optimizer in one.optimizers.items():
        for i, slot in optimizer.state_dict()["state"].items():
            for trainer in trainers:
                mine = trainer.optimizers[name].state_dict()["state"][i]["exp_avg"]
                assert torch.allclose(mine, slot["exp_avg"], rtol=1e-2, atol=1e-4 * float(slot["exp_avg"].abs().max()) + 1e-7), (
                    name,
                    i,
                )
    assert trainers[0].stream.drawn == trainers[1].stream.drawn == one.stream.drawn
    assert torch.equal(trainers[1].generator.get_state(), one.generator.get_state())
    a, b = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two"))
    for row, other in zip(a, b, strict=True):
        assert other["losses"] == pytest.approx(row["losses"], rel=2e-3, abs=1e-5)
        assert other["updates"] == row["updates"]


def test_what_one_cannot_use_all_leave_out(picture_folder: Path, tmp_path: Path) -> None:
    """A loss that is not finite in the second process alone, and a signal to it alone."""
    table = Table(2)
    trainers = [
        make(tmp_path / "two", picture_folder, tiny.unidad(), Seat(table, rank), cycles=3, non_finite="skip") for rank in (0, 1)
    ]
    phase, calls = trainers[1].method.phases[1], []

    def loss(pictures: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 4:
            trainers[1]._ask(signal.SIGTERM)
        losses = phase.loss(pictures, labels)
        return losses | {"total": losses["total"] * (math.nan if len(calls) == 2 else 1.0)}

    trainers[1].method.phases[1] = dataclasses.replace(phase, loss=loss)
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(trainer.fit) for trainer in trainers]
        assert [type(end.exception()) for end in ends] == [Stopped, Stopped]
    for trainer in trainers:
        assert trainer.place.skipped == 1
        assert trainer.place.updates == {"student": 2, "fake_teacher": 3, "heads": 3, "target_teacher": 1}
        assert (trainer.place.cycle, trainer.place.phase, trainer.place.repeat) == (1, 2, 0)
    states = [t.method.networks["fake_teacher"].state_dict() for t in trainers]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
def test_two_processes_are_one(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """20 cycles of everything that is random or trained; then each goes on as the other, in mid training."""
    two, one = tmp_path / "two", tmp_path / "one"
    whole = ("--set", "batch_size=4")
    out = together(tmp_path, 2, words(source, picture_folder, two, *ANCHORED, "--set", "save_every=20", cycles=20))
    assert out.split() == [str(two / "report.html")], "only one process speaks"
    assert main(words(source, picture_folder, one, *ANCHORED, *whole, "--set", "save_every=20", cycles=20)) == 0
    trained = {"student", "fake_teacher", "heads", "target_teacher"}
    assert {g.removeprefix("network.") for g in state(two, 20) if g.startswith("network.")} == trained
    assert_close(state(one, 20), state(two, 20))
    rows = [(run / "log.jsonl").read_text().splitlines() for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 20
    assert main(words(source, picture_folder, two, *ANCHORED, "--resume", cycles=22)) == 2, "another size of the whole batch"
    assert main(words(source, picture_folder, two, *ANCHORED, *whole, "--resume", cycles=22)) == 0
    assert main(words(source, picture_folder, one, *ANCHORED, *whole, "--resume", cycles=22)) == 0
    assert_close(state(one, 22), state(two, 22))


def test_rows_of_draws_are_draws_of_the_whole() -> None:
    def draws(generator: torch.Generator, n: int) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8).expand(n, -1, -1, -1)
        with shared_draws():
            pool = torch.randn((5, 2), generator=generator)
        stop = torch.randint(1, 4, (), generator=generator)
        parts = [torch.randn((n, 2), generator=generator), torch.randint(0, 9, (n,), generator=generator)]
        return [
            pool,
            stop.view(1),
            *parts,
            torch.rand((n,), generator=generator),
            augment(x, ("flip", "translate", "cutout"), generator),
            CutMix(torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 8, 8), 0.0)(x, torch.zeros(n), generator),
        ]

    whole = draws(torch.Generator().manual_seed(0), 6)
    each = []
    for rank in range(3):
        generator = torch.Generator().manual_seed(0)
        with _Rows(generator, rank, 3):
            each.append(draws(generator, 2))
    for i, expected in enumerate(whole):
        parts = [one[i] for one in each]
        assert all(torch.equal(part, expected) for part in parts) if i < 2 else torch.equal(torch.cat(parts), expected)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_one_process_is_asked_to_stop(source: Path, picture_folder: Path, tmp_path: Path, signum: int) -> None:
    """In mid cycle, where student samples are carried over: both stop at the same update, and another number of processes goes on."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    process = launched(tmp_path, (*TORCHRUN, "2"), words(source, picture_folder, out, "--set", "lr=1e-4", cycles=20))
    wait_for(lambda: (out / "checkpoints" / "00000003").exists(), process)
    os.kill(int((tmp_path / "pid1").read_text()), signum)
    _, text = process.communicate(timeout=60)
    assert f"stopped by {signal.Signals(signum).name} in cycle" in text, text
    alone = ("--set", "batch_size=4", "--set", "lr=1e-4")
    assert main(words(source, picture_folder, out, "--resume", *alone, cycles=20)) == 0
    assert main(words(source, picture_folder, whole, *alone, cycles=20)) == 0
    assert_close(state(whole, 20), state(out, 20))


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """The process that writes dies in mid checkpoint: the one before is whole, the other process says so and ends, one alone goes on."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    process = launched(tmp_path, (*TORCHRUN, "2"), words(source, picture_folder, out, cycles=5), first=DYING)
    _, text = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "unidad: Another process of this run has ended" in text, text
    assert "Traceback" not in text.split("unidad: Another")[0], text
    assert checkpoint.names(out / "checkpoints") == ["00000001"]
    whole_batch = ("--set", "batch_size=4")
    assert main(words(source, picture_folder, out, "--resume", *whole_batch, cycles=5)) == 0
    assert main(words(source, picture_folder, whole, *whole_batch, cycles=5)) == 0
    assert_close(state(whole, 5), state(out, 5))


@pytest.mark.slow
def test_two_nodes_of_two_processes_are_one(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """The recipe of docs/distributed.md on this machine's loopback: two launchers that know of each other by address alone."""
    four, one = tmp_path / "four", tmp_path / "one"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for node in range(2):
        where = ("--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port)
        launcher = ("torch.distributed.run", *where, "--nproc_per_node", "2")
        nodes.append(launched(tmp_path, launcher, words(source, picture_folder, four, *ANCHORED, cycles=4)))
    for process in nodes:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 0, text
    assert main(words(source, picture_folder, one, *ANCHORED, "--set", "batch_size=8", cycles=4)) == 0
    assert_close(state(one, 4), state(four, 4))
    assert sorted(p.name for p in tmp_path.glob("pid*")) == ["pid0", "pid1", "pid2", "pid3"]


@pytest.mark.slow
def test_accelerate_launch(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    options = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    process = launched(tmp_path, ("accelerate.commands.launch", *options), words(source, picture_folder, two, cycles=2))
    _, text = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert (tmp_path / "pid1").exists(), "two processes ran"
    assert main(words(source, picture_folder, one, "--set", "batch_size=4", cycles=2)) == 0
    assert_close(state(one, 2), state(two, 2))


def test_what_a_cycle_reduces(tmp_path: Path, picture_folder: Path) -> None:
    """docs/distributed.md: 4 bytes for each weight of student, target teacher and k times fake teacher and heads, and a few numbers."""
    table, sent = Table(2), []

    class Counting(Seat):
        def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
            if self.process_index == 0:
                sent.append(x.numel() * x.element_size())
            return super().reduce(x, reduction)

    def cycle(rank: int) -> dict[str, int]:
        trainer = make(tmp_path, picture_folder, tiny.unidad(fake_updates=3), Counting(table, rank), cycles=1)
        for phase in trainer.method.cycle_phases(0):
            for _ in range(phase.repeats):
                trainer.update(phase)
        return {name: 4 * sum(p.numel() for p in network.parameters()) for name, network in trainer.method.networks.items()}

    with ThreadPoolExecutor(2) as pool:
        size, _ = pool.map(cycle, range(2))
    weights = size["student"] + size["target_teacher"] + 3 * (size["fake_teacher"] + size["heads"])
    updates, number = 5, 8 * (1 + len(STOPPING))
    assert sum(sent) == weights + updates * number


@pytest.mark.slow
def test_two_processes_draw_what_one_does(source: Path, tmp_path: Path) -> None:
    """File by file, none twice and none missing."""

    def asked(out: str, n: int) -> list[str]:
        words = ["sample", str(source), "-n", str(n), "--steps", "3", "--batch-size", "2", "--device", "cpu"]
        return [*words, "--out", str(tmp_path / out)]

    said = together(tmp_path, 2, asked("two", 7))
    assert said.split() == [str(tmp_path / "two" / "grid.png")], "only one process speaks"
    assert main(asked("one", 7)) == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()} == files
