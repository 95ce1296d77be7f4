"""Scores of a subject under prompts: the maths against loops over pairs, and the command line on tiny random models."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import sd
import test_lpips
import torch
from PIL import Image

from unidad.backbones.load_text import encode_pictures, load_text_model, load_vae
from unidad.checkpoint import latest
from unidad.cli import main
from unidad.evaluate_subject import Drawn, score_subject
from unidad.export_text import save_text_student
from unidad.metrics.lpips import Lpips
from unidad.metrics.subject import image_likeness, prompt_likeness, prompt_variety
from unidad.run import RUN_FILE
from unidad.sheets import LINE, MARGIN


def test_likeness_by_hand():
    x, y = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [-5.0, 0.0], [1.0, 1.0]])
    assert image_likeness(x, y) == pytest.approx((1 - 1 + 2**-0.5 + 0 + 0 + 2**-0.5) / 6)
    assert prompt_likeness(x, y, torch.tensor([1, 2])) == pytest.approx((-1 + 2**-0.5) / 2)


def test_variety_by_hand():
    found = prompt_variety([torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0]])], torch.tensor([0, 0, 1]))
    assert (found.intra, found.inter) == (pytest.approx(4.0), pytest.approx((25 + 9) / 2))
    alone = prompt_variety([torch.tensor([[0.0], [3.0]])], torch.tensor([0, 1]))
    assert (alone.intra, alone.inter) == (None, pytest.approx(9.0))
    assert prompt_variety([torch.ones(3, 2)], torch.zeros(3, dtype=torch.long)).inter is None
    with pytest.raises(ValueError, match="together"):
        prompt_variety([torch.ones(3, 2)], torch.tensor([0, 1, 0]))


def test_variety_is_that_of_a_loop_over_pairs_whatever_the_batches():
    x = 50 + torch.randn(9, 7, generator=torch.Generator().manual_seed(0))  # far from 0, where sums of squares would lose digits
    prompt_of = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 4])
    pairs = [(prompt_of[i], prompt_of[j], float((x[i] - x[j]).square().sum())) for i, j in combinations(range(9), 2)]
    within = [[d for a, b, d in pairs if a == b == p] for p in (0, 2)]
    between = [d for a, b, d in pairs if a != b]
    for size in (1, 4, 9):
        found = prompt_variety(x.split(size), prompt_of)
        assert found.intra == pytest.approx(sum(sum(w) / len(w) for w in within) / 2, rel=1e-5)
        assert found.inter == pytest.approx(sum(between) / len(between), rel=1e-5)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    import transformers

    folder = tmp_path_factory.mktemp("judges")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    vit = transformers.ViTConfig(**sizes, intermediate_size=16, image_size=32)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "dino")
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(folder / "dino2")
    words = sd.write_tokenizer(folder / "clip")
    ends = {"vocab_size": words.vocab_size, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = {**sizes, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends, "intermediate_size": 16}, vision_config=vision, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    words.save_pretrained(folder / "clip")
    return ["--dino", str(folder / "dino"), "--clip", str(folder / "clip"), "--scores", "dino", "clip", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = load_text_model(sd.write_pipeline(folder / "source"))
    facts = {"prompt": "a prt cat"}
    save_text_student(model.backbone, model.scheduler, [999], model.folder, folder / "run" / "student", facts)
    settings = {"prompt": "a prt cat", "class_prompt": "a cat"}
    (folder / "run" / RUN_FILE).write_text(json.dumps({"kind": "train", "settings": settings}))
    return folder / "run"


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), "--track", "sdp"])


def test_a_run_and_a_folder_of_its_samples_score_the_same(run: Path, picture_folder: Path, judges: list[str], tmp_path: Path):
    (tmp_path / "own.txt").write_text("a {} on the dog\nthe dog on a {}\n")
    out, again = tmp_path / "a.json", tmp_path / "b.json"
    words = ["--train", picture_folder, "--prompts", tmp_path / "own.txt", "--n", 3, "--seed", 5]
    assert evaluate(run, *words, "--json", out, "--panel", tmp_path / "panel.png", *judges) == 0
    first = json.loads(out.read_text())
    assert (first["samples"], first["prompts"], first["photos"]) == (6, 2, 10)
    assert first["texts"] == ["a cat on the dog", "the dog on a cat"], "without the rare word"
    assert first["drawn_with"] == {"nfe": 1, "seeds": [5, 7], "prompts": ["a prt cat on the dog", "the dog on a prt cat"]}
    assert all(-1 <= first[key] <= 1 for key in ("dino", "clip_i", "clip_t"))
    assert first["intra_lpips"] is None
    with Image.open(tmp_path / "panel.png") as sheet:
        assert sheet.size == (MARGIN + 3 * 64 + 4, LINE + 2 * 64 + 2)

    drawn = tmp_path / "drawn"
    prompts = [word for text in first["drawn_with"]["prompts"] for word in ("--prompt", text)]
    assert main(["sample", str(run), "-n", "3", "--seed", "5", *prompts, "--out", str(drawn), "--device", "cpu"]) == 0
    lines = [{"file_name": f"{row:02d}-{5 + i:06d}.png", "text": text} for i in range(3) for row, text in enumerate(first["texts"])]
    (drawn / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert evaluate(drawn, "--train", picture_folder, "--json", again, *judges) == 0
    second = json.loads(again.read_text())
    for key in ("dino", "clip_i", "clip_t"):
        assert second[key] == pytest.approx(first[key], abs=1e-5)


def test_dino_is_the_first_or_the_second_as_the_model_given_is(run: Path, picture_folder: Path, judges: list[str], tmp_path: Path):
    judged, second = {}, [f"{word}2" if word.endswith("/dino") else word for word in judges]
    for name, words in (("dino", judges), ("dinov2", second)):
        (tmp_path / "own.txt").write_text("a {} on the dog\n")
        told = ["--prompts", tmp_path / "own.txt", "--n", 1, "--json", tmp_path / "x.json"]
        assert evaluate(run, "--train", picture_folder, *told, *words, "--scores", "dino") == 0
        found = json.loads((tmp_path / "x.json").read_text())
        judged[name] = (found["dino"], found["extractors"]["dino"]["name"].split(":")[0])
    assert [told for _, told in judged.values()] == ["dino", "dinov2"]
    assert judged["dino"][0] != judged["dinov2"][0]


def test_lpips_gives_both_varieties():
    lpips = Lpips("alex", test_lpips.random_state("alex"), "x")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = Drawn(pixels[[0, 0, 1, 1]], ["a", "b"], torch.tensor([0, 0, 1, 1]), {})
    found = score_subject(drawn, pixels, {"lpips": lpips})
    apart = float((lpips(pixels[:1]) - lpips(pixels[1:])).square().sum())
    assert found["intra_lpips"] == pytest.approx(0, abs=1e-6 * apart)
    assert found["inter_lpips"] == pytest.approx(apart, rel=1e-4)
    assert found["dino"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "add --train PHOTOS"),
        (["--train", "PHOTOS", "--scores", "dino", "--dino", "nowhere"], "--dino or --clip FOLDER"),
        (["--train", "PHOTOS", "--scores", "lpips"], "vgg16-397923af.pth"),
        (["--train", "PHOTOS", "JUDGES", "--n", "0"], "must be at least 1"),
        (["--train", "PHOTOS", "JUDGES", "--prompts", "nothing"], "no bundled list"),
        (["--train", "PHOTOS", "JUDGES", "--steps", "5000"], "--steps"),
        (["--train", "PHOTOS", "JUDGES", "--prompts", "LONG"], "more than the 77"),
        (["--train", "nowhere", "JUDGES"], "no folder 'nowhere'"),
    ],
)
def test_what_is_missing_is_said(
    run: Path, picture_folder: Path, judges: list[str], words, sentence, capsys, monkeypatch, tmp_path
):
    (tmp_path / "LONG").write_text("a {} " + "on the dog " * 40)
    monkeypatch.chdir(tmp_path)
    if "JUDGES" in words:  # what is wrong with the run, the photos or the numbers is said before a judge is looked for
        monkeypatch.setattr("unidad.evaluate_subject.load_extractor", lambda *_: pytest.fail("the judges came first"))
    meant = [w for word in words for w in (judges if word == "JUDGES" else [picture_folder if word == "PHOTOS" else word])]
    assert evaluate(run, *meant) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_without_prompts_is_refused(picture_folder: Path, judges: list[str], capsys):
    assert evaluate(picture_folder, "--train", picture_folder, *judges) == 2
    assert "metadata.jsonl" in capsys.readouterr().err


# -- what `unidad train` says to bad input on this track --------------------------------------------------------------


@pytest.fixture
def photos(picture_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("00.png", "01.png"):
        (folder / name).write_bytes((picture_folder / name).read_bytes())
    return folder


def train(run: Path, photos: Path, out: Path, *words: str) -> int:
    sets = ("cycles=1", "fake_updates=1", "sample_every=0", "tracker=none", "precision=fp32")
    quick = [word for setting in sets for word in ("--set", setting)]
    source = ["--source", str(run.parent / "source"), "--target", str(photos), "--out", str(out), "--preset", "sdp"]
    return main(["train", *source, "--device", "cpu", *quick, *words])


def test_a_source_is_distilled_under_one_prompt_by_its_teacher_alone(run: Path, photos: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)
    settings = ["--set", "cycles=1", "--set", "fake_updates=1", "--set", "sample_every=0", "--set", "tracker=none"]
    words = [
        "--source",
        str(run.parent / "source"),
        "--data",
        str(photos),
        "--preset",
        "sdp",
        "--prompt",
        "a cat",
        "--device",
        "cpu",
    ]
    assert main(["distill", *words, *settings, "--out", str(tmp_path / "first")]) == 0
    told = json.loads((tmp_path / "first" / RUN_FILE).read_text())["settings"]
    assert [told[key] for key in ("prompt", "class_prompt", "a", "target_teacher", "heads")] == [
        "a cat",
        "a cat",
        0.0,
        "off",
        "single",
    ]
    names = {key.split(".")[1] for key in latest(tmp_path / "first" / "checkpoints")[1].tensors if key.startswith("network.")}
    assert names == {"student", "fake_teacher", "heads"}
    start = ["--prompt", "a prt cat", "--class-prompt", "a cat", "--set", f"student_init={tmp_path / 'first' / 'student'}"]
    assert train(run, photos, tmp_path / "second", *start) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--prompt 'a prt cat'"),
        (["--prompt", "a prt cat"], "--class-prompt 'a cat'"),
        (["--prompt", "cat " * 80, "--class-prompt", "a cat"], "82 tokens, more than the 77"),
    ],
)
def test_bad_prompts_end_in_a_sentence(run: Path, photos: Path, tmp_path: Path, words, sentence, capsys):
    assert train(run, photos, tmp_path / "out", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_photo_without_its_caption_is_named(run: Path, photos: Path, tmp_path: Path, capsys):
    (photos / "00.txt").write_text("a prt cat on the dog")
    assert train(run, photos, tmp_path / "out", "--prompt", "a prt cat", "--class-prompt", "a cat") == 2
    assert "01.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../secret.png", "Line 2"),
        ("/etc/hostname", "Line 2"),
        ("a/../01.png", "Line 2"),
        ("..\\\\01.png", "Line 2"),
        ("..", "Line 2"),
        ("", "Line 2"),
        ("gone.png", "these have no caption or an empty one: 01.png"),
    ],
)
def test_captions_of_a_stranger_stay_in_their_folder(run, photos, judges, tmp_path, name, sentence, capsys):
    """RELIABILITY case 15, where pictures are learnt and where they are scored."""
    (tmp_path / "secret.png").write_bytes((photos / "01.png").read_bytes())
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "00.png", "text": "a prt cat"}\n' + f'{{"file_name": "{name}", "text": "a prt cat"}}\n'
    )
    assert train(run, photos, tmp_path / "out", "--prompt", "a prt cat", "--class-prompt", "a cat") == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert evaluate(photos, "--train", photos, *judges) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("line", ["nonsense", "[" * 100_000, '{"file_name": "01.png"}', '{"file_name": ["01.png"], "text": "x"}'])
def test_captions_of_a_stranger_that_are_no_captions(run, photos, tmp_path, line, capsys):
    (photos / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a prt cat"}\n' + line)
    assert train(run, photos, tmp_path / "out", "--prompt", "a prt cat", "--class-prompt", "a cat") == 2
    said = capsys.readouterr().err
    assert "Line 2" in said
    assert said.count("\n") == 1


def test_a_rare_word_in_pieces_is_warned_of_before_training(run: Path, photos: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)
    assert train(run, photos, tmp_path / "out", "--prompt", "a sks cat", "--class-prompt", "a cat") == 0
    assert "'sks' only in pieces (s, k, s)" in capsys.readouterr().err


def test_a_v_prediction_model_declared_as_epsilon_is_warned_of(tmp_path: Path, capsys, monkeypatch):
    """Flat photos have latents that are one colour, c; a network that says -c there says what v mostly is at half noise."""
    monkeypatch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 32), (230, 40, 90)).save(tmp_path / "photos" / "00.png")
    folder = sd.write_pipeline(tmp_path / "source", kind="epsilon")
    vae, flat = load_vae(folder), torch.tensor([230, 40, 90]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
    config = folder / "vae" / "config.json"
    scale = float(3 * vae.config.scaling_factor / encode_pictures(vae, flat).square().mean().sqrt())
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
    unet = load_text_model(folder).backbone.unet
    torch.nn.init.zeros_(unet.conv_out.weight)
    unet.conv_out.bias.data = -encode_pictures(load_vae(folder), flat).mean((0, 2, 3))
    unet.save_pretrained(folder / "unet")
    (tmp_path / "run").mkdir()
    words = ["--prompt", "a prt cat", "--class-prompt", "a cat"]
    assert train(tmp_path / "run", tmp_path / "photos", tmp_path / "out", *words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "predicts epsilon, but its output looks like v_prediction" in said
    assert "scheduler/scheduler_config.json" in said
