"""LoRA files under diffusers' and kohya's names; diffusers' own loader is the judge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from diffusers import StableDiffusionPipeline

from unidad.backbones.lora import LoraRole
from unidad.cli import main
from unidad.convert.kohya import convert_lora, to_diffusers, to_kohya
from unidad.errors import CheckpointError, ModelError, SettingsError
from unidad.export_text import LORA_WEIGHTS, save_lora

RANK = 4


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("kohya") / "model")


@pytest.fixture(scope="module")
def lora(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's LoRA as the run writes it, neither of its factors zero."""
    base = sd.backbone()
    role = LoraRole(base, "student", RANK, base.prompts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    out = tmp_path_factory.mktemp("run") / "lora"
    save_lora(role, dict(sd.scheduler().config), [999], pipeline, out, {"prompt": "a prt cat"})
    return out / LORA_WEIGHTS


@pytest.fixture(scope="module")
def kohya(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("names") / "kohya.safetensors"
    facts = convert_lora(lora, out, "kohya")
    assert facts == {"layers": len(load_file(lora)) // 2, "rank": RANK, "folded": 0}
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def picture(pipeline: Path, *loras: Path) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    for file in loras:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    drawn = pipe(
        "a prt cat", num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return torch.from_numpy(drawn.images)


def test_names_as_kohya_writes_them(kohya: Path):
    shapes = {key: tuple(value.shape) for key, value in load_file(kohya).items()}
    for name, shape in {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": (RANK, 8),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight": (8, RANK),
        "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_ff_net_0_proj.lora_up.weight": (64, RANK),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (RANK, 16, 1, 1),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": (RANK, 8, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": (8, RANK, 1, 1),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_down.weight": (RANK, 8, 1, 1),
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj.lora_down.weight": (RANK, 32),
        "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight": (RANK, 8, 3, 3),
        "lora_unet_up_blocks_0_upsamplers_0_conv.alpha": (),
    }.items():
        assert shapes.get(name) == shape, name
    assert all(value == RANK for key, value in load_file(kohya).items() if key.endswith(".alpha"))
    with safe_open(kohya, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_round_trips_to_the_bit(lora: Path, kohya: Path, tmp_path: Path):
    assert main(["convert", "lora", str(kohya), "--out", str(tmp_path / "back.safetensors"), "--format", "diffusers"]) == 0
    assert same(load_file(tmp_path / "back.safetensors"), load_file(lora))
    assert (
        main(["convert", "lora", str(tmp_path / "back.safetensors"), "--out", str(tmp_path / "k.safetensors"), "--format", "kohya"])
        == 0
    )
    assert (tmp_path / "k.safetensors").read_bytes() == kohya.read_bytes()
    half = {key: value.half() for key, value in load_file(lora).items()}
    assert same(to_diffusers(to_kohya(half)), half)


def test_stock_diffusers_draws_the_same_from_both_files(pipeline: Path, lora: Path, kohya: Path):
    plain, ours, theirs = picture(pipeline), picture(pipeline, lora), picture(pipeline, kohya)
    assert (ours - theirs).abs().max() < 1e-5, "the same weights (below), at other places in memory, which moves the last bits"
    assert (ours - plain).abs().max() > 1e-2


def test_every_layer_reaches_the_network_under_kohya_s_name(pipeline: Path, lora: Path, kohya: Path):
    """diffusers drops what it cannot place with a warning at most; so the adapters themselves are compared."""
    adapters = []
    for file in (lora, kohya):
        pipe = StableDiffusionPipeline.from_pretrained(pipeline, use_safetensors=True)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        adapters.append({key: value for key, value in pipe.unet.state_dict().items() if "lora_" in key})
        assert {module.scaling["default_0"] for module in pipe.unet.modules() if hasattr(module, "scaling")} == {1.0}
    assert len(adapters[0]) == len(load_file(lora))
    assert same(*adapters)


def test_an_alpha_other_than_the_rank_is_folded_and_draws_the_same(pipeline: Path, kohya: Path, tmp_path: Path):
    halved = {key: value / 2 if key.endswith(".alpha") else value for key, value in load_file(kohya).items()}
    save_file(halved, tmp_path / "halved.safetensors")
    facts = convert_lora(tmp_path / "halved.safetensors", tmp_path / "folded.safetensors", "diffusers")
    assert facts["folded"] == facts["layers"] > 0
    expected = picture(pipeline, tmp_path / "halved.safetensors")
    assert (picture(pipeline, tmp_path / "folded.safetensors") - expected).abs().max() < 1e-5
    assert (picture(pipeline, kohya) - expected).abs().max() > 1e-3
    without = {key: value for key, value in load_file(kohya).items() if not key.endswith(".alpha")}
    assert same(to_diffusers(without), to_diffusers(load_file(kohya))), "no alpha means the rank"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc7.lora_down.weight", "is no layer of SD 1.x, 2.x or XL"),
        ("lora_unet_input_blocks_4_1_what.lora_down.weight", "is no layer of SD 1.x, 2.x or XL"),
        ("lora_prior_unet_x.lora_down.weight", "not known here"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "not known here"),
        ("lora_unet_mid_block_attentions_7_proj_in.lora_down.weight", "has no lora_up"),
    ],
)
def test_what_cannot_be_placed_is_named(name: str, words: str, kohya: Path, tmp_path: Path):
    weights = load_file(kohya) | {name: torch.zeros(4, 4)}
    if "is no layer" in words:
        weights[name.replace("lora_down", "lora_up")] = torch.zeros(4, 4)
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=words) as caught:
        convert_lora(tmp_path / "odd.safetensors", tmp_path / "out.safetensors", "diffusers")
    assert re.escape(name.split(".")[0]) in re.escape(str(caught.value))
    assert not (tmp_path / "out.safetensors").exists()


def test_bad_input_is_a_sentence_and_nothing_is_overwritten(lora: Path, kohya: Path, tmp_path: Path, capsys):
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    with pytest.raises(CheckpointError, match="nothing was overwritten"):
        convert_lora(lora, taken, "kohya")
    assert taken.read_text() == "mine"
    with pytest.raises(SettingsError, match="has kohya's names already"):
        convert_lora(kohya, tmp_path / "a.safetensors", "kohya")
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, tmp_path / "vae.safetensors")
    assert (
        main(["convert", "lora", str(tmp_path / "vae.safetensors"), "--out", str(tmp_path / "b.safetensors"), "--format", "kohya"])
        == 2
    )
    assert "looks like a VAE alone" in capsys.readouterr().err
    with pytest.raises(ModelError, match="not a run with LoRA roles"):
        convert_lora(tmp_path, tmp_path / "b.safetensors", "kohya")
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_dora": True})}
    save_file(load_file(lora), tmp_path / "other.safetensors", metadata=told)
    with pytest.raises(ModelError, match="use_dora, lora_alpha 8 at rank 4"):
        convert_lora(tmp_path / "other.safetensors", tmp_path / "b.safetensors", "kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "taken.safetensors", "vae.safetensors"]


def test_a_run_s_folder_is_enough(lora: Path, kohya: Path, tmp_path: Path):
    convert_lora(lora.parent.parent, tmp_path / "k.safetensors", "kohya")
    assert (tmp_path / "k.safetensors").read_bytes() == kohya.read_bytes()
