"""SDXL in one file of the original layout, on tiny random networks; diffusers' own reader is the judge of what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sd
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from test_load_text import edited
from test_sdxl import write_sdxl
from test_single_file import bare
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unidad.architectures import TEXT_UNETS, text_unet
from unidad.backbones.load_text import load_text_model
from unidad.backbones.single_file import STABLE_DIFFUSION_XL, family
from unidad.cli import main
from unidad.convert.ldm import to_ldm_xl
from unidad.convert.single_file import from_single_file, to_single_file
from unidad.errors import ModelError

UNET, FIRST, SECOND = "model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
WEIGHTS = (
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    *("text_encoder/model.safetensors", "text_encoder_2/model.safetensors"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("xl") / "model", force_zeros=False)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    out = folder.with_suffix(".safetensors")
    assert main(["convert", "to-single-file", str(folder), "--out", str(out)]) == 0
    return out


def test_a_folder_comes_back_to_the_bit(folder: Path, file: Path, tmp_path: Path, capsys):
    config, out = bare(folder, tmp_path / "config"), tmp_path / "again"
    assert main(["convert", "single-file", str(file), "--config", str(config), "--out", str(out)]) == 0
    assert "prediction type (epsilon)" in capsys.readouterr().out
    for weights in WEIGHTS:
        before, after = load_file(folder / weights), load_file(out / weights)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    index = json.loads((out / "model_index.json").read_text())
    assert (index["_class_name"], index["force_zeros_for_empty_prompt"]) == ("StableDiffusionXLPipeline", False)
    assert load_text_model(out).student_steps is None, "a converted checkpoint is a source, and the loader takes it"


def test_diffusers_alone_reads_the_file(folder: Path, file: Path):
    theirs = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    ours = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        read = getattr(theirs, part).state_dict()
        assert all(torch.equal(value, read[key]) for key, value in getattr(ours, part).state_dict().items())
    drawn = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        drawn.append(pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images)
    assert abs(drawn[0] - drawn[1]).max() < 1e-5, "the same weights, but at other places in memory, which moves the last bits"
    assert drawn[0].std() > 0.01


def test_names_and_shapes_of_the_true_sdxl():
    """Counts and places of the base model; its published file has position ids and the logit scale besides, which folders lack."""
    unet = text_unet(TEXT_UNETS["sdxl"]).unet
    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12))
        big = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**big, projection_dim=1280))
    parts = (part.state_dict() for part in (unet, vae, text, text_2))
    found = {key: tuple(value.shape) for key, value in to_ldm_xl(*parts).items()}
    counts = [sum(key.startswith(part) for key in found) for part in (UNET, "first_stage_model.", FIRST, SECOND)]
    assert counts == [1680, 248, 196, 389]
    assert family(found) == STABLE_DIFFUSION_XL
    for name, shape in {
        f"{UNET}label_emb.0.0.weight": (1280, 2816),
        f"{UNET}label_emb.0.2.bias": (1280,),
        f"{UNET}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{UNET}input_blocks.4.1.proj_in.weight": (640, 640),
        f"{UNET}input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        f"{UNET}middle_block.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        f"{UNET}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        f"{UNET}output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        f"{FIRST}text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        f"{SECOND}transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        f"{SECOND}transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        f"{SECOND}text_projection": (1280, 1280),
        f"{SECOND}positional_embedding": (77, 1280),
        f"{SECOND}ln_final.weight": (1280,),
    }.items():
        assert found.get(name) == shape, name


def test_the_projection_stands_the_other_way_round(folder: Path, file: Path):
    theirs = load_file(file)[f"{SECOND}text_projection"]
    assert torch.equal(theirs.T, load_file(folder / WEIGHTS[3])["text_projection.weight"])
    assert theirs.shape == (24, 16), "width of the encoder first"


def test_each_family_wants_its_own_config(folder: Path, file: Path, tmp_path: Path, capsys):
    other = sd.write_pipeline(tmp_path / "sd")
    to_single_file(other, tmp_path / "sd.safetensors")
    for one, config in ((file, other), (tmp_path / "sd.safetensors", folder)):
        assert main(["convert", "single-file", str(one), "--config", str(config), "--out", str(tmp_path / "out")]) == 2
        assert "Give one of the same family" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditioner.embedders.0.model.ln_final.weight": (24,)}, "an SDXL refiner"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}, "an inpainting checkpoint of SDXL"),
        ({SECOND: None}, "a UNet of SDXL without its second text encoder"),
        ({FIRST: None}, "a UNet of SDXL without its first text encoder"),
        ({"first_stage_model.": None}, "a UNet of SDXL without its VAE"),
    ],
)
def test_relatives_are_named(file: Path, folder: Path, tmp_path: Path, change: dict, words: str):
    weights = load_file(file)
    for name, shape in change.items():
        weights = {key: value for key, value in weights.items() if not key.startswith(name)}
        weights |= {name: torch.zeros(shape)} if shape else {}
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=words):
        from_single_file(tmp_path / "odd.safetensors", folder, tmp_path / "out")


def test_a_file_marked_as_v_prediction_needs_a_config_that_says_so(folder: Path, file: Path, tmp_path: Path):
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    with pytest.raises(ModelError, match="marked as a v-prediction model"):
        from_single_file(tmp_path / "v.safetensors", folder, tmp_path / "out")
    config = edited(folder, tmp_path / "config", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert from_single_file(tmp_path / "v.safetensors", config, tmp_path / "out")["prediction_type"] == "v_prediction"
