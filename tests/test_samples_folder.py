"""A folder of samples that is broken off and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_export import V

from unidad import samples_folder
from unidad.cli import main
from unidad.errors import DataError
from unidad.export import save_student
from unidad.sample import at_once
from unidad.samples_folder import fill, open_samples

# Draws as the command line does, and kills its own process, which nothing can catch, when the fourth picture is being written.
KILLED = """
import os, signal, sys
from unidad import cli, samples_folder
write, count = samples_folder._write_whole, []
def dying(file, picture):
    count.append(file)
    if len(count) == 4:
        file.with_name("." + file.name + ".partial").write_bytes(b"half a picture")
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, picture)
samples_folder._write_whole = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_the_batches_out(count, tmp_path):
    def draw(n: int, first: int) -> torch.Tensor:
        drawn.append((n, first))
        return torch.zeros(n, 3, 8, 8, dtype=torch.uint8)

    shares = []
    for rank in range(count):
        drawn: list[tuple[int, int]] = []
        fill(tmp_path, 11, 5, 2, draw, rank, count)
        shares.append(drawn)
    together = sorted(first for share in shares for _, first in share)
    assert together == [5, 7, 9, 11, 13, 15]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(5, 16)]


def test_a_full_disk_leaves_no_litter(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    fill(tmp_path, 2, 0, 2, lambda n, _: torch.zeros(n, 3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        fill(tmp_path, 4, 0, 2, lambda n, _: torch.zeros(n, 3, 8, 8, dtype=torch.uint8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.png", "000001.png"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    net = tiny.backbone(1)
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(net, V, net.schedule.student_steps(2), folder, {"source": "tiny", "target": "ten"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_killed_and_gone_on_with(student, tmp_path):
    def words(out: str) -> list[str]:
        return [
            "sample",
            str(student),
            "-n",
            "7",
            "--seed",
            "5",
            "--batch-size",
            "3",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / out),
        ]

    assert main(words("whole")) == 0
    died = subprocess.run([sys.executable, "-c", KILLED, *words("broken")], timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert died.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "broken").glob("0*.png")) == ["000005.png", "000006.png", "000007.png"]
    untouched = (tmp_path / "broken" / "000006.png").stat().st_mtime_ns
    assert main([*words("broken"), "--resume"]) == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert (tmp_path / "broken" / "000006.png").stat().st_mtime_ns == untouched


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_drawing_is_stopped(signum, code, student, tmp_path, capsys, monkeypatch):
    """At once, after the pictures that are there; handlers are as before, and the advice leads to all of them."""
    write, written, handler = samples_folder._write_whole, [], signal.getsignal(signum)

    def asked(file: Path, picture: torch.Tensor) -> None:
        if len(written) == 2:
            signal.raise_signal(signum)
        write(file, picture)
        written.append(file.name)

    words = ["sample", str(student), "-n", "5", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(samples_folder, "_write_whole", asked)
    assert main(words) == code
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(signum).name} while drawing" in said
    assert "--resume" in said
    assert signal.getsignal(signum) is handler
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "samples.json"]
    monkeypatch.setattr(samples_folder, "_write_whole", write)
    assert main([*words, "--resume"]) == 0
    assert len(list((tmp_path / "out").glob("0*.png"))) == 5


def test_memory_that_runs_out_while_drawing_has_advice_of_its_own(student, tmp_path, capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("unidad.commands.fill", refuse)
    assert main(["sample", str(student), "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "a smaller --batch-size" in said
    assert "--set" not in said, "a setting of training"
    assert "checkpoint" not in said


def test_only_the_same_pictures_are_gone_on_with(student, tmp_path, capsys):
    words = ["sample", str(student), "-n", "2", "--device", "cpu", "--out", str(tmp_path / "a")]
    assert main(words) == 0
    before = contents(tmp_path / "a")
    for more, said in (
        ([], "add --resume"),
        (["--resume", "--seed", "9"], "this seed: 0, not 9"),
        (["--resume", "--steps", "1"], "this steps: None, not 1"),
        (["--resume", "--steps", "2000"], "--steps"),
    ):
        assert main(words + more) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "b"), "--resume"]) == 2
    assert "cannot be gone on with" in capsys.readouterr().err
    assert contents(tmp_path / "a") == before
    assert main([*words, "--resume", "-n", "3", "--batch-size", "1"]) == 0
    assert contents(tmp_path / "a").keys() == before.keys() | {"000002.png"}


def test_whole_batches_are_drawn_again_but_only_missing_files_written(tmp_path):
    drawn = []

    def draw(count: int, first: int) -> torch.Tensor:
        drawn.append((count, first))
        return torch.stack([torch.full((3, 8, 8), first + i, dtype=torch.uint8) for i in range(count)])

    folder = open_samples(tmp_path / "x", {"seed": 10}, resume=False)
    fill(folder, 8, 10, 3, draw)
    assert drawn == [(3, 10), (3, 13), (2, 16)]
    (folder / "000014.png").unlink()
    fill(folder, 8, 10, 3, draw)
    assert drawn[3:] == [(3, 13)]
    with pytest.raises(DataError, match="this seed: 10, not 11"):
        open_samples(folder, {"seed": 11}, resume=True)


def test_large_pictures_are_drawn_few_at_once():
    assert [at_once(side) for side in (16, 32, 64, 128, 256, 512)] == [32, 32, 32, 8, 2, 1]
    assert [at_once(side, 50) for side in (32, 64, 128, 256)] == [50, 50, 12, 3]
    assert [at_once(side, device=torch.device("cuda")) for side in (32, 64, 128, 256)] == [128, 128, 32, 8]
    assert at_once(256, device=torch.device("cpu")) == 2
