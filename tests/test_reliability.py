"""The promises of docs/reliability.md on the real command line: disks that refuse, memory that runs out, folders in use, hostile files."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_export import V
from tiny import words

from unidad import checkpoint, ingredients
from unidad.cli import main
from unidad.export import save_source
from unidad.metrics.extractors import load_extractor
from unidad.report import read_log, write_report
from unidad.run import Lock

pytestmark = pytest.mark.usefixtures("no_report")


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Inside, the system refuses more than `value` of a resource to this process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def at_most(megabytes: int) -> Iterator[None]:
    """Inside, this process may grow by so much."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return limit(resource.RLIMIT_AS, now + megabytes * 10**6)


# -- disks, memory, numbers: cases 3, 4, 7, 8 -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 150_000, 300_000], ids=["run.json", "network", "optimizer"])
def test_a_disk_that_refuses(size: int, copy: Path, source: Path, picture_folder: Path, capsys) -> None:
    """RLIMIT_FSIZE stands for the full disk: the first file larger than `size` cannot be written."""
    more = words(source, picture_folder, copy, "--resume", cycles=4)
    before = (copy / "run.json").read_bytes()
    with limit(resource.RLIMIT_FSIZE, size):
        assert main(more) == 2
    text = capsys.readouterr().err
    assert str(copy) in text
    assert "File too large" in text
    if size == 1_000:
        assert (copy / "run.json").read_bytes() == before
    else:
        assert "00000003" in text
        assert "bytes" in text
    assert checkpoint.names(copy / "checkpoints") == ["00000001", "00000002"]
    assert [p.name for p in copy.rglob("*") if p.name.endswith((".part", ".partial", ".old"))] == []
    assert checkpoint.latest(copy / "checkpoints")[0] == "00000002"
    assert main(more) == 0, "with room again it goes on"
    assert checkpoint.names(copy / "checkpoints") == ["00000003", "00000004"]


def test_a_disk_too_small_is_refused_before_training(
    source: Path, picture_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**7, 10**7 - 10**6, 10**6))
    assert main(words(source, picture_folder, tmp_path / "out")) == 2
    assert "keep=2) need" in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["network.student.safetensors", "random.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_told_and_passed_over(name: str, copy: Path, source: Path, picture_folder: Path, capsys) -> None:
    file = copy / "checkpoints" / "00000002" / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert main(words(source, picture_folder, copy, "--resume")) == 0
    text = capsys.readouterr().err
    assert str(file) in text or "no readable manifest.json" in text
    assert "Going on from '00000001' instead" in text
    assert "Going on from cycle 1 of 2" in text
    assert [name for name in checkpoint.names(copy / "checkpoints") if checkpoint.load(copy / "checkpoints" / name)] == [
        "00000001",
        "00000002",
    ]


def test_an_infinite_loss_is_named_and_nothing_is_saved(picture_folder: Path, tmp_path: Path, capsys) -> None:
    wild = tiny.backbone(1)
    with torch.no_grad():
        wild.unet.conv_out.weight.mul_(1e30)
    save_source(wild, V, tmp_path / "wild", {})
    assert main(words(tmp_path / "wild", picture_folder, tmp_path / "out")) == 1
    text = capsys.readouterr().err
    for part in ("phase 'student'", "became", "cycle 0", "no checkpoint yet", "non_finite=skip"):
        assert part in text
    assert checkpoint.names(tmp_path / "out" / "checkpoints") == []
    assert main(words(tmp_path / "wild", picture_folder, tmp_path / "skip", "--set", "non_finite=skip", cycles=9)) == 1, (
        "ten in a row"
    )


def test_memory_that_runs_out_in_the_forward_pass(source: Path, picture_folder: Path, tmp_path: Path, capsys) -> None:
    with at_most(1500):
        assert main(words(source, picture_folder, tmp_path / "out", "--set", "batch_size=30000")) == 1
    text = capsys.readouterr().err
    assert "you tried to allocate" in text
    assert "--set batch_size=1" in text
    assert len(text) < 1000


@pytest.mark.parametrize("where", ["backward", "save"])
def test_memory_that_runs_out_later(where: str, source: Path, picture_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise (
            MemoryError("tried to allocate 2.00 GiB")
            if where == "save"
            else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        )

    monkeypatch.setattr(*((checkpoint, "save_file", refuse) if where == "save" else (torch.Tensor, "backward", refuse)))
    assert main(words(source, picture_folder, tmp_path / "out")) == 1
    text = capsys.readouterr().err
    assert "ried to allocate 2.00 GiB" in text
    assert "--set batch_size=1" in text
    assert [p for p in (tmp_path / "out" / "checkpoints").glob("*") if p.is_dir()] == []


# -- whose folder, which run: cases 9, 11 -----------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_before_anything_is_loaded(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """Loading torch takes longer than the two seconds that are promised."""
    code = "import sys; from unidad.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    with Lock(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", code, *words(source, picture_folder, tmp_path, "--resume")], capture_output=True, text=True
        )
    assert done.returncode == 2
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in done.stderr
    assert done.stdout.strip() == "False"


