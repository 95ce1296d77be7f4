"""SDXL's LoRA files under diffusers' and kohya's names, text encoders' parts too; diffusers' own loader is the judge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kohya import same
from test_sdxl import stock, write_sdxl

pytest.importorskip("peft")

from unidad.architectures import TEXT_UNETS, text_unet
from unidad.backbones.load_text import load_text_model
from unidad.backbones.lora import TARGETS, LoraRole
from unidad.cli import main
from unidad.convert.kohya import to_diffusers, to_kohya
from unidad.export_text import LORA_WEIGHTS, save_lora

RANK = 4
LAYERS = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def lora(pipeline: Path) -> Path:
    """A run's LoRA as the run writes it, neither of its factors zero."""
    base = load_text_model(pipeline)
    role = LoraRole(base.backbone, "student", RANK, base.backbone.prompts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    out = pipeline.with_name("lora")
    save_lora(role, base.scheduler, [999], pipeline, out, {"prompt": "a prt cat"})
    return out / LORA_WEIGHTS


@pytest.fixture(scope="module")
def kohya(lora: Path) -> Path:
    out = lora.with_name("kohya.safetensors")
    assert main(["convert", "lora", str(lora), "--out", str(out), "--format", "kohya"]) == 0
    return out


def adapters(pipeline: Path, file: Path) -> dict[str, torch.Tensor]:
    """Every adapter weight that stock diffusers makes of a file, by network."""
    pipe = stock(pipeline)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        network = getattr(pipe, part)
        found |= {f"{part}.{key}": value for key, value in network.state_dict().items() if "lora_" in key}
        assert {module.scaling["default_0"] for module in network.modules() if hasattr(module, "scaling")} <= {1.0}
    return found


def test_names_are_those_of_the_original_unet(kohya: Path):
    shapes = {key: tuple(value.shape) for key, value in load_file(kohya).items()}
    for name, shape in {
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": (RANK, 8, 3, 3),
        "lora_unet_input_blocks_2_0_op.lora_down.weight": (RANK, 8, 3, 3),
        "lora_unet_input_blocks_3_0_skip_connection.lora_up.weight": (16, RANK, 1, 1),
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k.lora_down.weight": (RANK, 40),
        "lora_unet_middle_block_0_emb_layers_1.lora_down.weight": (RANK, 32),
        "lora_unet_middle_block_1_proj_in.alpha": (),
        "lora_unet_middle_block_2_out_layers_3.lora_up.weight": (16, RANK, 1, 1),
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight": (16, RANK),
        "lora_unet_output_blocks_1_2_conv.lora_down.weight": (RANK, 16, 3, 3),
    }.items():
        assert shapes.get(name) == shape, name
    assert not any("down_blocks" in name or "up_blocks" in name for name in shapes)


def test_round_trip_and_stock_diffusers(pipeline: Path, lora: Path, kohya: Path, tmp_path: Path):
    assert main(["convert", "lora", str(kohya), "--out", str(tmp_path / "back.safetensors"), "--format", "diffusers"]) == 0
    assert same(load_file(tmp_path / "back.safetensors"), load_file(lora))
    ours, theirs = adapters(pipeline, lora), adapters(pipeline, kohya)
    assert len(ours) == len(load_file(lora))
    assert same(ours, theirs)


def test_every_layer_of_the_true_sdxl_has_a_name_and_comes_back():
    unet = text_unet(TEXT_UNETS["sdxl"]).unet
    layers = [name for name, _ in unet.named_modules() if any(name == t or name.endswith(f".{t}") for t in TARGETS)]
    factors = {f"unet.{name}.lora_{x}.weight": torch.zeros(2, 2) for name in layers for x in "AB"}
    named = to_kohya(factors)
    assert len(named) == 3 * len(layers) == 3 * 788
    weights = {name.replace(".", "_") for name in original_names(unet)}
    assert {name.split(".")[0].removeprefix("lora_unet_") for name in named} <= weights
    assert to_diffusers(named).keys() == factors.keys()
    attention = {key: value for key, value in factors.items() if "attn" in key}  # what most published files hold
    assert to_diffusers(to_kohya(attention)).keys() == attention.keys()


def original_names(unet: torch.nn.Module) -> set[str]:
    from unidad.convert.ldm import block_structure, unet_name

    names = [name for name in unet.state_dict() if name.endswith(".weight")]
    return {unet_name(name, *block_structure(names)).removesuffix(".weight") for name in names}


def test_text_encoders_parts_go_along(pipeline: Path, kohya: Path, tmp_path: Path):
    weights, generator = load_file(kohya), torch.Generator().manual_seed(1)
    for prefix, width in (("lora_te1", 16), ("lora_te2", 24)):
        for layer in (f"{prefix}_text_model_encoder_layers_{i}_{name}" for i in range(2) for name in LAYERS):
            into, out = (width, 16) if "fc1" in layer else (16, width) if "fc2" in layer else (width, width)
            weights[f"{layer}.lora_down.weight"] = torch.randn(2, into, generator=generator)
            weights[f"{layer}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
            weights[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(weights, tmp_path / "all.safetensors")
    save_file(to_diffusers(weights), tmp_path / "named.safetensors")
    assert same(to_kohya(load_file(tmp_path / "named.safetensors")), weights)
    ours, theirs = adapters(pipeline, tmp_path / "named.safetensors"), adapters(pipeline, tmp_path / "all.safetensors")
    assert same(ours, theirs)
    assert [sum(key.startswith(part) for key in ours) for part in ("text_encoder.", "text_encoder_2.")] == [24, 24]
