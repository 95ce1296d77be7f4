"""Long tests on the real command line: processes really killed. Run by hand: make soak."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_export import V

from unidad.export import save_source

KILLS = 20
SETTINGS = [
    "cycles=40",
    "batch_size=2",
    "fake_updates=2",
    "save_every=1",
    "sample_every=0",
    "log_every=5",
    "tracker=none",
    "a=0.5",
    "denoising=v",
]
PARTS = (
    "network.student",
    "network.fake_teacher",
    "network.heads",
    "network.target_teacher",
    "optimizer.student",
    "optimizer.heads",
    "ema",
    "random",
)


def command(source: Path, pictures: Path, out: Path) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "unidad.cli", "train", "--source", str(source), "--target", str(pictures), "--out", str(out),
            "--device", "cpu", "--preset", "fsig-near", "--resume", *sets]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_source(tiny.backbone(1), V, tmp_path / "source", {})
    return tmp_path / "source"


def final(out: Path) -> dict[str, bytes]:
    return {part: (out / "checkpoints" / "00000040" / f"{part}.safetensors").read_bytes() for part in PARTS}


@pytest.mark.slow
def test_killed_at_random_moments_the_run_is_the_same_run(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    subprocess.run(command(source, picture_folder, tmp_path / "whole"), check=True, capture_output=True)
    out, rng, killed = tmp_path / "killed", random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen(command(source, picture_folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (out / "checkpoints").exists() and process.poll() is None:
            time.sleep(0.05)
        try:
            process.wait(rng.uniform(3.0, 9.0))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        text = process.stderr.read().decode()
        process.wait()
        assert "Traceback" not in text, text
    assert killed >= KILLS // 2, "too few runs were alive to be killed; lower the delays"
    subprocess.run(command(source, picture_folder, out), check=True, capture_output=True)
    assert final(out) == final(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(source, picture_folder, tmp_path: Path, signum: int, code: int) -> None:
    subprocess.run(command(source, picture_folder, tmp_path / "whole"), check=True, capture_output=True)
    out = tmp_path / "stopped"
    process = subprocess.Popen(command(source, picture_folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out / "checkpoints").exists():
        time.sleep(0.05)
    process.send_signal(signum)
    _, text = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"--resume" in text
    subprocess.run(command(source, picture_folder, out), check=True, capture_output=True)
    assert final(out) == final(tmp_path / "whole")
