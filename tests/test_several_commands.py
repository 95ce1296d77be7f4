"""Besides `train` and `sample`: `pretrain` and `evaluate` in several processes are one, and the other commands say that they run alone."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_distributed import TORCHRUN, Seat, Table, assert_close, launched, source, state, together
from test_evaluate import Flat, pictures
from test_lost_processes import met
from tiny import words

from unidad import commands, pretrain
from unidad.cli import main
from unidad.config import PretrainSettings, build_settings
from unidad.distributed import Ranks
from unidad.metrics.evaluate import evaluate
from unidad.metrics.features import features_of
from unidad.metrics.shared import share_features

__all__ = ["met", "source"]  # fixtures


class Job(Seat):
    """A seat for a whole job, which asks accelerate for more."""

    log_with = None

    def end_training(self) -> None:
        return None


class Small(Flat):
    batch_size = 4


def in_threads(count: int, work) -> list:
    """`work(seat)` in as many threads, which stand for processes."""
    table = Table(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Job(table, rank)), range(count)))


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_features_are_made_once_and_are_those_of_one(count: int) -> None:
    """10 pictures are batches of 4, 4 and 2; 3 are one batch, which leaves all but one process without any."""
    sets = [pictures(10, 1), pictures(3, 2), pictures(9, 3)]

    def work(seat: Job) -> tuple[Small, dict]:
        mine = Small()
        shared = share_features(mine, [(x, None) for x in sets], Ranks(seat))
        return mine, evaluate(sets[0], sets[2], sets[1], shared, k=2)

    done = in_threads(count, work)
    assert sum(mine.seen for mine, _ in done) == 10 + 3 + 9, "no picture twice, none left out"
    assert min(mine.seen for mine, _ in done) > 0
    alone = evaluate(sets[0], sets[2], sets[1], Small(), k=2)
    assert alone["frechet_distance"] > 0
    assert all(scores == alone for _, scores in done)


def test_what_the_first_has_kept_nobody_makes_again(tmp_path: Path) -> None:
    """The others may see another disk."""
    x = pictures(10)
    features_of(Small(), x, tmp_path / "0")

    def work(seat: Job) -> tuple[int, torch.Tensor | None]:
        mine, place = Small(), tmp_path / str(seat.process_index)
        shared = share_features(mine, [(x, place)], Ranks(seat))
        return mine.seen, features_of(shared, x, place) if seat.process_index == 0 else None

    (first, found), (second, _) = in_threads(2, work)
    assert first == second == 0
    assert torch.equal(found, Small()(x))


def test_pictures_are_drawn_once_and_are_those_of_one(source: Path, monkeypatch) -> None:
    monkeypatch.setattr(commands, "DRAWN_AT_ONCE", 2)
    asked = SimpleNamespace(n=7, steps=3, seed=5, device="cpu", class_label=None)
    model, drawn, draw = commands.load_product(str(source)), [], commands.draw_from
    monkeypatch.setattr(commands, "draw_from", lambda model, n, *rest: drawn.append(n) or draw(model, n, *rest))
    both = in_threads(2, lambda seat: commands._draw_together(model, asked, Ranks(seat)))
    assert sorted(drawn) == [1, 2, 2, 2]
    (alone,) = in_threads(1, lambda seat: commands._draw_together(model, asked, Ranks(seat)))
    assert all(torch.equal(pixels, alone) for pixels in both)
    assert len(alone.unique()) > 100


@pytest.mark.slow
def test_two_processes_score_as_one(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """On the command line: the same file to the last digit, one table; also when features are kept from before."""

    def asked(name: str, *more: str) -> list[str]:
        words = [
            "evaluate",
            str(source),
            "--reference",
            str(picture_folder),
            "--train",
            str(picture_folder),
            "-n",
            "70",
            "--steps",
            "2",
        ]
        return [*words, "--device", "cpu", "--json", str(tmp_path / name), *more]

    fresh = together(tmp_path, 2, asked("two.json", "--no-cache"))
    assert fresh.count("Frechet distance") == 1, "only one process speaks"
    assert main(asked("one.json")) == 0
    again = together(tmp_path, 2, asked("again.json"))
    assert again == fresh
    texts = [(tmp_path / name).read_text() for name in ("one.json", "two.json", "again.json")]
    assert texts[0] == texts[1] == texts[2]
    assert json.loads(texts[0])["samples"] == 70


# -- pretrain ---------------------------------------------------------------------------------------------------------


QUICK = {
    "cycles": 3,
    "lr": 1e-3,
    "tracker": "none",
    "device": "cpu",
    "precision": "fp32",
    "sample_every": 0,
    "save_every": 0,
    "log_every": 1,
}


def numbers(run: Path) -> tuple[dict[str, dict[str, torch.Tensor]], list[float]]:
    """The last checkpoint, and the losses in the log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return state(run, 3), [value for row in rows for value in row["losses"].values()]


