"""Measurements: what is counted is right; how long things take is nobody's business here."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unidad.architectures import ARCHITECTURES, TEXT_UNETS, random_model
from unidad.bench import COUNTED, Cycle, bench_sample, bench_train, compare
from unidad.cli import main

SMALL = {"batch_size": 2, "steps": 1, "fake_updates": 1, "gan_weight": 0.0, "disc_weight": 0.0}


def flops(folder, **values):
    cycle = Cycle.build("avatars", SMALL | values, folder)
    return cycle.flops(), cycle.forward_flops()


def test_a_teacher_without_weight_saves_exactly_one_forward_of_the_batch(tmp_path):
    both, forward = flops(tmp_path / "both", a=0.5)
    source_only, _ = flops(tmp_path / "source", a=0.0, target_teacher="off")
    assert both["student"] - source_only["student"] == 2 * forward
    assert both["fake_teacher"] == source_only["fake_teacher"]
    assert "target_teacher" not in source_only


def test_a_denoising_update_costs_three_forwards_but_for_the_gradient_of_the_picture(tmp_path):
    """Backward needs the gradient of weights and of inputs at every layer, except of the first layer's input."""
    counted, forward = flops(tmp_path, a=0.5)
    first_layer = 2 * 32 * 32 * 3 * 24 * 9
    times = 2  # pictures in the batch
    assert counted["target_teacher"] == counted["fake_teacher"]
    assert counted["target_teacher"] <= 3 * times * forward - times * first_layer
    assert counted["target_teacher"] > 2.9 * times * forward


def test_another_step_without_gradient_costs_one_forward_of_the_batch(tmp_path):
    one, forward = flops(tmp_path / "one", rollout_grad="last")
    three, _ = flops(tmp_path / "three", rollout_grad="last", steps=3)
    assert three["student"] - one["student"] == 2 * 2 * forward


def test_two_things_are_compared_in_alternation():
    order, clock = [], iter([9.0, 9.0, 2.0, 1.0, 6.0, 2.0, 1.0, 4.0])

    def run(name):
        order.append(name)
        return next(clock)

    result = compare(lambda: run("a"), lambda: run("b"), 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    # after the warm-up: b 2 a 1, a 6 b 2, b 1 a 4
    assert (result["ratio"], result["first"], result["second"]) == (3.0, 4.0, 2.0)
    assert (result["low"], result["high"]) == (1.75, 3.5)


def test_the_numbers_of_a_cycle_fit_each_other(tmp_path):
    result = bench_train("avatars", SMALL, 1, tmp_path)
    assert set(result["seconds"]) == {"cycle", "student", "fake_teacher", "target_teacher"}
    assert sum(result["flops"].values()) == 2 * result["flops"]["cycle"]
    share = result["flops"]["cycle"] / result["seconds"]["cycle"] / result["matmul_flops_per_second"]
    assert result["share"] == pytest.approx(share)
    assert result["images_per_second"] == pytest.approx(2 / result["seconds"]["cycle"])


def test_a_log_line_is_really_written_where_its_cost_is_measured(tmp_path):
    result = bench_train("avatars", SMALL, 2, tmp_path)
    assert [len(json.loads(line)["losses"]) > 3 for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [True] * 3
    assert 0 < result["log_share"] < 1


TINY_TEXT = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture
def tiny_text(monkeypatch):
    monkeypatch.setitem(TEXT_UNETS, "sd-1.5", TINY_TEXT)
    return "sd-1.5"


def test_guidance_costs_one_more_forward_for_each_teacher(tiny_text, tmp_path):
    counted = {scale: Cycle.build(tiny_text, SMALL | {"guidance": scale}, tmp_path / str(scale)) for scale in (1.0, 7.5)}
    plain, guided = (cycle.flops() for cycle in counted.values())
    assert guided["student"] - plain["student"] == 2 * 2 * counted[1.0].forward_flops()
    assert guided["fake_teacher"] == plain["fake_teacher"]


def test_counted_flops_are_those_of_attention_by_its_plain_formula(tiny_text):
    """The fused kernel is counted by a formula of ours; torch counts the matrix products of the plain one by itself."""
    backbone = random_model(tiny_text).backbone
    x, t = torch.randn(2, *backbone.shape), torch.tensor([7, 8])
    counts = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            backbone.x0(x, t, torch.zeros(2, dtype=torch.long)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_text_shape_draws_and_trains_with_adapters(tiny_text, tmp_path):
    assert bench_sample(tiny_text, 3, 1, 2)["arch"] == "sd-1.5"
    cycle = Cycle.build(tiny_text, SMALL | {"lora_rank": 2}, tmp_path)
    adapters = sum(p.numel() for p in cycle.trainer.method.networks["student"].parameters())
    assert 0 < adapters < sum(p.numel() for p in random_model(tiny_text).backbone.parameters()) / 2
    cycle.run()
    assert cycle.trainer.place.updates["student"] == 1


@pytest.mark.parametrize(("preset", "phase"), [("avatars-finetune", "model"), ("avatars-demo", "student")])
def test_presets_can_be_measured(preset, phase, capsys):
    small = ["--set", "batch_size=1", "--set", "precision=fp32"] + (["--set", "anchor_batch=1"] if phase == "student" else [])
    assert main(["bench", "train", "--preset", preset, "--cycles", "1", *small]) == 0
    assert f"  {phase} " in capsys.readouterr().out


def test_an_architecture_has_its_attention_where_it_says():
    unet, architecture = random_model("adm-32x64").backbone.unet, ARCHITECTURES["adm-32x64"]
    assert tuple(bool(getattr(block, "attentions", None)) for block in unet.down_blocks) == architecture.attends
    assert unet.conv_out.out_channels == 6
    assert unet.mid_block.attentions[0].group_norm is not None


def test_the_ffhq_shape_has_every_weight_of_guided_diffusion():
    """arXiv 2105.05233 gives 554 M for the same network with 1000 classes, whose embedding holds 1.02 M."""
    with torch.device("meta"):
        unet = UNet2DModel(**ARCHITECTURES["adm-256"].unet_config())
    assert sum(p.numel() for p in unet.parameters()) == 552_814_086


def test_on_the_command_line(tmp_path, capsys):
    assert main(["bench", "sample", "-n", "3", "--steps", "1", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert f"{found['images_per_second']:.1f} pictures/s" in capsys.readouterr().out
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    assert main(["bench", "train", "--cycles", "1", "--compare", "a=0,target_teacher=off", "a=0.5", *small]) == 0
    assert "quartiles of 1 pairs" in capsys.readouterr().out
    assert main(["bench", "train", "--arch", "adm-255"]) == 2
    assert "Did you mean 'adm-256'" in capsys.readouterr().err
    assert main(["bench", "train", "--cycles", "0"]) == 2
