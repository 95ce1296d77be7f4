"""`source_teacher_dtype=bf16`: the frozen source teacher in half the memory, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import sd
import tiny
import torch
from test_plan import real_method, settings, sources  # noqa: F401  # the fixture
from test_sdxl import write_sdxl

from unidad import checkpoint
from unidad import plan as planning
from unidad.backbones.base import guided
from unidad.backbones.load_text import load_text_model
from unidad.backbones.lora import LoraRole
from unidad.cli import main
from unidad.config import TrainSettings, build_settings
from unidad.errors import SettingsError
from unidad.methods.handover import same_weights

FAST = ("--set", "precision=fp32", "--set", "lr=1e-3", "--set", "warmup=0")  # so that three updates move every weight
HALF = (*FAST, "--set", "source_teacher_dtype=bf16")


def off_by(half: torch.Tensor, whole: torch.Tensor) -> float:
    assert half.dtype == whole.dtype == torch.float32
    return float((half - whole).norm() / whole.norm())


@pytest.mark.parametrize("kind", ["tiny", "adm"])
def test_only_the_source_teacher_is_held_in_half(kind, sources):  # noqa: F811
    plain = real_method(settings(sources, kind))
    method = real_method(settings(sources, kind, source_teacher_dtype="bf16"))
    teacher = method.networks["source_teacher"]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters())
    others = method.networks.keys() - {"source_teacher"}
    assert others == {"student", "fake_teacher", "target_teacher", "heads"}
    for name in others:
        assert {p.dtype for p in method.networks[name].parameters()} == {torch.float32}
        assert same_weights(method.networks[name], plain.networks[name]), name
    assert not same_weights(teacher, plain.networks["source_teacher"])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "adm"])
def test_predictions_are_float32_and_near(kind, autocast, sources):  # noqa: F811
    """Within 3 % of the prediction's length at little, middling and much noise; bf16 itself rounds by up to 0.4 %.

    Autocast rounds most weights anyway, so that there the two may agree to the bit.
    """
    plain = real_method(settings(sources, kind)).networks["source_teacher"]
    half = real_method(settings(sources, kind, source_teacher_dtype="bf16")).networks["source_teacher"]
    x_t, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([50, 400, 700])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        off = off_by(half.x0(x_t, t), plain.x0(x_t, t))
    assert off < 0.03
    assert autocast or off > 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_text_to_image_teacher_under_guidance(kind, tmp_path):
    folder = sd.write_pipeline(tmp_path / "model") if kind == "sd" else write_sdxl(tmp_path / "model")
    plain, half = (load_text_model(str(folder)).backbone.requires_grad_(False) for _ in range(2))
    half.hold_in_bf16()
    prompts = torch.randn(3, *plain.prompts.shape[1:], generator=torch.Generator().manual_seed(1))
    for one in (plain, half):
        one.set_prompts(prompts)
    assert half.prompts.dtype == torch.float32
    x_t, t = torch.randn(2, *plain.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([50, 400])
    labels = torch.tensor([1, 0])
    with torch.no_grad():
        assert 0 < off_by(guided(half, 3.0).x0(x_t, t, labels), guided(plain, 3.0).x0(x_t, t, labels)) < 0.03


def test_the_plan_counts_half_for_that_row_alone(sources):  # noqa: F811
    plain = planning.plan(settings(sources, "adm"))
    half = planning.plan(settings(sources, "adm", source_teacher_dtype="bf16"))
    row = plain.weights["source_teacher"]
    assert half.weights == plain.weights | {"source_teacher": row // 2}
    assert (half.gradients, half.optimizer, half.average) == (plain.gradients, plain.optimizer, plain.average)
    assert half.total < plain.total
    with pytest.raises(SettingsError, match="source_teacher_dtype=bf16"):
        planning.refuse_too_large(plain, settings(sources, "adm"), 1)


def test_what_is_trained_or_shared_is_never_held_in_half():
    network = tiny.backbone(1)
    with pytest.raises(ValueError, match="float32"):
        network.requires_grad_(True).hold_in_bf16()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    pytest.importorskip("peft")
    base = sd.backbone()
    with pytest.raises(ValueError, match="shares"):
        LoraRole(base, "source_teacher", 0, base.prompts).hold_in_bf16()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_rank": 4}, "the source teacher is the base"),
        ({"a": 1}, "'a' is 1: this run has no source teacher"),
        ({"dmd_weight": 0}, "'dmd_weight' is 0: this run has no source teacher"),
        ({"method": "finetune"}, "'method' is finetune: this run has no source teacher"),
        ({"method": "adapt-then-distill", "target_warmup": 1}, "'method' is adapt-then-distill"),
    ],
)
def test_refused_where_there_is_none_of_its_own(values, words):
    with pytest.raises(SettingsError, match=words):
        build_settings(TrainSettings, {"source_teacher_dtype": "bf16"}, values)
    build_settings(TrainSettings, {"source_teacher_dtype": "fp32"}, values)


@pytest.mark.usefixtures("no_report")
def test_a_run_resumes_to_the_same_bits(source: Path, picture_folder: Path, tmp_path: Path, capsys):
    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    assert main(tiny.words(source, picture_folder, whole, *HALF, cycles=3)) == 0
    for more in ((), ("--resume",), ("--resume",)):
        assert main(tiny.words(source, picture_folder, parts, *HALF, "--set", "max_minutes=0.000001", *more, cycles=3)) == 0
    assert main(tiny.words(source, picture_folder, plain, *FAST, cycles=3)) == 0
    one, two, other = (checkpoint.latest(run / "checkpoints")[1].tensors for run in (whole, parts, plain))
    assert "network.source_teacher" not in one
    same = {group: all(torch.equal(t, two[group][k]) for k, t in tensors.items()) for group, tensors in one.items()}
    assert same == dict.fromkeys(one, True)
    assert any(not torch.equal(t, other["network.student"][k]) for k, t in one["network.student"].items())
    capsys.readouterr()
    assert main(tiny.words(source, picture_folder, parts, *FAST, "--resume", cycles=3)) == 2
    assert "source_teacher_dtype" in capsys.readouterr().err