@pytest.mark.parametrize("kind", ["pictures", "captions"])
def test_pretraining_in_two_threads_is_one(kind: str, source: Path, picture_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Whole jobs: the same weights, moments, generators and losses as one with the double batch; the first alone writes."""
    data = picture_folder
    if kind == "captions":
        sd = pytest.importorskip("sd")
        source, data = sd.write_pipeline(tmp_path / "sd", kind="v_prediction"), tmp_path / "told"
        data.mkdir()
        for file in picture_folder.iterdir():
            (data / file.name).write_bytes(file.read_bytes())
            (data / f"{file.stem}.txt").write_text("a cat" if int(file.stem) % 2 else "a dog")
    for job in (pretrain.Plain, pretrain.Captioned):
        monkeypatch.setattr(job, "draw", lambda *_: torch.zeros(1, 3, 16, 16, dtype=torch.uint8))

    def run(seat: Job, out: str, batch: int) -> Path:
        settings = build_settings(PretrainSettings, QUICK, {"init": str(source), "batch_size": batch})
        seats.seat = seat
        return pretrain.pretrain(data, tmp_path / out, settings).path

    seats = threading.local()
    monkeypatch.setattr(pretrain, "make_accelerator", lambda *_: seats.seat)
    in_threads(2, lambda seat: run(seat, "two", 2))
    in_threads(1, lambda seat: run(seat, "one", 4))
    (a, losses), (b, others) = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert_close(a, b)
    assert others == pytest.approx(losses, rel=1e-4)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert (tmp_path / "two" / "model" / "model_index.json").exists()


@pytest.mark.slow
def test_two_processes_pretrain_as_one(picture_folder: Path, tmp_path: Path) -> None:
    """From scratch, on the command line; then two go on alone, and only with the same whole batch."""
    values = ["size=16", "widths=16,16", "lr=1e-3", "tracker=none", "precision=fp32", "sample_every=0", "save_every=0"]

    def asked(out: str, cycles: int, batch: int, *more: str) -> list[str]:
        sets = [
            word for value in (*values, f"cycles={cycles}", f"batch_size={batch}", "lr_decay=constant") for word in ("--set", value)
        ]
        return ["pretrain", "--data", str(picture_folder), "--out", str(tmp_path / out), "--device", "cpu", *sets, *more]

    said = together(tmp_path, 2, asked("two", 4, 2))
    assert said.split() == [str(tmp_path / "two" / "model")], "only one process speaks"
    assert main(asked("one", 4, 4)) == 0
    assert_close(state(tmp_path / "one", 4), state(tmp_path / "two", 4))
    assert main(asked("two", 6, 2, "--resume")) == 2, "half of the batch is another run"
    assert main(asked("two", 6, 4, "--resume")) == 0
    assert main(asked("one", 6, 4, "--resume")) == 0
    assert_close(state(tmp_path / "one", 6), state(tmp_path / "two", 6))


# -- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [["export", "x", "--out", "y"], ["info", "x"], ["doctor"], ["reproduce", "x", "--out", "y"], ["bench", "evaluate"]],
    ids=lambda asked: asked[0],
)
def test_commands_for_one_process_say_so_once(asked: list[str], met, capsys, monkeypatch) -> None:
    said = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert main(asked) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == f"unidad: `unidad {asked[0]}` runs in one process, and several were launched. Start it by itself.\n"
    assert said[1] == ""


def test_a_subject_is_scored_in_one_process(met, capsys) -> None:
    assert main(["evaluate", "x", "--track", "sdp", "--train", "y"]) == 2
    assert "--track sdp is scored in one process" in capsys.readouterr().err


# -- how they end -----------------------------------------------------------------------------------------------------

# What still runs in each process when all is done, as Python is about to be taken down.
LEFT = """
import atexit, os, pathlib
def note():
    names = [pathlib.Path("/proc/self/task", task, "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    pathlib.Path(__file__).with_name("left" + os.environ["RANK"]).write_text(" ".join(names))
atexit.register(note)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "train, shared out", "sample", "refused"])
def test_no_connection_outlives_python(command: str, source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """One that does ends a process with SIGABRT now and then; gloo's threads are how it is seen."""
    if command == "sample":
        asked = ["sample", str(source), "-n", "2", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "drawn")]
    else:
        if command == "refused":
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "mine.txt").write_text("mine")
        asked = words(source, picture_folder, tmp_path / "run", "--set", f"shard={command == 'train, shared out'}", cycles=1)
    process = launched(tmp_path, (*TORCHRUN, "2"), asked, first=LEFT)
    _, text = process.communicate()
    assert (process.returncode == 0) == (command != "refused"), text
    assert "gloo" not in (tmp_path / "left0").read_text()
    if command != "refused":  # there the launcher ends the other one
        assert "gloo" not in (tmp_path / "left1").read_text()
