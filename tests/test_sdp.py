"""The subject-driven track from end to end on a tiny random Stable Diffusion pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sd
import torch
from PIL import Image
from safetensors.torch import load_file

from unidad import checkpoint
from unidad.adapt import build_method, train
from unidad.backbones import load_text
from unidad.commands import draw_from, export_run, load_product, sample_to_folder
from unidad.config import TrainSettings, build_settings
from unidad.data import to_signed
from unidad.errors import ModelError, SettingsError
from unidad.export_text import save_text_student
from unidad.info import describe_path
from unidad.ingredients_text import declared_wrongly, gather_text
from unidad.noise import from_x0
from unidad.presets import PRESETS
from unidad.prompts import bundled_templates, in_contexts, read_templates
from unidad.rollout import rollout, seeded_noise
from unidad.run import RunFolder
from unidad.sheets import LINE, MARGIN

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
    assert run.read()["hashes"].keys() == {"source", "pictures", "vae", "text_encoder", "prompts"}
    assert "a prt cat" in (run.path / "report.html").read_text()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time goes into its report."""
    monkeypatch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)


@pytest.mark.usefixtures("no_report")
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
        ({"cutmix_above": 0.5}, "cutmix_above"),
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


@pytest.mark.parametrize("declared", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("truth", ["epsilon", "v_prediction", "neither"])
def test_a_wrong_prediction_type_is_noted(declared: str, truth: str):
    """A network that gives what `truth` says, with some error, for latents it has learnt by heart."""
    net = sd.backbone(kind=declared)
    latents = torch.randn(1, *net.shape, generator=torch.Generator().manual_seed(1))
    error = 0.3 * torch.randn(1, *net.shape, generator=torch.Generator().manual_seed(2))

    def forward(x_t: torch.Tensor, t: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        exact = error if truth == "neither" else from_x0(latents, x_t, *net.schedule.alpha_sigma(t), truth)
        return (exact + error,)

    net.unet.forward = forward
    notes = declared_wrongly(net, latents, net.prompts)
    assert len(notes) == (truth not in ("neither", declared))
    assert all(f"predicts {declared}, but its output looks like {truth}" in note for note in notes)


def test_a_rare_token_in_pieces_is_noted(folder: Path, picture_folder: Path):
    parts = gather_text(settings(folder, prompt="a sks cat"), picture_folder)
    assert any("'sks' only in pieces (s, k, s)" in note for note in parts.pictures.notes)


# -- prompts in contexts ----------------------------------------------------------------------------------------------


def test_student_samples_are_drawn_in_contexts_and_told_to_every_network_but_the_heads(
    folder: Path, picture_folder: Path, tmp_path: Path
):
    (tmp_path / "own.txt").write_text("a {} on the dog\n\nthe dog on a {}\n")
    s = settings(folder, prompts=str(tmp_path / "own.txt"), batch_size=4)
    parts = gather_text(s, picture_folder)
    expected = ["a prt cat", "a prt cat on the dog", "the dog on a prt cat", ""]
    assert torch.allclose(parts.told["student"], load_text.encode_prompts(folder, expected))
    expected = [text.replace("prt ", "") for text in expected]
    assert torch.allclose(parts.told["source_teacher"], load_text.encode_prompts(folder, expected))

    method = build_method(s, parts, CPU, torch.Generator().manual_seed(0))
    seen: dict[str, list[list[int]]] = {name: [] for name in method.networks}
    for name in ("student", "source_teacher", "fake_teacher", "target_teacher"):
        net, asked = method.networks[name], method.networks[name]._condition
        net._condition = lambda labels, name=name, asked=asked: seen[name].append(labels.tolist()) or asked(labels)
    pictures = parts.stream(s, CPU).next(4)
    by_name = {phase.name: phase for phase in method.phases}
    drawn = []
    for _ in range(8):
        by_name["student"].loss(pictures)
        (asked,) = seen["student"]
        assert seen["source_teacher"] == seen["target_teacher"] == [[*asked, 3, 3, 3, 3]]
        assert seen["fake_teacher"] == [asked, [0] * 4], "for DMD in context; the heads are told the bare prompt"
        method.restore([t.clone() for t in method.carried()])
        for calls in seen.values():
            calls.clear()
        by_name["fake_teacher"].loss(pictures)
        assert seen["fake_teacher"] == [asked, [0] * 4, [0] * 4], (
            "L_fk in context, then samples and photos for the heads, told alike"
        )
        by_name["target_teacher"].loss(pictures)
        assert seen["target_teacher"] == [[0] * 4]
        drawn += asked
        for calls in seen.values():
            calls.clear()
    assert set(drawn) == {0, 1, 2}


def test_bundled_templates_and_bad_ones(folder: Path, tmp_path: Path):
    assert bundled_templates() == ["live", "object"]
    for name in bundled_templates():
        assert len(set(read_templates(name))) == 25
    assert in_contexts(["a {} in the snow"], "an prt owl") == ["a prt owl in the snow"]
    (tmp_path / "bad.txt").write_text("a {} here\nno place\n")
    (tmp_path / "none.txt").write_text("\n")
    for name, words in (("bad.txt", "Line 2"), ("none.txt", "no prompt"), ("gone.txt", "no readable file")):
        with pytest.raises(SettingsError, match=words):
            read_templates(str(tmp_path / name))
    with pytest.raises(SettingsError, match="Did you mean 'object'"):
        read_templates("objects")


# -- the product ------------------------------------------------------------------------------------------------------

# Runs where `import unidad` fails, as on the machine of someone who was only given the folder.
STRANGER = """
import sys
sys.modules["unidad"] = None
import json, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
pipe.set_progress_bar_config(disable=True)
found = {}
for i, (prompts, call) in enumerate(json.loads(sys.argv[3])):
    rows = [pipe([prompt] * 2, generator=[torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)],
                 output_type="np", guidance_scale=1.0, **call).images for prompt in prompts]
    found[str(i)] = torch.stack([torch.from_numpy(r).permute(0, 3, 1, 2) for r in rows]).contiguous()
from safetensors.torch import save_file
save_file(found, sys.argv[2])
"""


def as_stranger(folder: Path, out: Path, calls: list) -> list[torch.Tensor]:
    command = [sys.executable, "-c", STRANGER, str(folder), str(out), json.dumps(calls)]
    subprocess.run(command, check=True, timeout=300)
    return list(load_file(out).values())


def floats(model: load_text.TextModel, prompts: list[str], steps: list[int]) -> torch.Tensor:
    """Our rollout in [0, 1] before it is rounded to bytes, seeds 5 and 6."""
    net, vae, rows = model.backbone, load_text.load_vae(model.folder), []
    net.set_prompts(load_text.encode_prompts(model.folder, [*prompts, ""]))
    for i in range(len(prompts)):
        with torch.no_grad():
            z = rollout(net, seeded_noise([5, 6], net.shape), steps, torch.tensor([i, i]))
        rows.append((load_text.decode_latents(vae, z) / 2 + 0.5).clamp(0, 1))
    return torch.stack(rows)


def test_the_stock_pipeline_alone_draws_what_we_draw(run: RunFolder, tmp_path: Path):
    prompts = ["a prt cat", "a prt cat on the dog"]
    calls = [(prompts, {"num_inference_steps": 1}), (prompts, {"timesteps": [999, 399]})]
    one, two = as_stranger(run.student, tmp_path / "x.safetensors", calls)
    model = load_text.load_text_model(run.student)
    assert model.student_steps == [999]
    assert (one - floats(model, prompts, [999])).abs().max() < 1e-5
    assert (two - floats(model, prompts, [999, 399])).abs().max() < 1e-5
    assert (one - two).abs().max() > 1e-3

    grid = sample_to_folder(run.path, 2, tmp_path / "drawn", seed=5, batch_size=1, device="cpu", prompts=prompts)
    for row in range(2):
        for i in range(2):
            with Image.open(grid.parent / f"{row:02d}-{5 + i:06d}.png") as picture:
                drawn = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            assert (drawn - one[row, i] * 255).abs().max() <= 0.51
    with Image.open(grid) as sheet:
        assert sheet.size == (MARGIN + 2 * 64 + 2, LINE + 2 * 64 + 2)


def test_export_of_a_run_that_has_not_finished(run: RunFolder, tmp_path: Path):
    aside = run.student.rename(tmp_path / "aside")
    try:
        out = export_run(str(run.path), tmp_path / "exported")
    finally:
        aside.rename(run.student)
    ours, theirs = (load_text.load_text_model(path) for path in (out, run.student))
    for key, value in theirs.backbone.state_dict().items():
        assert torch.equal(value, ours.backbone.state_dict()[key])
    assert (ours.student_steps, ours.prompt, ours.parts) == (theirs.student_steps, "a prt cat", theirs.parts)


def test_a_student_of_one_s_own_timesteps_says_how_to_draw(run: RunFolder, tmp_path: Path):
    model = load_text.load_text_model(run.student)
    facts = {"prompt": "a prt cat"}
    save_text_student(model.backbone, model.scheduler, [999, 399], model.folder, tmp_path / "two", facts, half=True)
    assert "pipe('a prt cat', timesteps=[999, 399], guidance_scale=1.0)" in (tmp_path / "two" / "README.md").read_text()
    half = load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert load_text.load_text_model(tmp_path / "two").student_steps == [999, 399]


def test_nothing_of_this_machine_is_given_away(run: RunFolder):
    for file in run.student.rglob("*.*"):
        assert str(run.path.parent.parent).encode() not in file.read_bytes(), file


def test_a_run_can_start_from_another_s_student_and_info_knows_it(run: RunFolder, folder: Path, picture_folder: Path):
    parts = gather_text(settings(folder, student_init=str(run.path)), picture_folder)
    student = build_method(settings(folder), parts, CPU, torch.Generator()).networks["student"]
    for key, value in load_text.load_text_model(run.student).backbone.state_dict().items():
        assert torch.equal(student.state_dict()[key], value)
    assert "1-step student" in describe_path(str(run.student))
    assert "a=0.75" in describe_path(str(run.path))


def test_what_a_student_cannot_be_asked(run: RunFolder, folder: Path, source: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="many-step"):
        sample_to_folder(folder, 1, tmp_path / "a", device="cpu", prompts=["a cat"])
    with pytest.raises(SettingsError, match="no text-to-image model"):
        sample_to_folder(source, 1, tmp_path / "a", device="cpu", prompts=["a cat"])
    with pytest.raises(SettingsError, match="needs prompts"):
        draw_from(load_product(run.path), 1, None, 0, 1, "cpu")
    assert not (tmp_path / "a").exists()
