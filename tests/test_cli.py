from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from unidad import commands, info, ingredients
from unidad.cli import main
from unidad.config import TrainSettings
from unidad.report import read_log

TINY = ["--set", "cycles=4", "--set", "batch_size=2", "--set", "fake_updates=2", "--set", "log_every=1", "--set", "sample_every=2"]
TINY += [
    "--set",
    "save_every=2",
    "--set",
    "tracker=none",
    "--set",
    "a=0.5",
    "--set",
    "denoising=v",
    "--preset",
    "fsig-near",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def run(source: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", "--source", str(source), "--target", str(picture_folder), "--out", str(out), *TINY]) == 0
    return out


def test_train_leaves_everything_a_person_needs(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    assert facts["settings"]["a"] == 0.5
    assert facts["surroundings"]["versions"]["torch"] == torch.__version__
    assert facts["student_steps"] == [998, 665, 332]
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["00000000.png", "00000002.png", "00000004.png"]
    assert (run / "student" / "model_index.json").exists()
    rows = read_log(run / "log.jsonl")
    assert [row["cycle"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["updates"] == {"student": 4, "fake_teacher": 8, "target_teacher": 4, "heads": 8}
    with Image.open(run / "grid.png") as grid:
        assert grid.width > 500
    page = (run / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page, "the report must be whole without a network"
    assert page.count("<svg") >= 4
    assert "data:image/png;base64," in page


def test_a_product_older_than_its_run_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(run, tmp_path / "run")
    words = ["sample", str(tmp_path / "run"), "-n", "1", "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    assert "Note" not in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints" / "00000004").rename(tmp_path / "run" / "checkpoints" / "00000006-1-0000000000")
    assert main([*words, str(tmp_path / "b")]) == 0
    assert "is of cycle 4, and its run has gone on to 6: finish it with --resume" in capsys.readouterr().err


def test_sampling_does_not_depend_on_the_batch(run: Path, tmp_path: Path) -> None:
    assert main(["sample", str(run), "-n", "5", "--seed", "3", "--out", str(tmp_path / "a"), "--batch-size", "2"]) == 0
    assert main(["sample", str(run / "student"), "-n", "3", "--seed", "5", "--out", str(tmp_path / "b")]) == 0
    for seed in (5, 6, 7):
        a, b = (Image.open(tmp_path / d / f"{seed:06d}.png") for d in "ab")
        assert a.tobytes() == b.tobytes()


def test_other_steps_than_it_learnt_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", str(run), "-n", "1", "--steps", "3", "--out", str(tmp_path / "three")]) == 0
    assert "Note" not in capsys.readouterr().err
    assert main(["sample", str(run), "-n", "1", "--steps", "5", "--out", str(tmp_path / "five")]) == 0
    assert "learnt to draw in 3 steps; expect worse pictures in 5" in capsys.readouterr().err


def test_export_equals_the_runs_own_student(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "e")]) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "e" / name).read_bytes() == (run / "student" / name).read_bytes()


def test_evaluate_writes_its_scores(run: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["evaluate", str(run), "--reference", str(picture_folder), "--train", str(picture_folder), "--n", "8"]
    assert main([*args, "--json", str(tmp_path / "s.json"), "--panel", str(tmp_path / "p.png")]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["extractor"] == "efficientnet-lite0"
    assert scores["drawn_with"] == {"nfe": 3, "seed": 0}
    assert scores["frechet_distance"] > 0
    assert "Frechet distance" in capsys.readouterr().out
    assert (tmp_path / "p.png").exists()


def test_evaluate_refuses_before_it_draws(
    run: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(commands, "load_product", lambda *_: pytest.fail("it began to draw"))
    (tmp_path / "empty").mkdir()
    pictures = ["--reference", str(picture_folder), "--train", str(picture_folder)]
    for more, said in (
        ([*pictures, "--panel", str(tmp_path / "p")], "must end in .png or .jpg or .jpeg or .webp"),
        ([*pictures, "--panel", str(tmp_path / "p.txt")], "must end in"),
        ([*pictures, "--json", str(tmp_path)], "is a folder. Give the name of a file"),
        (["--reference", str(tmp_path / "empty")], "holds no pictures"),
        ([*pictures[:2], "--train", str(tmp_path / "nowhere")], "There is no folder"),
        ([*pictures[:2], "--train", "bundled:toonhead"], "Did you mean 'toonHead'?"),
    ):
        assert main(["evaluate", str(run), *more]) == 2
        assert said in capsys.readouterr().err


def test_info_says_what_things_are(run: Path, source: Path, picture_folder: Path, capsys: pytest.CaptureFixture) -> None:
    for path, words in (
        (run, "cycle 4 of 4"),
        (run / "student", "3-step student"),
        (source, "many-step"),
        (picture_folder, "10 pictures"),
    ):
        assert main(["info", str(path)]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("repeated", [True, False])
def test_resume_is_the_same_run(
    run: Path, source: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeated: bool
) -> None:
    """With every setting given again, and with those of run.json."""
    monkeypatch.setattr(ingredients, "write_report", lambda *_, **__: None)
    args = ["train", "--source", str(source), "--target", str(picture_folder), "--out", str(tmp_path / "r"), *TINY]
    assert main([*args, "--set", "cycles=2"]) == 0
    assert main([*(args if repeated else [*args[:1], *args[5:7], "--set", "cycles=4"]), "--resume"]) == 0
    name = "checkpoints/00000004/{}.safetensors"
    for part in (
        "network.student",
        "network.fake_teacher",
        "network.heads",
        "network.target_teacher",
        "optimizer.student",
        "ema",
        "random",
    ):
        assert (tmp_path / "r" / name.format(part)).read_bytes() == (run / name.format(part)).read_bytes(), part
    assert len(read_log(tmp_path / "r" / "log.jsonl")) == 4


def test_settings_are_listed_as_a_config_file_that_says_what_each_is(capsys) -> None:
    assert main(["train", "--preset", "avatars", "--set", "a=0.5", "--list-settings"]) == 0
    listed = capsys.readouterr().out
    assert yaml.safe_load(listed).keys() == {field.name for field in dataclasses.fields(TrainSettings)}
    assert yaml.safe_load(listed)["a"] == 0.5
    assert "  # weight of the target teacher against the source teacher\n" in listed


def test_an_unfinished_run_is_drawn_from_with_a_note(run: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "student")
    assert main(["sample", str(copy), "-n", "1", "--out", str(tmp_path / "pictures")]) == 0
    assert "has not finished: this is its checkpoint of cycle 4." in capsys.readouterr().err
    (copy / "log.jsonl").unlink()
    assert main(["info", str(copy)]) == 0
    assert "cycle 4 of 4, no log line yet" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *args: str) -> str:
    try:
        code = main(list(args))
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("unidad:") == 1
    return text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "gan_wieght=1"], "Did you mean 'gan_weight'"),
        (["--set", "a=2"], "'a' must lie between 0 and 1"),
        (["--steps", "0"], "'steps' must lie between 1"),
        (["--set", "a"], "key=value"),
        (["--set", "lr=fast"], "'lr' must be a number"),
        (["--preset", "avatarz"], "Did you mean 'avatars'"),
        (["--source", "bundled:nothing"], "There is no 'bundled:nothing'"),
        (["--source", "no/such/folder/here"], "There is no model folder"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--set", "class_label=3"], "knows no classes"),
        (["--set", "student_init=bundled:none"], "bundled:none"),
        (["--set", "dmd_weight=0", "--set", "gan_weight=0"], "learn nothing"),
        (["--target", "nowhere"], "There is no folder 'nowhere'"),
        (["--plan", "--set", "offload_optimizer=true"], "Leave it off"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_settings_are_one_sentence(
    source: Path, picture_folder: Path, tmp_path: Path, capsys, more: list[str], words: str
) -> None:
    args = ["train", "--source", str(source), "--target", str(picture_folder), "--out", str(tmp_path / "out"), *TINY, *more]
    assert words in refused(capsys, *args)
    assert not (tmp_path / "out").exists(), "nothing may be written before everything is checked"


def test_a_folder_with_something_in_it_is_left_alone(run: Path, source: Path, picture_folder: Path, tmp_path: Path, capsys) -> None:
    base = ["train", "--source", str(source), "--target", str(picture_folder)]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "already holds a run" in refused(capsys, *base, "--out", str(run), *TINY)
    assert "a: was 0.5, now 0.25" in refused(capsys, *base, "--out", str(run), *TINY, "--set", "a=0.25", "--resume")
    assert "method: was uni-dad, now finetune" in refused(capsys, "finetune", "--out", str(run), "--resume")
    assert "is a train run: go on with `unidad train`" in refused(capsys, "pretrain", "--out", str(run), "--resume")
    assert "--data FOLDER is needed" in refused(capsys, "pretrain", "--out", str(tmp_path / "new"), "--resume")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    (tmp_path / "mine.txt").write_text("keep me")
    assert "is not empty" in refused(capsys, *base, "--out", str(tmp_path), *TINY)
    for command, what in (("train", "--target"), ("pretrain", "--data")):  # before minutes go into pictures
        assert "is not empty" in refused(capsys, command, what, str(tmp_path / "nowhere"), "--out", str(tmp_path))
    assert "not an empty folder" in refused(capsys, "sample", str(run), "--out", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_folders(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    base = ["train", "--source", str(source), "--out", str(tmp_path / "out"), *TINY]
    assert "holds no pictures" in refused(capsys, *base, "--target", str(tmp_path / "empty"))
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "small.png")
    assert "small.png (8x8)" in refused(capsys, *base, "--target", str(tmp_path / "empty"))
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    assert "broken.png" in refused(capsys, *base, "--target", str(tmp_path / "empty"))
    assert "is not a diffusion pipeline" in refused(
        capsys, *base, "--source", str(tmp_path / "empty"), "--target", "bundled:bottts"
    )
    file = str(tmp_path / "lora.safetensors")
    assert "no lora/pytorch" in refused(capsys, "convert", "lora", str(source), "--out", file, "--format", "kohya")
    assert "no run, no diffusers model" in refused(capsys, "info", str(tmp_path))
    assert "There is nothing at" in refused(capsys, "info", str(tmp_path / "gone"))


def test_doctor_and_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) in (0, 1)
    assert torch.__version__.split("+")[0] in capsys.readouterr().out
    assert main([]) == 2
    assert "unidad COMMAND --help" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    assert "--steps K" not in capsys.readouterr().out, "a fine-tuned model has no number of steps"
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("train", "sample", "evaluate", "export", "pretrain", "info", "doctor"):
        assert command in text
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "unidad " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("torch", "2.9.1+cpu", "torch 2.9.1+cpu is too old (its files could run code): pip install 'torch>=2.10'."),
        ("pillow", "10.4.0", "pillow 10.4.0 is too old"),
        ("diffusers", "0.36.0.dev0", None),
        ("accelerate", "1.15.0", None),
    ],
)
def test_doctor_names_old_packages(name: str, version: str, words: str | None, capsys, monkeypatch) -> None:
    monkeypatch.setattr(info, "package_version", lambda package: version if package == name else "99.0")
    code, text = main(["doctor"]), capsys.readouterr().out
    assert ("too old" in text) == (words is not None)
    assert words is None or (words in text and code == 1)


def test_doctor_names_combinations_that_do_not_work(capsys, monkeypatch) -> None:
    found = info.importlib.util.find_spec
    monkeypatch.setattr(
        info.importlib.util, "find_spec", lambda name: {"torchvision": None, "torch_fidelity": 1}.get(name, found("os"))
    )
    monkeypatch.setattr(info.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "torch-fidelity without torchvision breaks torchmetrics" in text
    assert "this torch finds no GPU" in text


def test_pretrain_makes_a_source(picture_folder: Path, tmp_path: Path) -> None:
    args = ["pretrain", "--data", str(picture_folder), "--out", str(tmp_path / "p"), "--device", "cpu"]
    args += ["--set", "size=16", "--set", "widths=8,16", "--set", "cycles=3", "--set", "batch_size=2", "--set", "tracker=none"]
    assert main(args) == 0
    assert main(["sample", str(tmp_path / "p"), "-n", "2", "--steps", "3", "--out", str(tmp_path / "s")]) == 0
    assert (tmp_path / "p" / "model" / "model_index.json").exists()


def test_compile_with_bf16_is_refused_on_a_cpu(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = [
        "pretrain",
        "--data",
        str(picture_folder),
        "--out",
        str(tmp_path / "p"),
        "--device",
        "cpu",
        "--set",
        "size=16",
        "--set",
        "widths=8,16",
    ]
    assert "wrong gradients" in refused(capsys, *args, "--set", "compile=true", "--set", "precision=bf16")


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    command = f"{sys.executable} -m unidad.cli train --list-settings | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 1), "0 where all was written before the reader left"
