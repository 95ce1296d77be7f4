"""The subject-driven track from end to end on a tiny random Stable Diffusion pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import sd
import torch

from unidad import checkpoint
from unidad.adapt import build_method, train
from unidad.backbones import load_text
from unidad.config import TrainSettings, build_settings
from unidad.data import to_signed
from unidad.errors import ModelError, SettingsError
from unidad.ingredients_text import gather_text
from unidad.presets import PRESETS
from unidad.run import RunFolder

CPU = torch.device("cpu")
QUICK = {
    "prompt": "a prt cat",
    "class_prompt": "a cat",
    "device": "cpu",
    "precision": "fp32",
    "cycles": 2,
    "fake_updates": 2,
    "warmup": 0,
    "sample_every": 0,
    "save_every": 0,
    "tracker": "none",
    "lr": 1e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "model")


def settings(folder: Path, **values: object) -> TrainSettings:
    return build_settings(TrainSettings, PRESETS["sdp"], QUICK, {"source": str(folder)}, values)


@pytest.fixture(scope="module")
def run(folder: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(picture_folder, tmp_path_factory.mktemp("runs") / "cat", settings(folder))


def tensors(run: RunFolder) -> dict[str, dict[str, torch.Tensor]]:
    found = checkpoint.latest(run.checkpoints)
    assert found is not None
    return found[1].tensors


def test_preset_is_the_paper_s():
    s = build_settings(TrainSettings, PRESETS["sdp"])
    assert (s.lr, s.steps, s.gan_weight, s.disc_weight, s.a, s.guidance, s.fake_updates) == (5e-6, 1, 0.001, 0.01, 0.75, 7.5, 10)


def test_each_network_is_told_its_own_prompt(folder: Path, picture_folder: Path):
    parts = gather_text(settings(folder), picture_folder)
    method = build_method(settings(folder), parts, CPU, torch.Generator().manual_seed(0))
    prompt, general, empty = load_text.encode_prompts(parts.folder, ["a prt cat", "a cat", ""])
    for name in ("student", "fake_teacher", "target_teacher", "source_teacher"):
        told = method.networks[name].prompts
        assert torch.allclose(told[0], general if name == "source_teacher" else prompt)
        assert torch.allclose(told[1], empty)
    assert not torch.allclose(prompt, general)


def test_only_the_teachers_are_guided_and_only_in_dmd(folder: Path, picture_folder: Path):
    s = settings(folder, batch_size=2)
    parts = gather_text(s, picture_folder)
    method = build_method(s, parts, CPU, torch.Generator().manual_seed(0))
    seen: dict[str, list[int]] = {name: [] for name in method.networks}
    for name in ("student", "source_teacher", "fake_teacher", "target_teacher"):
        hook = lambda _m, inputs, name=name: seen[name].append(len(inputs[0]))  # noqa: E731
        method.networks[name].unet.conv_in.register_forward_pre_hook(hook)
    by_name = {phase.name: phase for phase in method.phases}
    pictures = parts.stream(s, CPU).next(2)
    by_name["student"].loss(pictures)
    assert (seen["source_teacher"], seen["target_teacher"]) == ([4], [4])
    assert seen["student"] == [2]
    assert set(seen["fake_teacher"]) == {2}
    by_name["target_teacher"].loss(pictures)
    assert seen["target_teacher"] == [4, 2]


def test_the_stream_gives_latents_of_pictures_and_of_their_mirror_images(folder: Path, picture_folder: Path):
    s = settings(folder, hflip=True)
    parts = gather_text(s, picture_folder)
    vae = load_text.load_vae(folder)
    plain = load_text.encode_pictures(vae, to_signed(parts.pictures.pixels))
    mirrored = load_text.encode_pictures(vae, to_signed(parts.pictures.pixels.flip(-1)))
    drawn = parts.stream(s, CPU).next(20)
    kinds = [(bool((plain == z).all((1, 2, 3)).any()), bool((mirrored == z).all((1, 2, 3)).any())) for z in drawn]
    assert all(a or b for a, b in kinds)
    assert any(not a for a, _ in kinds)
    assert any(not b for _, b in kinds)
    assert torch.equal(parts.stream(settings(folder), CPU).next(3), parts.stream(settings(folder), CPU).next(3))


def test_a_run_trains_three_networks_and_leaves_a_report(run: RunFolder, folder: Path):
    start = load_text.load_text_model(folder).backbone.state_dict()
    saved = tensors(run)
    for name in ("student", "fake_teacher", "target_teacher"):
        trained = saved[f"network.{name}"]
        assert trained.keys() == start.keys()
        assert any(not torch.equal(trained[key], start[key]) for key in start)
    assert "network.source_teacher" not in saved
    assert run.read()["student_steps"] == [999]
    assert run.read()["hashes"].keys() == {"source", "pictures", "vae", "text_encoder"}
    assert "a prt cat" in (run.path / "report.html").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(run: RunFolder, folder: Path, picture_folder: Path, tmp_path: Path):
    train(picture_folder, tmp_path / "again", settings(folder, cycles=1))
    again = train(picture_folder, tmp_path / "again", settings(folder), resume=True)
    whole, resumed = tensors(run), tensors(again)
    assert whole.keys() == resumed.keys()
    for group in whole:
        for key, value in whole[group].items():
            assert torch.equal(value, resumed[group][key]), (group, key)


@pytest.mark.parametrize(("values", "steps"), [({"steps": 2}, [999, 499]), ({"timesteps": "999,399"}, [999, 399])])
def test_more_steps_and_timesteps_of_one_s_own(folder: Path, picture_folder: Path, values: dict, steps: list[int]):
    s = settings(folder, **values)
    parts = gather_text(s, picture_folder)
    assert parts.student_steps == steps
    method = build_method(s, parts, CPU, torch.Generator().manual_seed(0))
    times: list[int] = []
    hook = lambda _m, args, _kwargs: times.extend(args[1].tolist())  # noqa: E731
    method.networks["student"].unet.register_forward_pre_hook(hook, with_kwargs=True)
    method.phases[0].loss(parts.stream(s, CPU).next(1))
    assert times == steps


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "--prompt"),
        ({"class_prompt": ""}, "--class-prompt"),
        ({"method": "finetune"}, "finetune"),
        ({"class_label": 3}, "class_label"),
        ({"timesteps": "1000"}, "last is 999"),
        ({"timesteps": "399,999"}, "must fall"),
        ({"prompt": "cat " * 80}, "77"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(folder: Path, picture_folder: Path, values: dict, words: str):
    with pytest.raises(SettingsError, match=words):
        gather_text(settings(folder, **values), picture_folder)


def test_other_models_and_other_sources_are_refused(folder: Path, picture_folder: Path, source: Path, tmp_path: Path):
    v = sd.write_pipeline(tmp_path / "v", kind="v_prediction")
    with pytest.raises(ModelError, match="predicts v_prediction"):
        gather_text(settings(folder, student_init=str(v)), picture_folder)
    with pytest.raises(SettingsError, match="no text-to-image model"):
        train(picture_folder, tmp_path / "x", settings(source))


def test_a_rare_token_in_pieces_is_noted(folder: Path, picture_folder: Path):
    parts = gather_text(settings(folder, prompt="a sks cat"), picture_folder)
    assert any("'sks' only in pieces (s, k, s)" in note for note in parts.pictures.notes)
