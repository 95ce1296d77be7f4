"""A true, small run of the subject track: a one-step student of a random latent model moves to the flat photos it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sd
import torch
from PIL import Image
from test_sdp import settings

from unidad.adapt import train
from unidad.backbones import load_text
from unidad.commands import load_product
from unidad.ingredients_text import gather_text
from unidad.rollout import rollout, seeded_noise


def distance(model: load_text.TextModel, photos: torch.Tensor) -> float:
    """Mean squared distance of 16 one-step samples to the nearest photo, both as latents, [N, c, s, s]."""
    net = model.backbone
    net.set_prompts(load_text.encode_prompts(model.folder, ["a prt cat", ""]))
    with torch.no_grad():
        z = rollout(net, seeded_noise(range(16), net.shape), [999], torch.zeros(16, dtype=torch.long))
    return float((z[:, None] - photos).square().mean((2, 3, 4)).amin(1).mean())


@pytest.mark.slow
def test_a_one_step_student_moves_to_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unidad.adapt.finish", lambda *_: None)  # no report, no folder: the newest checkpoint is looked at
    source = sd.write_pipeline(tmp_path / "source", kind="v_prediction")
    config = source / "vae" / "config.json"  # latents of about unit size, as a trained VAE's are
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 4.0}))
    (tmp_path / "photos").mkdir()
    for i, colour in enumerate([(230, 40, 90), (210, 60, 80)]):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "photos" / f"{i}.png")
    few = {"cycles": 120, "target_warmup": 60, "batch_size": 4, "fake_updates": 2, "a": 1.0, "guidance": 1.0}
    s = settings(source, **few, lr=1e-2, denoising="v", log_every=20)
    photos = gather_text(s, tmp_path / "photos").latents
    before = distance(load_text.load_text_model(source), photos)
    run = train(tmp_path / "photos", tmp_path / "run", s)
    after = distance(load_product(run.path), photos)
    assert after < before / 2, (before, after)  # seen: 1.43 to 0.44
