"""The paper's few-shot track from one end to the other, through the command line: a reduced ADM instead of the FFHQ checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import adm_reference
import pytest
import torch
from diffusers import DDPMPipeline

from unidad.backbones.load import load_model
from unidad.cli import main

BABIES = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "babies"
SHORT = {"cycles": 2, "fake_updates": 2, "sample_every": 0, "tracker": "none", "precision": "fp32", "ema": 0, "warmup": 1}


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize(("preset", "side"), [("fsig-near", 16), pytest.param("fsig-near-paper", 32, marks=pytest.mark.slow)])
@pytest.mark.skipif(not BABIES.is_dir(), reason="the ten babies are not part of the repository")
def test_from_a_checkpoint_to_an_exported_student(tmp_path, preset, side):
    weights = adm_reference.random_weights((32, 64), (False, True))
    torch.save({"ema": weights}, tmp_path / "adm.pt")
    given = ("--head-width", 32, "--schedule", "linear", "--size", side)
    run("convert", "guided-diffusion", tmp_path / "adm.pt", "--out", tmp_path / "source", *given)
    short = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    run(
        *("train", "--preset", preset, "--source", tmp_path / "source", "--target", BABIES, "--out", tmp_path / "run"),
        *("--device", "cpu", *short),
    )
    run("sample", tmp_path / "run", "-n", 2, "--out", tmp_path / "pictures", "--device", "cpu")
    run("export", tmp_path / "run", "--out", tmp_path / "student")

    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["count"] == 10
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 2
    source, student = load_model(tmp_path / "source"), load_model(tmp_path / "student")
    assert source.backbone.unet.conv_out.out_channels == 6
    assert student.backbone.unet.conv_out.out_channels == 3
    assert student.student_steps == ([998, 665, 332] if preset == "fsig-near" else [930, 604, 144])
    moved = student.backbone.unet.conv_out.weight - source.backbone.unet.conv_out.weight[:3]
    assert 0 < moved.abs().max() < 1e-4  # two updates at 2e-6
    if preset == "fsig-near":
        pipe = DDPMPipeline.from_pretrained(tmp_path / "student", use_safetensors=True)
        assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, side, side, 3)
    run("convert", "to-guided-diffusion", tmp_path / "student", "--out", tmp_path / "student.pt")
    back = torch.load(tmp_path / "student.pt", weights_only=True)
    assert back.keys() == weights.keys()
    assert torch.equal(back["out.2.weight"], student.backbone.unet.conv_out.weight)
