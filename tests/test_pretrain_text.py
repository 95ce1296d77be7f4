"""`unidad pretrain` on from a text-to-image model: captions reach the network, and the folder it leaves is a source."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sd
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_cli import refused

from unidad import checkpoint
from unidad.backbones import load_text
from unidad.backbones.unet2d_cond import UNet2DCondBackbone
from unidad.config import PretrainSettings, build_settings
from unidad.pretrain import pretrain
from unidad.pretrain_text import UNTOLD, Captioned
from unidad.run import RunFolder

SCRIPT = Path(__file__).parents[1] / "scripts" / "avatars" / "text_model.py"
TOLD = {"red.png": ("a cat", (230, 40, 90)), "blue.png": ("a dog", (30, 60, 220)), "other.png": ("a dog", (40, 70, 200))}
QUICK = {
    "cycles": 2,
    "batch_size": 3,
    "tracker": "none",
    "device": "cpu",
    "sample_every": 0,
    "save_every": 0,
    "ema": 0.0,
    "warmup": 0,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "model", kind="v_prediction")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("told")
    for name, (_, colour) in TOLD.items():
        Image.new("RGB", (16, 16), colour).save(place / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, (text, _) in TOLD.items()]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


@pytest.fixture(autouse=True)
def no_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps for every picture of a sample grid."""
    monkeypatch.setattr(Captioned, "draw", lambda *_: torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def settings(folder: Path, **values: object) -> PretrainSettings:
    return build_settings(PretrainSettings, QUICK, {"init": str(folder)}, values)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(run.checkpoints)
    assert found is not None
    return found[1].tensors["network.model"]


def test_a_run_tells_the_network_each_caption_and_leaves_a_source(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told, condition = [], UNet2DCondBackbone._condition
    monkeypatch.setattr(UNet2DCondBackbone, "_condition", lambda net, rows: told.extend(rows.tolist()) or condition(net, rows))
    run = pretrain(pictures, tmp_path / "run", settings(folder, cycles=4))
    assert len(told) == 4 * 3
    assert {0, 1} <= set(told) <= {0, 1, 2}
    before, after = load_text.load_text_model(folder), load_text.load_text_model(run.path / "model")
    assert after.parts == before.parts, "VAE and text encoder are as they were"
    moved = [not torch.equal(value, after.backbone.state_dict()[key]) for key, value in before.backbone.state_dict().items()]
    assert sum(moved) > len(moved) / 2
    assert after.scheduler["prediction_type"] == "v_prediction"
    assert "on from 'model'" in (run.path / "model" / "README.md").read_text()
    pipe = StableDiffusionPipeline.from_pretrained(run.path / "model", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_a_tenth_of_the_captions_is_left_out_by_seed_and_place_alone(folder: Path, pictures: Path):
    model = load_text.load_text_model(folder)
    stream = Captioned(model, pictures, settings(folder), torch.device("cpu")).stream
    assert torch.allclose(model.backbone.prompts, load_text.encode_prompts(folder, ["a dog", "a cat", ""]), atol=1e-6)
    names = sorted(TOLD)  # blue, other, red
    rows = [["a dog", "a cat"].index(TOLD[name][0]) for name in names]
    batches = [stream.batch(30) for _ in range(40)]
    seen = [
        (rows[int((stream.pixels == latent).all((1, 2, 3)).nonzero()[0])], int(row))
        for latents, labels, _ in batches
        for latent, row in zip(latents, labels, strict=True)
    ]
    assert {label for row, label in seen if label != row} == {2}
    left_out = sum(label == 2 for _, label in seen) / len(seen)
    assert abs(left_out - UNTOLD) < 0.03
    stream.drawn = 60
    assert torch.equal(stream.batch(30)[1], batches[2][1])
    assert not torch.equal(batches[0][1], batches[1][1])


def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path, pictures: Path, tmp_path: Path):
    whole = weights(pretrain(pictures, tmp_path / "whole", settings(folder)))
    pretrain(pictures, tmp_path / "again", settings(folder), until=1)
    again = weights(pretrain(pictures, tmp_path / "again", settings(folder), resume=True))
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_what_is_refused(folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "untold").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "untold" / "a.png")
    base = ["pretrain", "--out", str(tmp_path / "run"), "--device", "cpu", "--set", f"init={folder}", "--set", "tracker=none"]
    assert "learns from captions" in refused(capsys, *base, "--data", str(tmp_path / "untold"))
    assert "'compile' is not there yet" in refused(
        capsys, *base, "--data", str(pictures), "--set", "compile=true", "--set", "precision=fp32"
    )
    assert not (tmp_path / "run").exists()
    run = pretrain(pictures, tmp_path / "told", settings(folder, cycles=1))
    other = tmp_path / "other"
    other.mkdir()
    for name in TOLD:
        (other / name).write_bytes((pictures / name).read_bytes())
        (other / name).with_suffix(".txt").write_text("the dog")
    more = ["--resume", *(word for key, value in QUICK.items() if key != "device" for word in ("--set", f"{key}={value}"))]
    again = ["pretrain", "--data", str(other), "--out", str(run.path), "--device", "cpu", "--set", f"init={folder}", *more]
    assert "pictures" in refused(capsys, *again, "--set", "cycles=1"), "other captions are another set of pictures"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["text_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_avatars_model_has_whole_words_and_an_exact_vae(script: ModuleType, tmp_path: Path):
    texts = ["a person on a pink background, with red hair, sunglasses", "a robot with a hat, a shirt, glasses, a hijab"]
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    script.write(tmp_path, tmp_path / "model")
    model = load_text.load_text_model(tmp_path / "model")
    words = load_text.load_tokenizer(model.folder).tokenize(texts[1])
    assert [word.removesuffix("</w>") for word in words] == texts[1].replace(",", " ,").split()
    assert (load_text.picture_side(model.folder), model.backbone.shape) == (32, (3, 32, 32))
    vae = load_text.load_vae(model.folder)
    for x in (torch.rand(2, 3, 32, 32) * 2 - 1, torch.ones(1, 3, 32, 32), torch.full((1, 3, 32, 32), -1.0)):
        latents = load_text.encode_pictures(vae, x)
        assert (latents - x).abs().max() < 1e-3
        assert (load_text.decode_latents(vae, latents) - x).abs().max() < 1e-3
