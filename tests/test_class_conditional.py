"""A class-conditional source, from the run to what stock diffusers draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_export import V, as_stranger

from unidad.cli import main
from unidad.commands import draw_from, load_product
from unidad.data import to_uint8
from unidad.export import save_source

QUICK = [
    "cycles=1",
    "batch_size=2",
    "fake_updates=1",
    "warmup=1",
    "tracker=none",
    "device=cpu",
    "ema=0",
    "sample_every=0",
    "class_label=2",
]
pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classes") / "source"
    save_source(tiny.backbone(1, num_class_embeds=3), V, out, {})
    return out


def job(command: str, source: Path, pictures: Path, out: Path) -> None:
    settings = [word for value in QUICK for word in ("--set", value)]
    assert main([command, "--source", str(source), "--target", str(pictures), "--out", str(out), *settings]) == 0


def test_an_exported_student_keeps_its_class(classes: Path, picture_folder: Path, tmp_path: Path) -> None:
    job("train", classes, picture_folder, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    for folder in (tmp_path / "run" / "student", tmp_path / "out"):
        assert json.loads((folder / "unidad.json").read_text())["class_label"] == 2
        assert "class_labels=torch.full((4,), 2)" in (folder / "README.md").read_text()
        assert load_product(folder).class_label == 2


def test_a_fine_tuned_model_draws_its_class_in_stock_diffusers(classes: Path, picture_folder: Path, tmp_path: Path) -> None:
    job("finetune", classes, picture_folder, tmp_path / "run")
    model = tmp_path / "run" / "model"
    call = "class_labels=torch.full((4,), 2)"
    assert f"pipe(batch_size=4, num_inference_steps=50, {call}).images" in (model / "README.md").read_text()
    theirs = as_stranger(model, tmp_path / "x.pt", "ConsistencyModelPipeline", f"num_inference_steps=1, {call}")
    mine = draw_from(load_product(tmp_path / "run"), 4, 1, 0, 4, "cpu", 2)
    assert (to_uint8(theirs * 2 - 1).int() - mine.int()).abs().max() <= 1
    other = draw_from(load_product(tmp_path / "run"), 4, 1, 0, 4, "cpu", 1)
    assert not torch.equal(other, mine), "the class matters"
