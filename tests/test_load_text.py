from __future__ import annotations

import json
from pathlib import Path

import pytest
import sd
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from unidad.backbones import load_text
from unidad.backbones.load import load_model
from unidad.errors import ModelError, SettingsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "model")


def edited(folder: Path, to: Path, file: str, **changes: object) -> Path:
    """A copy by links, with one JSON file changed."""
    for path in folder.rglob("*"):
        copy = to / path.relative_to(folder)
        if path.is_dir():
            copy.mkdir(parents=True)
        elif copy != to / file:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    (to / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    return to


def test_prompts_are_encoded_as_the_pipeline_does(folder: Path):
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    prompts = ["a prt cat", "", "a dog on the cat"]
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    assert torch.allclose(load_text.encode_prompts(folder, prompts), theirs, atol=1e-6)


def test_latents_and_pictures(folder: Path):
    model = load_text.load_text_model(folder)
    vae = load_text.load_vae(folder)
    assert load_text.picture_side(model.folder) == 16
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = load_text.encode_pictures(vae, pictures)
    assert latents.shape == (3, *model.backbone.shape)
    with torch.no_grad():
        assert torch.allclose(latents, vae.encode(pictures).latent_dist.mode() * 0.18215, atol=1e-6)
        assert torch.allclose(load_text.decode_latents(vae, latents), vae.decode(latents / 0.18215).sample, atol=1e-5)


def test_a_text_to_image_model_is_told_from_a_pixel_model(folder: Path, source: Path):
    assert load_text.is_text_to_image(folder)
    assert not load_text.is_text_to_image(source)
    with pytest.raises(ModelError, match="UNet2DConditionModel"):
        load_model(folder)


def test_the_real_model_s_safety_checker_is_no_custom_code(folder: Path, tmp_path: Path):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    copy = edited(folder, tmp_path / "m", "model_index.json", safety_checker=checker)
    assert load_text.load_text_model(copy).digest == load_text.load_text_model(folder).digest


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ("model_index.json", {"unet": ["my_code", "Mine"]}, "own code"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"cross_attention_dim": 24}, "do not fit"),
        ("vae/config.json", {"latent_channels": 8}, "do not fit"),
        ("scheduler/scheduler_config.json", {"prediction_type": "magic"}, "magic"),
    ],
)
def test_other_families_are_refused_by_name(folder: Path, tmp_path: Path, file: str, changes: dict, words: str):
    with pytest.raises(ModelError, match=words):
        load_text.load_text_model(edited(folder, tmp_path / "m", file, **changes))


def test_a_prompt_that_is_too_long_is_refused(folder: Path):
    load_text.encode_prompts(folder, ["cat " * 75])
    with pytest.raises(SettingsError, match="has 78 tokens"):
        load_text.encode_prompts(folder, ["a cat", "cat " * 76])


def test_a_rare_token_in_pieces_is_shown(folder: Path):
    assert load_text.split_tokens(folder, "a prt cat", "a cat") == {}
    assert load_text.split_tokens(folder, "a sks cat", "a cat") == {"sks": ["s", "k", "s"]}
    assert load_text.split_tokens(folder, "a cat, prt, on the dog.", "a cat on the dog") == {}, "a comma is no piece of a word"


def test_weights_under_the_names_of_published_files(folder: Path, tmp_path: Path):
    """SD 1.5's files are older than today's classes: a `text_model.` prefix, stored position ids, the VAE's attention by other names."""
    copy = edited(folder, tmp_path / "m", "model_index.json")
    for file in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        (copy / file).unlink()
    text = {
        f"text_model.{key.removeprefix('text_model.')}": v
        for key, v in load_file(folder / "text_encoder/model.safetensors").items()
    }
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, copy / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for key, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        for ours, theirs in older.items():
            key = key.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        vae[key] = value
    assert any("proj_attn" in key for key in vae)
    save_file(vae, copy / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_text.encode_prompts(copy, ["a cat"]), load_text.encode_prompts(folder, ["a cat"]))
    for key, value in load_text.load_vae(folder).state_dict().items():
        assert torch.equal(load_text.load_vae(copy).state_dict()[key], value)
    assert load_text.load_text_model(copy).digest == load_text.load_text_model(folder).digest
