from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from unidad.backbones.load import load_model
from unidad.data import to_uint8
from unidad.errors import ModelError
from unidad.export import made, save_source, save_student
from unidad.rollout import rollout, seeded_noise
from unidad.sample import draw

V = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
}

# Runs where `import unidad` fails, as on the machine of someone who was only given the folder.
STRANGER = """
import sys
sys.modules["unidad"] = None
import torch
from diffusers import {pipeline}
pipe = {pipeline}.from_pretrained(sys.argv[1], use_safetensors=True)
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(i) for i in range(4)]
x = pipe(batch_size=4, generator=generators, output_type="np", {call}).images
torch.save(torch.from_numpy(x).permute(0, 3, 1, 2), sys.argv[2])
"""


def as_stranger(folder: Path, out: Path, pipeline: str, call: str) -> torch.Tensor:
    subprocess.run(
        [sys.executable, "-c", STRANGER.format(pipeline=pipeline, call=call), str(folder), str(out)], check=True, timeout=300
    )
    return torch.load(out, weights_only=True)


def ours(net, steps: list[int]) -> torch.Tensor:
    with torch.no_grad():
        x = rollout(net, seeded_noise(range(4), net.shape), steps)
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("k", [1, 3])
def test_stock_pipeline_draws_what_we_draw(tmp_path: Path, k: int) -> None:
    net = tiny.backbone(1)
    steps = net.schedule.student_steps(k)
    save_student(net, V, steps, tmp_path / "student", {"source": "tiny", "target": "ten"})
    theirs = as_stranger(tmp_path / "student", tmp_path / "x.pt", "DDPMPipeline", f"num_inference_steps={k}")
    assert (theirs - ours(net, steps)).abs().max() < 1e-5
    assert (draw(net, 4, steps=steps) == to_uint8(theirs * 2 - 1)).all()


def test_edm_grid_needs_its_timesteps_and_says_so(tmp_path: Path) -> None:
    net = tiny.backbone(1, "epsilon")
    steps = net.schedule.student_steps(3, "edm")
    save_student(net, V | {"beta_schedule": "linear", "prediction_type": "epsilon"}, steps, tmp_path / "student", {})
    call = f"num_inference_steps=None, timesteps={steps}"
    theirs = as_stranger(tmp_path / "student", tmp_path / "x.pt", "ConsistencyModelPipeline", call)
    # An untrained network says nonsense at s = 80, so the numbers are large before they are clamped.
    assert (theirs - ours(net, steps)).abs().max() < 1e-4
    card = (tmp_path / "student" / "README.md").read_text()
    assert str(steps) in card
    assert "ONE step" in card


def test_class_conditional_student(tmp_path: Path) -> None:
    net = tiny.backbone(1, num_class_embeds=3)
    steps = net.schedule.student_steps(2)
    save_student(net, V, steps, tmp_path / "student", {})
    call = f"num_inference_steps=None, timesteps={steps}, class_labels=torch.tensor([2, 2, 2, 2])"
    theirs = as_stranger(tmp_path / "student", tmp_path / "x.pt", "ConsistencyModelPipeline", call)
    with torch.no_grad():
        mine = rollout(net, seeded_noise(range(4), net.shape), steps, torch.tensor([2, 2, 2, 2]))
    assert (theirs - (mine / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5


def test_learned_sigma_is_cut_off_the_student(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    from unidad.backbones.unet2d import UNet2DBackbone

    torch.manual_seed(0)
    unet = UNet2DModel(16, 3, 6, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    wide = UNet2DBackbone(unet, tiny.cosine(), "v_prediction").eval()
    steps = wide.schedule.student_steps(3)
    save_student(wide, V, steps, tmp_path / "student", {})
    again = load_model(tmp_path / "student")
    assert again.backbone.unet.config.out_channels == 3
    assert again.student_steps == steps
    assert torch.equal(ours(wide, steps), ours(again.backbone, steps))
    assert unet.config.out_channels == 6, "the run's own network must stay as it was"


def test_source_round_trip_is_exact_and_half_is_near(tmp_path: Path) -> None:
    net = tiny.backbone(1)
    save_source(net, V, tmp_path / "full", {})
    save_source(net, V, tmp_path / "half", {}, half=True)
    full, half = load_model(tmp_path / "full"), load_model(tmp_path / "half")
    assert full.scheduler == V
    for key, value in net.state_dict().items():
        assert torch.equal(value, full.backbone.state_dict()[key])
        assert torch.equal(value.half().float(), half.backbone.state_dict()[key])


def test_nothing_of_this_machine_is_given_away(tmp_path: Path) -> None:
    net = tiny.backbone(1)
    save_source(net, V, tmp_path / "source", {})
    save_student(load_model(tmp_path / "source").backbone, V, [999], tmp_path / "student", {})
    for file in (tmp_path / "student").rglob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMPipeline

    net = tiny.backbone(1)
    save_student(net, V, [999], tmp_path / "student", {"about": "the old one"})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", full)
    with pytest.raises(Exception, match="No space left"):
        save_student(net, V, [999], tmp_path / "student", {"about": "the new one"})
    assert "the old one" in (tmp_path / "student" / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model_index.json").unlink(), "not a diffusion pipeline"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "is needed"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be read"),
        (lambda f: _edit(f / "unet" / "config.json", _class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
        (lambda f: _edit(f / "unet" / "config.json", block_out_channels=[8, 32]), "do not fit"),
        (lambda f: _edit(f / "model_index.json", _class_name=["my_pipeline", "Mine"]), "own code"),
        (lambda f: _edit(f / "model_index.json", unet=["my_unet", "Mine"]), "own code"),
        (lambda f: _edit(f / "scheduler" / "scheduler_config.json", prediction_type="magic"), "magic"),
    ],
)
def test_bad_model_folders_are_refused_by_name(tmp_path: Path, spoil, words: str) -> None:
    save_source(tiny.backbone(1), V, tmp_path / "model", {})
    spoil(tmp_path / "model")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "model")


def test_weights_with_absurd_headers_are_refused(tmp_path: Path) -> None:
    save_source(tiny.backbone(1), V, tmp_path / "model", {})
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-10], (2**60).to_bytes(8, "little") + good[8:], b"PK" + good[2:], b""):
        weights.write_bytes(bad)
        with pytest.raises(ModelError, match="damaged"):
            load_model(tmp_path / "model")


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_with_channels_innermost_are_saved_as_usual(tmp_path: Path) -> None:
    net = tiny.backbone(1)
    before = {k: v.clone() for k, v in net.unet.state_dict().items()}
    save_source(net.to(memory_format=torch.channels_last), V, tmp_path / "source", {})
    after = load_model(str(tmp_path / "source")).backbone.unet.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_teacher": "online", "heads": "multi"}, "in one stage by Uni-DAD (arXiv 2511.18281)."),
        ({"target_teacher": "off", "heads": "multi"}, "in one stage by Uni-DAD (arXiv 2511.18281), without a target teacher."),
        ({"target_teacher": "off", "heads": "single"}, "with the source teacher alone (DMD2, arXiv 2405.14867)."),
        ({"target_teacher": "online", "heads": "multi", "dmd_weight": 0.0}, "by the GAN of Uni-DAD (arXiv 2511.18281) alone."),
        ({"method": "finetune", "target_teacher": "online", "heads": "multi"}, "Fine-tuned from the source model."),
    ],
)
def test_the_card_says_what_made_it(settings: dict, words: str) -> None:
    assert made(settings).endswith(words)
