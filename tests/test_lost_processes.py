"""RELIABILITY case 10: one of several processes is killed, refused or asked to stop; the others end, one speaks, nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from test_distributed import CODE, TORCHRUN, assert_close, launched, state
from test_export import V
from test_soak import done, saving, wait_for
from tiny import words

from unidad import checkpoint
from unidad.cli import main
from unidad.export import save_source

pytestmark = pytest.mark.usefixtures("no_report")
# The first process asks the launcher to stop, as Ctrl-C does, before it writes its second picture, and waits for what comes of it.
CTRL_C = """
import os, signal
from unidad import samples_folder
write, count = samples_folder._write_whole, []
def asking(*args):
    count.append(args)
    if len(count) == 2 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
    write(*args)
samples_folder._write_whole = asking
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in test_distributed: normalisation in groups of two channels."""
    folder = tmp_path_factory.mktemp("source") / "model"
    save_source(tiny.backbone(1, widths=(16, 16)), V, folder, {})
    return folder


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stands for torchrun: the store where two processes meet."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {"WORLD_SIZE": "2", **where}.items():
        monkeypatch.setenv(name, value)
    yield
    del store


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("command", [["--set", "batchsize=2"], ["--nonsense"], ["--preset", "fsig-naer"]], ids=" ".join)
def test_what_all_have_wrong_one_says(order, command, met, tmp_path: Path, capsys, monkeypatch) -> None:
    said = []
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        try:
            code: object = main(["train", "--target", "bundled:toonHead", "--out", str(tmp_path / "run"), *command])
        except SystemExit as end:  # argparse's way
            code = end.code
        assert code == 2
        said.append(capsys.readouterr().err)
    assert said[0].count("unidad: ") == 1
    assert said[1] == ""


def by_hand(arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes of the command line that no launcher watches, so that each one's own exit code is seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in training", "within a save", "networks shared out"])
def test_one_that_does_not_write_is_killed(moment: str, source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """The writer ends with a sentence and exit code 2, nothing is half-written, and one process goes on to the same weights."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    rate, shard = ("--set", "lr=1e-4"), str(moment == "networks shared out").lower()
    writer, other = by_hand(words(source, picture_folder, out, *rate, "--set", f"shard={shard}", cycles=400))
    wait_for(lambda: done(out) > 3, writer)
    if moment == "within a save":
        wait_for(lambda: saving(out), writer)
    other.kill()
    printed, text = writer.communicate(timeout=60)
    assert writer.returncode == 2, text
    other.communicate()
    assert printed == ""
    assert "unidad: Another process of this run has ended" in text
    assert "with the same command and --resume" in text
    assert "Traceback" not in text
    assert not [p.name for p in out.rglob("*") if p.name.endswith((".partial", ".part", ".old"))]
    for name in checkpoint.names(out / "checkpoints"):
        checkpoint.load(out / "checkpoints" / name)
    cycles = int(checkpoint.names(out / "checkpoints")[-1][:8]) + 2
    assert main(words(source, picture_folder, out, "--resume", *rate, cycles=cycles)) == 2, "half of the batch is another run"
    alone = ("--set", "batch_size=4", *rate)
    assert main(words(source, picture_folder, out, "--resume", *alone, cycles=cycles)) == 0
    assert main(words(source, picture_folder, whole, *alone, cycles=cycles)) == 0
    assert_close(state(whole, cycles), state(out, cycles))


@pytest.mark.slow
def test_killed_under_a_launcher(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """torchrun asks the others to stop as well: whichever they hear first, they end with one sentence that says how to go on."""
    out = tmp_path / "run"
    process = launched(tmp_path, (*TORCHRUN, "3"), words(source, picture_folder, out, cycles=400))
    wait_for(lambda: (out / "checkpoints" / "00000003").exists(), process)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    _, text = process.communicate(timeout=90)
    assert process.returncode != 0
    assert text.count("unidad: Another process of this run has ended") == 1, text
    assert text.count("unidad: ") == 1, text
    assert text.count("--resume") == 1, text


def drawing(source: Path, out: Path, *more: str) -> list[str]:
    return ["sample", str(source), "-n", "7", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--out", str(out), *more]


@pytest.mark.slow
def test_a_folder_refused_to_the_first_is_all_that_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.txt").write_text("mine")
    process = launched(tmp_path, (*TORCHRUN, "2"), drawing(source, tmp_path / "pictures"))
    _, text = process.communicate(timeout=120)
    assert process.returncode != 0
    assert text.count("unidad: ") == 1, text
    assert "is not an empty folder" in text
    assert "--resume" not in text, "there is nothing to go on with"


@pytest.mark.slow
def test_drawing_stopped_by_ctrl_c(source: Path, tmp_path: Path) -> None:
    """One sentence; what it advises leads to the same files as a run that was never broken off."""
    process = launched(tmp_path, (*TORCHRUN, "2"), drawing(source, tmp_path / "two"), first=CTRL_C)
    printed, text = process.communicate(timeout=120)
    assert process.returncode != 0
    assert printed == ""
    assert text.count("unidad: stopped by SIGINT while drawing") == 1, text
    assert text.count("unidad: ") == 1, text
    assert not (tmp_path / "two" / "grid.png").exists()
    assert main(drawing(source, tmp_path / "two", "--resume")) == 0
    assert main(drawing(source, tmp_path / "one")) == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()} == files