def test_resuming_as_another_run_is_refused_with_the_difference(
    run: Path, source: Path, picture_folder: Path, tmp_path: Path, capsys
) -> None:
    save_source(tiny.backbone(1, widths=(8, 8)), V, tmp_path / "other", {})
    shutil.copytree(picture_folder, tmp_path / "fewer")
    (tmp_path / "fewer" / "00.png").unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for command, difference in (
        (words(tmp_path / "other", picture_folder, run, "--resume"), "source: was "),
        (words(source, tmp_path / "fewer", run, "--resume"), "pictures: was "),
        (words(source, picture_folder, run, "--resume", "--steps", "2"), "steps: was 3, now 2"),
    ):
        assert main(command) == 2
        assert difference in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_names_that_look_like_markup(source: Path, tmp_path: Path, capsys) -> None:
    for name in ("[bold]x.png", "[red].png"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / name)
    assert main(words(source, tmp_path / "pictures", tmp_path / "out", cycles=1)) == 0
    assert "Note: '[red].png' is the same picture as '[bold]x.png'." in capsys.readouterr().err


# -- no network, no secrets: case 19 ----------------------------------------------------------------------------------

CALLS: list[tuple[str, str]] = []
_listening = False


def _listen(event: str, args: tuple) -> None:
    if _listening and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        CALLS.append((event, str(args[1:])))


def test_nothing_is_sent_and_no_secret_is_written(source: Path, picture_folder: Path, tmp_path: Path, monkeypatch) -> None:
    global _listening
    monkeypatch.setattr(ingredients, "write_report", write_report)
    load_extractor()
    sys.addaudithook(_listen)
    secrets = {name: f"secret-{name.lower()}-0123456789" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    out, drawn = tmp_path / "out", tmp_path / "drawn"
    _listening = True
    try:
        assert main(words(source, picture_folder, out, cycles=1)) == 0
        assert main(["sample", "bundled:avatars-3step", "-n", "2", "--out", str(drawn)]) == 0
        assert main(["evaluate", str(drawn), "--reference", str(picture_folder), "--json", str(tmp_path / "scores.json")]) == 0
        assert main(["export", str(out), "--out", str(tmp_path / "export")]) == 0
    finally:
        _listening = False
    assert CALLS == []
    for file in (p for p in tmp_path.rglob("*") if p.is_file()):
        content = file.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], file


def test_the_audit_hook_hears(tmp_path: Path) -> None:
    """The check above could not fail if the hook were deaf."""
    code = "import sys, socket; heard = []; sys.addaudithook(lambda e, a: heard.append(e)); "
    code += "s = socket.socket(); s.connect_ex(('127.0.0.1', 9)); print('socket.connect' in heard)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


# -- the size and cost of saving --------------------------------------------------------------------------------------


def test_saving_is_measured(run: Path) -> None:
    rows = [row for row in read_log(run / "log.jsonl") if "save_bytes" in row]
    assert len(rows) == 1, "the first cycle's save stands in the second cycle's row"
    files = (run / "checkpoints" / "00000001").glob("*.safetensors")
    held = sum(t.numel() * t.element_size() for file in files for t in load_file(file).values())
    assert rows[0]["save_bytes"] == held
    assert rows[0]["save_seconds"] >= 0
