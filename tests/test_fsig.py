"""The paper's few-shot track from one end to the other, through the command line: a reduced ADM instead of the FFHQ checkpoint."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import adm_reference
import pytest
import torch
from diffusers import DDPMPipeline

from unidad.backbones.load import load_model
from unidad.cli import main
from unidad.config import TrainSettings, build_settings
from unidad.presets import PRESETS
from unidad.train import Trainer

BABIES = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "babies"
SHORT = {"cycles": 2, "fake_updates": 2, "sample_every": 0, "tracker": "none", "precision": "fp32", "ema": 0, "warmup": 1}


# METHOD section 7: what every preset has, and what is theirs alone.
COMMON = {
    "steps": 3,
    "lr": 2e-6,
    "lr_decay": "constant",
    "warmup": 500,
    "batch_size": 1,
    "accumulation": 1,
    "fake_updates": 5,
    "cycles": 8000,
}
COMMON |= {
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "clip": 10.0,
    "optimizer": "adamw",
    "gan_loss": "bce",
    "heads": "multi",
}
COMMON |= {
    "features": "layer",
    "rollout_grad": "all",
    "dmd_weight": 1.0,
    "anchor_weight": 0.0,
    "target_teacher": "online",
    "hflip": True,
}
TEXT = {
    "grid": "lcm",
    "gan_weight": 0.01,
    "disc_weight": 0.03,
    "gan_aggregation": "per_head",
    "denoising": "epsilon",
    "timestep_law": "uniform",
}
CODE = {
    "grid": "edm",
    "gan_weight": 0.015,
    "disc_weight": 0.05,
    "gan_aggregation": "mean_logit",
    "denoising": "edm",
    "timestep_law": "karras",
}


def run(*words: object, code: int = 0) -> None:
    assert main([str(word) for word in words]) == code


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fsig-near", TEXT | {"a": 0.25}),
        ("fsig-far", TEXT | {"a": 0.75}),
        ("fsig-near-paper", CODE | {"a": 0.25}),
        ("fsig-far-paper", CODE | {"a": 0.75}),
    ],
)
def test_the_presets_are_the_papers(name, own):
    settings = build_settings(TrainSettings, PRESETS[name])
    expected = COMMON | own
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.cycles * settings.fake_updates == 40_000


def broken_off(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run a training that is asked to stop after its third update."""
    update, done = Trainer.update, []

    def stopping(self, phase):
        update(self, phase)
        done.append(phase.name)
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopping)
        run(*words, code=143)
    assert done == ["student", "fake_teacher", "fake_teacher"]


@pytest.mark.parametrize(
    ("preset", "side"),
    [
        ("fsig-near", 16),
        pytest.param("fsig-near-paper", 32, marks=pytest.mark.slow),
        pytest.param("fsig-near", 64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not BABIES.is_dir(), reason="the ten babies are not part of the repository")
def test_from_a_checkpoint_to_an_exported_student(tmp_path, preset, side, monkeypatch):
    weights = adm_reference.random_weights((32, 64), (False, True))
    torch.save({"ema": weights}, tmp_path / "adm.pt")
    given = ("--head-width", 32, "--schedule", "linear", "--size", side)
    run("convert", "guided-diffusion", tmp_path / "adm.pt", "--out", tmp_path / "source", *given)
    short = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    train = ("train", "--preset", preset, "--source", tmp_path / "source", "--target", BABIES, "--out", tmp_path / "run")
    train = (*train, "--device", "cpu", *short)
    broken_off(monkeypatch, *train)
    run(*train, "--resume")
    run("sample", tmp_path / "run", "-n", 2, "--out", tmp_path / "pictures", "--device", "cpu")
    judged = ("--reference", BABIES, "--train", BABIES, "--device", "cpu", "--mode", "paper", "--json", tmp_path / "scores.json")
    run("evaluate", tmp_path / "run", "--n", 6, *judged)
    run("export", tmp_path / "run", "--out", tmp_path / "student")

    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["count"] == 10
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["samples"], scores["reference"], scores["train"], scores["mode"]) == (6, 10, 10, "paper")
    assert scores["drawn_with"] == {"nfe": 3, "seed": 0}
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
