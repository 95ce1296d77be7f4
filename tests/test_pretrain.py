from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_export import V

from unidad.backbones.load import load_model
from unidad.cli import main
from unidad.config import PretrainSettings, build_settings
from unidad.errors import ModelError
from unidad.export import save_source
from unidad.pretrain import pretrain

SMALL = {
    "size": 16,
    "widths": "8,16",
    "cycles": 2,
    "batch_size": 2,
    "tracker": "none",
    "device": "cpu",
    "sample_every": 0,
    "ema": 0.0,
}


def test_it_goes_on_from_another_model(picture_folder: Path, tmp_path: Path) -> None:
    """With a rate of 0 the weights are those it began with, its shape too, whatever `size` says."""
    save_source(tiny.backbone(1), V, tmp_path / "first", {})
    settings = build_settings(
        PretrainSettings, SMALL, {"init": str(tmp_path / "first"), "lr": 0.0, "size": 32, "widths": "8,16,16"}
    )
    run = pretrain(picture_folder, tmp_path / "more", settings)
    before, after = load_model(tmp_path / "first"), load_model(run.path)
    for name, value in before.backbone.state_dict().items():
        assert torch.equal(after.backbone.state_dict()[name], value.half().float()), name  # stored in float16
    assert after.scheduler == before.scheduler
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["hashes"]["init"] == before.digest
    assert "on from 'first'" in (run.path / "model" / "README.md").read_text()


def test_from_scratch_the_rate_matters(picture_folder: Path, tmp_path: Path) -> None:
    runs = [pretrain(picture_folder, tmp_path / str(lr), build_settings(PretrainSettings, SMALL, {"lr": lr})) for lr in (0.0, 0.01)]
    first, second = (load_model(run.path).backbone.state_dict() for run in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_class_conditional_start_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    save_source(tiny.backbone(1, num_class_embeds=3), V, tmp_path / "classes", {})
    with pytest.raises(ModelError, match="class-conditional; `unidad pretrain` trains unconditional and text-to-image models only"):
        pretrain(picture_folder, tmp_path / "out", build_settings(PretrainSettings, SMALL, {"init": str(tmp_path / "classes")}))
    assert not (tmp_path / "out").exists()


def test_it_can_be_exported_and_needs_not_be_told_again_what_it_is(picture_folder: Path, tmp_path: Path) -> None:
    words = ["pretrain", "--out", str(tmp_path / "run")]
    small = [word for key, value in (SMALL | {"cycles": 1}).items() for word in ("--set", f"{key}={value}")]
    assert main([*words, "--data", str(picture_folder), *small]) == 0
    assert main([*words, "--resume", "--set", "cycles=1"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    written, run = load_model(tmp_path / "out"), load_model(tmp_path / "run" / "model")
    assert all(torch.equal(value, written.backbone.state_dict()[name]) for name, value in run.backbone.state_dict().items())
