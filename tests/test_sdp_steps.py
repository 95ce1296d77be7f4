"""Text-to-image students of three and four steps, what is kept in memory while they learn, and what the command line refuses."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from test_cli import refused
from test_sdp import floats, settings, tensors
from transformers import CLIPTextModel

from unidad.adapt import train
from unidad.backbones import load_text
from unidad.cli import main
from unidad.commands import export_run, load_product
from unidad.errors import SettingsError
from unidad.ingredients_text import gather_text
from unidad.noise import from_x0
from unidad.run import RunFolder
from unidad.sheets import labelled_grid

PROMPTS = ["a prt cat", "a prt cat on the dog"]
SEEDS = (5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def photos(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("four") / "photos"
    place.mkdir()
    for name in ("00.png", "01.png", "02.png", "03.png"):
        shutil.copy(picture_folder / name, place / name)
    return place


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time goes into its report."""
    monkeypatch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)


# -- three and four steps ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[3, 4])
def run(request: pytest.FixtureRequest, folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    s = settings(folder, steps=request.param, cycles=1, lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)
        return train(photos, tmp_path_factory.mktemp("runs") / "cat", s)


def stock(folder: Path, steps: int) -> torch.Tensor:
    """What diffusers' own pipeline draws from a folder, a row for each prompt, [prompts, seeds, 3, S, S] in [0, 1]."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
    rows = [
        pipe([prompt] * len(SEEDS), generator=[torch.Generator().manual_seed(i) for i in SEEDS], **call).images
        for prompt in PROMPTS
    ]
    return torch.from_numpy(np.stack(rows)).permute(0, 1, 4, 2, 3)


def test_the_stock_pipeline_and_unidad_sample_draw_the_student_s_steps(run: RunFolder, folder: Path, tmp_path: Path):
    times = {3: [998, 665, 332], 4: [999, 749, 499, 249]}[run.read()["settings"]["steps"]]
    assert run.read()["student_steps"] == times
    out = export_run(str(run.path), tmp_path / "exported")
    student = load_text.load_text_model(out)
    assert student.student_steps == times
    ours, theirs = floats(load_product(run.path), PROMPTS, times), stock(out, len(times))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - floats(load_product(run.path), PROMPTS, times[1:])).abs().max() > 1e-3
    assert (ours - floats(load_text.load_text_model(folder), PROMPTS, times)).abs().max() > 1e-3, "the source draws otherwise"

    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(out), "-n", "2", "--seed", "5", "--out", str(tmp_path / "drawn"), "--device", "cpu", *words]) == 0
    rows = torch.stack(
        [torch.stack([read(tmp_path / "drawn" / f"{row:02d}-{seed:06d}.png") for seed in SEEDS]) for row in range(2)]
    )
    assert (rows / 255 - ours).abs().max() <= 0.51 / 255, "rounded to bytes"

    grid = np.asarray(Image.open(tmp_path / "drawn" / "grid.png"))
    expected = labelled_grid(list(rows.byte()), PROMPTS, [f"seed {seed}" for seed in SEEDS], scale=4)
    assert np.array_equal(grid, np.asarray(expected)), "each row beside its own prompt, each column under its own seed"
    assert not np.array_equal(grid, np.asarray(labelled_grid(list(rows.byte()), PROMPTS[::-1], ["seed 5", "seed 6"], scale=4)))


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


# -- what is let go of ------------------------------------------------------------------------------------------------


def alive() -> dict[str, int]:
    gc.collect()
    found = [type(thing) for thing in gc.get_objects()]
    return {kind.__name__: sum(issubclass(thing, kind) for thing in found) for kind in (AutoencoderKL, CLIPTextModel)}


def test_vae_and_text_encoder_are_let_go_of_once_all_is_encoded(folder: Path, photos: Path):
    before, kept = alive(), load_text.load_vae(folder)
    assert alive()["AutoencoderKL"] == before["AutoencoderKL"] + 1, "the counting works"
    del kept
    parts = gather_text(settings(folder, hflip=True, prompts="live"), photos)
    assert len(parts.latents) == 4
    assert alive() == before


def refuse(*_args: object, **_named: object) -> None:
    raise AssertionError("pictures and prompts are encoded before training, not in it")


@pytest.mark.parametrize("rank", [0, 2])
def test_no_cycle_encodes_anything(rank: int, folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoded, encode = [], AutoencoderKL.encode

    def counted(vae: AutoencoderKL, pictures: torch.Tensor) -> object:
        encoded.extend(pictures)
        return encode(vae, pictures)

    def gather(*args: object) -> object:
        parts = gather_text(*args)
        monkeypatch.setattr(AutoencoderKL, "encode", refuse)
        monkeypatch.setattr(CLIPTextModel, "forward", refuse)
        return parts

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    monkeypatch.setattr("unidad.adapt.gather_text", gather)
    monkeypatch.setattr("unidad.adapt.finish", lambda *_: None)  # the report draws
    run = train(photos, tmp_path / "run", settings(folder, lora_rank=rank, hflip=True))
    assert len(encoded) == 2 * 4, "each photo once, and once mirrored"
    assert "network.student" in tensors(run), "it went to its end"


# -- what the command line refuses ------------------------------------------------------------------------------------


def words(folder: Path, photos: Path, out: Path, *more: str, prompt: str = "a prt cat") -> list[str]:
    fixed = ["train", "--source", str(folder), "--target", str(photos), "--out", str(out), "--device", "cpu", "--preset", "sdp"]
    return [*fixed, "--prompt", prompt, "--class-prompt", "a cat", "--set", "tracker=none", *more]


LONG = "".join(json.dumps({"file_name": f"0{i}.png", "text": "cat " * 90}) + "\n" for i in range(4))
BESIDE = [  # a file beside the photos, 40x32 and a little more, and what is said of it
    ("00.txt", b"a prt cat", r"no caption or an empty one: 01.png, 02.png, 03.png"),
    ("00.txt", b" ", "no caption or an empty one: 00.png"),
    ("00.txt", b"\xff\xfe\x00", "00.txt' cannot be read"),
    ("metadata.jsonl", b"\xff\xfe\x00", "metadata.jsonl' cannot be read"),
    ("metadata.jsonl", LONG.encode(), "has 92 tokens, more than the 77"),
    ("00_mask.png", b"no picture", "00_mask.png' is not a picture"),
    ("00_mask.png", (40, 40, 255), "is 40x40, which is not the shape of its photo '00.png' (40x32)"),
    ("00_mask.png", (40, 32, 0), "black in all that is used of its photo"),
]


@pytest.mark.parametrize(("name", "content", "said"), BESIDE)
def test_bad_captions_and_masks(name: str, content: bytes | tuple, said: str, folder: Path, photos: Path, tmp_path: Path, capsys):
    place = shutil.copytree(photos, tmp_path / "photos")
    if isinstance(content, bytes):
        (place / name).write_bytes(content)
    else:
        Image.new("L", content[:2], content[2]).save(place / name)
    assert said in refused(capsys, *words(folder, place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "which is no readable file and no bundled list"),
        (b"\n \n", "holds no prompt"),
        (bytes(range(256)), "which is no readable file and no bundled list"),
        (b"a {} here\na cat\n", "must have {} once"),
    ],
    ids=["missing", "empty", "binary", "no place"],
)
def test_bad_lists_of_prompts(content: bytes | None, said: str, folder: Path, photos: Path, tmp_path: Path, capsys):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    assert said in refused(capsys, *words(folder, photos, tmp_path / "run", "--set", f"prompts={tmp_path / 'list.txt'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "say what the pictures show"), ("  ", "say what the pictures show"), ("cat " * 80, "has 82 tokens")]
)
def test_bad_prompts(prompt: str, said: str, folder: Path, photos: Path, tmp_path: Path, capsys):
    assert said in refused(capsys, *words(folder, photos, tmp_path / "run", prompt=prompt))
    assert not (tmp_path / "run").exists()


def test_other_methods_are_refused_before_a_prompt_is_asked_for(folder: Path, photos: Path, tmp_path: Path, capsys):
    tried = ["finetune", "--source", str(folder), "--target", str(photos), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert "finetune is not there yet" in refused(capsys, *tried)


def test_a_word_in_pieces_and_a_wrong_prediction_type_are_said_on_the_screen(
    folder: Path, photos: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """A source that says epsilon and gives v; the run is stopped where it would begin, the photos' latents known and of unit size."""
    model = load_text.load_text_model(folder)
    known = torch.randn(1, *model.backbone.shape, generator=torch.Generator().manual_seed(1))

    def gives_v(_unet: UNet2DConditionModel, x_t: torch.Tensor, t: torch.Tensor, **_named: object) -> tuple[torch.Tensor]:
        return (from_x0(known, x_t, *model.backbone.schedule.alpha_sigma(t), "v_prediction"),)

    def stop(*_args: object) -> None:
        raise SettingsError("Far enough.")

    monkeypatch.setattr(UNet2DConditionModel, "forward", gives_v)
    monkeypatch.setattr("unidad.ingredients_text.encode_pictures", lambda _vae, pictures: known.expand(len(pictures), -1, -1, -1))
    monkeypatch.setattr("unidad.adapt.build_method", stop)
    said = refused(capsys, *words(folder, photos, tmp_path / "run", prompt="a sks cat"))
    assert "Note: The tokenizer knows 'sks' only in pieces (s, k, s)" in said
    assert "Note: The source says that it predicts epsilon, but its output looks like v_prediction" in said
    assert said.endswith("unidad: Far enough.\n")


def test_what_is_for_text_to_image_models_is_refused_for_pixel_models(source: Path, photos: Path, tmp_path: Path, capsys):
    assert "leave out prompt" in refused(capsys, *words(source, photos, tmp_path / "run"))
    drawn = ["sample", str(source), "-n", "1", "--out", str(tmp_path / "drawn"), "--prompt", "a cat", "--device", "cpu"]
    assert "leave out --prompt" in refused(capsys, *drawn)
    for name in (str(source), "bundled:avatars-3step"):
        said = refused(capsys, "export", name, "--single-file", "--out", str(tmp_path / "one.safetensors"))
        assert f"'{name}' draws pixels" in said
        assert "assets" not in said, "no path of the installation"
    assert list(tmp_path.iterdir()) == []
