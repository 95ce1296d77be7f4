"""LoRA roles on one shared base."""

from __future__ import annotations

from pathlib import Path

import pytest
import sd
import torch
from test_sdp import CPU, floats, settings, tensors

from unidad.adapt import build_method, train
from unidad.backbones import load_text
from unidad.commands import load_product
from unidad.config import TrainSettings
from unidad.errors import SettingsError
from unidad.ingredients_text import gather_text
from unidad.run import RunFolder

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def lora_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "v", kind="v_prediction")


@pytest.fixture(scope="module")
def lora_run(no_report: None, lora_source: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(picture_folder, tmp_path_factory.mktemp("runs") / "lora", settings(lora_source, lora_rank=2, lr=1e-2))


def test_lora_roles_share_one_base_and_learn_apart(lora_source: Path, picture_folder: Path):
    s = settings(lora_source, lora_rank=2)
    parts = gather_text(s, picture_folder)
    nets = build_method(s, parts, CPU, torch.Generator()).networks
    roles = [nets[name] for name in ("student", "fake_teacher", "target_teacher", "source_teacher")]
    assert len({id(role.unet) for role in roles}) == 1
    assert not torch.equal(nets["source_teacher"].prompts[0], nets["student"].prompts[0])
    assert roles[0].unet is not parts.source.backbone.unet
    assert list(nets["source_teacher"].parameters()) == []


def test_a_lora_run_s_checkpoint_holds_adapters_only_and_resumes_to_the_same_bits(
    lora_run: RunFolder, lora_source: Path, picture_folder: Path, tmp_path: Path
):
    train(picture_folder, tmp_path / "again", settings(lora_source, lora_rank=2, lr=1e-2, cycles=1))
    again = train(picture_folder, tmp_path / "again", settings(lora_source, lora_rank=2, lr=1e-2), resume=True)
    whole, resumed = tensors(lora_run), tensors(again)
    assert whole.keys() == resumed.keys()
    for group in whole:
        for key, value in whole[group].items():
            assert torch.equal(value, resumed[group][key]), (group, key)
    for name in ("student", "fake_teacher", "target_teacher"):
        assert all(key.startswith("adapter.") for key in whole[f"network.{name}"])
        assert any(value.abs().sum() > 0 for key, value in whole[f"network.{name}"].items() if key.endswith("1.weight"))


def test_the_lora_file_on_the_source_draws_what_the_merged_student_draws(lora_run: RunFolder, lora_source: Path):
    from diffusers import LCMScheduler, StableDiffusionPipeline

    pipe, student = (
        StableDiffusionPipeline.from_pretrained(path, use_safetensors=True) for path in (lora_source, lora_run.student)
    )

    def picture(pipe: StableDiffusionPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
        return torch.from_numpy(pipe("a prt cat", generator=torch.Generator().manual_seed(5), **call).images).permute(0, 3, 1, 2)

    pipe.scheduler = LCMScheduler.from_pretrained(lora_run.path / "lora", subfolder="scheduler")
    bare = picture(pipe)
    pipe.load_lora_weights(lora_run.path / "lora")
    with_lora = picture(pipe)
    merged = floats(load_text.load_text_model(lora_run.student), ["a prt cat"], [999])[0, :1]
    assert (with_lora - merged).abs().max() < 1e-4
    assert (picture(student) - merged).abs().max() < 1e-5
    assert (bare - merged).abs().max() > 1e-2


def test_a_lora_run_that_has_not_finished_can_be_drawn_from(lora_run: RunFolder, tmp_path: Path):
    finished = load_product(lora_run.path)
    aside = lora_run.student.rename(tmp_path / "aside")
    try:
        unfinished = load_product(lora_run.path)
    finally:
        aside.rename(lora_run.student)
    for key, value in finished.backbone.state_dict().items():
        assert torch.equal(value, unfinished.backbone.state_dict()[key])


def test_lora_wants_the_source_as_its_base(folder: Path, picture_folder: Path, source: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="student_init=source"):
        gather_text(settings(folder, lora_rank=2, student_init=str(folder)), picture_folder)
    with pytest.raises(SettingsError, match="lora_rank"):
        train(picture_folder, tmp_path / "x", TrainSettings(source=str(source), lora_rank=2))
