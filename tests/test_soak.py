"""Long tests on the real command line: processes really killed. Run by hand: make soak."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unidad import checkpoint

KILLS, IN_A_SAVE = 50, 15
CYCLES = 100
SETTINGS = [
    f"cycles={CYCLES}",
    "batch_size=2",
    "fake_updates=2",
    "save_every=1",
    "sample_every=0",
    "log_every=1",
    "tracker=none",
    "a=0.5",
    "denoising=v",
]
# The whole command line but for the report, which takes ten seconds at the end of a run and has its own tests.
CODE = "import sys; from unidad import adapt, cli; adapt.write_report = lambda *_, **__: None; sys.exit(cli.main(sys.argv[1:]))"


def command(source: Path, pictures: Path, out: Path) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-c", CODE, "train", "--source", str(source), "--target", str(pictures), "--out", str(out),
            "--device", "cpu", "--preset", "fsig-near", "--resume", *sets]  # fmt: skip


@pytest.fixture(scope="module")
def whole(source: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the last checkpoint of a run holds that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(source, picture_folder, out), check=True, capture_output=True)
    return final(out)


def final(out: Path) -> dict[str, bytes]:
    """Every file of the last checkpoint; of the manifest the counters (place in the data and updates), but for the seconds."""
    folder = out / "checkpoints" / f"{CYCLES:08d}"
    counters = json.loads((folder / checkpoint.MANIFEST).read_text())["manifest"]["counters"]
    del counters["place"]["seconds"]
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} | {"counters": json.dumps(counters).encode()}


def start(words: list[str]) -> subprocess.Popen:
    heard = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731  # although these tests may run under nohup
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heard)


def wait_for(event: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until the event, in steps so small that a save is not missed; a process that ends before it is an error."""
    while not event():
        assert process.poll() is None, f"ended too early: {process.stderr.read().decode()}"
        time.sleep(0.0002)


def done(out: Path) -> int:
    """Cycles that stand in the log."""
    rows = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return len(rows)


def saving(out: Path) -> bool:
    return any((out / "checkpoints").glob(".*.partial"))


def killed(out: Path, words: list[str], inside_a_save: bool, delay: float) -> bool:
    """Start, kill within a save or `delay` seconds after the first new cycle; returns whether a save was cut off."""
    process, before = start(words), done(out)
    wait_for(lambda: done(out) > before, process)
    if inside_a_save:
        wait_for(lambda: saving(out), process)
    else:
        time.sleep(delay)
    process.kill()
    _, text = process.communicate()
    assert process.returncode == -signal.SIGKILL, text.decode()
    assert b"Traceback" not in text
    return saving(out)


def lost(out: Path) -> int:
    """Cycles between the last one in the log and the newest checkpoint that is whole."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    found = checkpoint.latest(out / "checkpoints")
    return rows[-1]["cycle"] - (found[1].counters["place"]["cycle"] if found else 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")  # `latest` warns when it passes a damaged checkpoint over: there must be none
def test_killed_at_random_moments_the_run_is_the_same_run(source: Path, picture_folder: Path, whole, tmp_path: Path) -> None:
    """RELIABILITY case 1."""
    out, rng, cut, most = tmp_path / "killed", random.Random(0), 0, 0
    words = command(source, picture_folder, out)
    for i in range(KILLS):
        cut += killed(out, words, inside_a_save=i % 2 == 0, delay=rng.uniform(0.0, 0.5))
        most = max(most, lost(out))
    subprocess.run(words, check=True, capture_output=True)
    sys.stdout.write(f"{KILLS} kills, {cut} inside a save, at most {most} cycle lost\n")
    assert cut >= IN_A_SAVE, "too few kills hit a save"
    assert most <= 1, "more than one save interval"
    assert final(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    source: Path, picture_folder: Path, whole, tmp_path: Path, signum: int, code: int
) -> None:
    """RELIABILITY case 6."""
    out = tmp_path / "stopped"
    process = start(command(source, picture_folder, out))
    wait_for(lambda: done(out) > 0, process)
    process.send_signal(signum)
    _, text = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"--resume" in text
    assert f"of {CYCLES}, after".encode() in text
    assert lost(out) <= 0, "the cycle that was under way is saved too"
    subprocess.run(command(source, picture_folder, out), check=True, capture_output=True)
    assert final(out) == whole
