"""True, small runs of the subject track: a one-step student of a tiny latent model moves to the flat photos it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sd
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from test_sdp import settings

from unidad.adapt import train
from unidad.backbones import load_text
from unidad.commands import load_product
from unidad.ingredients_text import gather_text
from unidad.rollout import rollout, seeded_noise

PHOTOS, OTHERS = [(230, 40, 90), (210, 60, 80)], [(30, 200, 90), (60, 60, 220)]
FEW = {"cycles": 120, "target_warmup": 60, "batch_size": 4, "a": 1.0, "guidance": 1.0, "denoising": "v", "log_every": 20}


def distance(model: load_text.TextModel, photos: torch.Tensor) -> float:
    """Mean squared distance of 16 one-step samples to the nearest photo, both as latents, [N, c, s, s]."""
    net = model.backbone
    net.set_prompts(load_text.encode_prompts(model.folder, ["a prt cat", ""]))
    with torch.no_grad():
        z = rollout(net, seeded_noise(range(16), net.shape), [999], torch.zeros(16, dtype=torch.long))
    return float((z[:, None] - photos).square().mean((2, 3, 4)).amin(1).mean())


def scale_latents(source: Path, scale: float) -> None:
    config = source / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))


def distances(source: Path, place: Path, **values: object) -> tuple[list[float], list[float]]:
    """Of one-step samples before and after a run on two flat photos: to these, and to two of other colours."""
    for name, colours in (("photos", PHOTOS), ("others", OTHERS)):
        (place / name).mkdir()
        for i, colour in enumerate(colours):
            Image.new("RGB", (32, 32), colour).save(place / name / f"{i}.png")
    s = settings(source, **FEW | values)
    sets = [gather_text(s, place / name).latents for name in ("photos", "others")]
    before = load_text.load_text_model(source)
    run = train(place / "photos", place / "run", s)
    after = load_product(run.path)
    return [distance(before, latents) for latents in sets], [distance(after, latents) for latents in sets]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unidad.adapt.finish", lambda *_: None)  # no report, no folder: the newest checkpoint is looked at


@pytest.mark.slow
def test_a_one_step_student_moves_to_the_photos(tmp_path: Path):
    """From a network of random weights."""
    source = sd.write_pipeline(tmp_path / "source", kind="v_prediction")
    scale_latents(source, 4.0)  # latents of about unit size, as a trained VAE's are
    before, after = distances(source, tmp_path, lr=1e-2, fake_updates=2)
    assert after[0] < before[0] / 2, (before, after)  # seen: 1.43 to 0.44
    assert after[0] < after[1] / 2, "nearer to the photos than to others"  # seen: 1.31 before, 1.21 after


@pytest.mark.slow
def test_a_one_step_student_of_adapters_moves_to_the_photos(tmp_path: Path):
    """From a network that knows flat pictures of all colours: adapters turn what a base can do, they do not make it."""
    source = flat_source(tmp_path / "source")
    before, after = distances(source, tmp_path, lora_rank=8, lr=3e-3, fake_updates=1)
    assert after[0] < 0.75 * before[0], (before, after)  # seen: 0.45 to 0.29
    assert after[0] < after[1] / 2, "nearer to the photos than to others"  # seen: 0.43 before, 1.14 after


def flat_source(folder: Path, steps: int = 300) -> Path:
    """A pipeline whose UNet was trained for a while on flat pictures of 24 colours."""
    sd.write_pipeline(folder, kind="v_prediction")
    colours = torch.rand(24, 3, 1, 1, generator=(generator := torch.Generator().manual_seed(1))) * 2 - 1
    pictures = colours.expand(-1, -1, 16, 16).contiguous()
    scale_latents(folder, 0.18215 / float(load_text.encode_pictures(load_text.load_vae(folder), pictures).std()))
    latents = load_text.encode_pictures(load_text.load_vae(folder), pictures)
    schedule, told = load_text.load_text_model(folder).backbone.schedule, load_text.encode_prompts(folder, ["a cat"])
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,  # groups of several channels: a norm over each one alone takes away the mean that a flat picture is
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    for _ in range(steps):
        x = latents[torch.randint(0, 24, (16,), generator=generator)]
        t, eps = torch.randint(0, 1000, (16,), generator=generator), torch.randn(x.shape, generator=generator)
        alpha, sigma = schedule.alpha_sigma(t)
        output = unet(alpha * x + sigma * eps, t, told.expand(16, -1, -1), return_dict=False)[0]
        optimizer.zero_grad()
        (output - (alpha * eps - sigma * x)).square().mean().backward()
        optimizer.step()
    unet.eval().save_pretrained(folder / "unet")
    return folder
