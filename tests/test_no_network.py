"""RELIABILITY case 19 where there is no network at all: an empty network namespace, which only Linux has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = ["unshare", "-rn"]


def unshared() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not unshared(), reason="this system makes no network namespace for us")
def test_with_no_network_at_all(picture_folder: Path, tmp_path: Path) -> None:
    """The bundled model is trained, drawn from and scored, by what `unidad` does when nothing is configured."""
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    few = ["cycles=1", "batch_size=1", "fake_updates=1", "steps=1", "target_warmup=0", "transfer=0"]
    sets = [word for value in few for word in ("--set", value)]
    commands = (
        ["train", "--target", str(picture_folder), "--out", str(run), "--device", "cpu", "--preset", "fsig-near", *sets],
        ["sample", str(run), "-n", "2", "--out", str(drawn), "--device", "cpu"],
        ["evaluate", str(drawn), "--reference", str(picture_folder), "--device", "cpu"],
    )
    addresses = "import socket; print([name for _, name in socket.if_nameindex()])"
    assert subprocess.run([*ALONE, sys.executable, "-c", addresses], capture_output=True, text=True).stdout.strip() == "['lo']"
    for words in commands:
        done = subprocess.run([*ALONE, sys.executable, "-m", "unidad.cli", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists()
