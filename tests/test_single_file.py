"""Stable Diffusion in one file of the original layout: diffusers' own reader is the judge of what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from unidad.backbones.load_text import load_text_model
from unidad.backbones.single_file import STABLE_DIFFUSION, family, read_shapes
from unidad.cli import main
from unidad.convert.ldm import to_ldm
from unidad.convert.single_file import from_single_file, to_single_file
from unidad.errors import CheckpointError, ModelError

WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def write(folder: Path, two: bool) -> Path:
    """SD 1.5's block structure, or with `two` SD 2's, in tiny widths."""
    torch.manual_seed(int(two))
    narrow = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 8, "layers_per_block": 2}
    unet = UNet2DConditionModel(
        sample_size=4,
        cross_attention_dim=16,
        attention_head_dim=[1, 2, 2, 2] if two else 2,
        use_linear_projection=two,
        **narrow,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(latent_channels=4, sample_size=32, **narrow, **blocks)
    words = sd.write_tokenizer(folder.with_name(f"{folder.name}-words"))
    text = CLIPTextConfig(
        vocab_size=words.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu" if two else "quick_gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": words, "scheduler": sd.scheduler()}
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("single")
    return {name: write(place / name, name == "sd2") for name in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path]) -> dict[str, Path]:
    written = {name: folder.with_suffix(".safetensors") for name, folder in folders.items()}
    for name, folder in folders.items():
        to_single_file(folder, written[name])
    return written


def bare(folder: Path, out: Path) -> Path:
    """The small files of a pipeline folder, without its weights."""
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            copy = out / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_folder_comes_back_to_the_bit_from_its_single_file_with_only_small_files_as_config(
    name: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
):
    facts = from_single_file(files[name], bare(folders[name], tmp_path / "config"), tmp_path / "again")
    assert facts["prediction_type"] == "epsilon"
    for weights in WEIGHTS:
        before, after = load_file(folders[name] / weights), load_file(tmp_path / "again" / weights)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    opened = load_text_model(tmp_path / "again")
    assert opened.student_steps is None, "a converted checkpoint is a source, and the loader takes it"


def test_diffusers_alone_draws_the_same_picture_from_the_file(folders: dict[str, Path], files: dict[str, Path]):
    plain = StableDiffusionPipeline.from_pretrained(folders["sd2"], safety_checker=None)
    single = StableDiffusionPipeline.from_single_file(
        str(files["sd2"]), config=str(folders["sd2"]), local_files_only=True, safety_checker=None
    )
    drawn = []
    for pipe in (plain, single):
        pipe.set_progress_bar_config(disable=True)
        drawn.append(
            pipe(
                "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", height=32, width=32
            ).images
        )
    assert all(torch.equal(value, single.unet.state_dict()[key]) for key, value in plain.unet.state_dict().items())
    assert abs(drawn[0] - drawn[1]).max() < 1e-5, "the same weights, but at other places in memory, which moves the last bits"
    assert drawn[0].std() > 0.01


def test_names_and_shapes_of_the_true_sd_1_5():
    """Counts and places as published checkpoints have them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12))
    found = {k: tuple(v.shape) for k, v in to_ldm(unet.state_dict(), vae.state_dict(), text.state_dict(), open_clip=False).items()}
    counts = [sum(key.startswith(part) for key in found) for part in ("model.diffusion", "first_stage", "cond_stage")]
    assert counts == [686, 248, 196]
    assert family(found) == STABLE_DIFFUSION
    unet_part, vae_part = "model.diffusion_model.", "first_stage_model."
    for name, shape in {
        f"{unet_part}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet_part}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{unet_part}input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
        f"{unet_part}middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        f"{unet_part}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{unet_part}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet_part}output_blocks.6.0.skip_connection.weight": (640, 1920, 1, 1),
        f"{unet_part}output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        f"{unet_part}out.2.bias": (4,),
        f"{vae_part}encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        f"{vae_part}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{vae_part}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{vae_part}decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{vae_part}quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    }.items():
        assert found.get(name) == shape, name


def test_half_precision_is_the_rounded_file(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys):
    out = tmp_path / "half.safetensors"
    assert main(["convert", "to-single-file", str(folders["sd1"]), "--out", str(out), "--half"]) == 0
    assert "no scheduler" in capsys.readouterr().out
    whole, half = load_file(files["sd1"]), load_file(out)
    assert all(torch.equal(half[key], value.half()) for key, value in whole.items())
    assert main(["convert", "to-single-file", str(folders["sd1"]), "--out", str(out)]) == 2, "nothing is overwritten"
    assert (
        main(["convert", "single-file", str(out), "--config", str(folders["sd1"]), "--out", str(tmp_path / "back"), "--half"]) == 0
    )
    back = load_file(tmp_path / "back" / WEIGHTS[0])
    assert all(torch.equal(back[key], value.half()) for key, value in load_file(folders["sd1"] / WEIGHTS[0]).items())


def test_a_file_as_source_names_the_command(files: dict[str, Path], tmp_path: Path, capsys):
    command = ["train", "--source", str(files["sd1"]), "--target", str(tmp_path), "--out", str(tmp_path / "run"), "--preset", "sdp"]
    assert main(command) == 2
    assert "unidad convert single-file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_file_with_a_config_becomes_a_folder_beside_it_once(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path, capsys
):
    dream = tmp_path / "dream.safetensors"
    dream.write_bytes(files["sd1"].read_bytes())
    config = bare(folders["sd1"], tmp_path / "config")
    words = [
        "train",
        "--source",
        str(dream),
        "--preset",
        "sdp",
        "--prompt",
        "a prt cat",
        "--class-prompt",
        "a cat",
        "--list-settings",
    ]
    assert main([*words, "--source-config", str(config)]) == 0
    assert f"source: {tmp_path / 'dream'}  # " in capsys.readouterr().out
    before = (tmp_path / "dream" / WEIGHTS[0]).stat().st_mtime_ns
    assert load_text_model(tmp_path / "dream").student_steps is None
    assert main([*words, "--source-config", str(config)]) == 0
    assert (tmp_path / "dream" / WEIGHTS[0]).stat().st_mtime_ns == before, "it was there already"
    capsys.readouterr()
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    assert main([*words, "--source-config", str(config)]) == 2
    assert "Move it away" in capsys.readouterr().err
    words[2] = str(folders["sd1"])
    assert main([*words, "--source-config", str(config)]) == 2
    assert "Leave it out" in capsys.readouterr().err


def test_of_a_config_on_the_hub_only_small_files_are_fetched(files: dict[str, Path], tmp_path: Path, monkeypatch):
    asked: list[str] = []

    def snapshot_download(_name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="could not be fetched"):
        from_single_file(files["sd1"], "someone/sd", tmp_path / "out")
    assert {"unet/*.json", "tokenizer/*.txt", "scheduler/*.json", "text_encoder_2/*.json"} <= set(asked)
    assert not [pattern for pattern in asked if "safetensors" in pattern]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({FIRST: (320, 4, 3, 3), "conditioner.embedders.1.model.positional_embedding": (77, 1280)}, "a UNet of SDXL"),
        ({"add_embedding.linear_1.weight": (4, 4)}, "an SDXL UNet alone, in diffusers' layout"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)}, "an SD3 checkpoint"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "a Flux checkpoint"),
        ({"single_transformer_blocks.0.x": (1,), "transformer_blocks.0.norm1_context.linear.weight": (4, 4)}, "a Flux checkpoint"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 4)}, "a LoRA"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 4)}, "a LoRA"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 4)}, "a LoRA"),
        ({"decoder.conv_in.weight": (4, 4, 3, 3), "quant_conv.weight": (8, 8, 1, 1)}, "a VAE alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "a UNet alone, in diffusers' layout"),
        ({FIRST: (320, 9, 3, 3), "first_stage_model.x": (1,), "cond_stage_model.x": (1,)}, "an inpainting checkpoint"),
        ({FIRST: (320, 4, 3, 3), "cond_stage_model.x": (1,)}, "without its VAE"),
        ({FIRST: (320, 4, 3, 3), "first_stage_model.x": (1,)}, "without its text encoder"),
        ({"weird": (1,)}, "no checkpoint of a family that is known here"),
    ],
)
def test_other_families_are_named_from_names_and_shapes(shapes: dict, words: str, folders: dict[str, Path], tmp_path: Path):
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros([min(n, 9) for n in shape]) for name, shape in shapes.items()}, file)
    assert words in family(shapes)
    with pytest.raises(ModelError, match=words):
        from_single_file(file, folders["sd1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_other_generation_does_not_fit_the_config(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    with pytest.raises(ModelError, match=r"does not fit the config .* should be"):
        from_single_file(files["sd2"], folders["sd1"], tmp_path / "out")


def test_a_missing_weight_is_named_before_anything_is_loaded(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    weights = load_file(files["sd1"])
    del weights["first_stage_model.decoder.mid.attn_1.norm.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(
        ModelError, match=r"'first_stage_model\.decoder\.mid\.attn_1\.norm\.bias' should be \[16\] and is not there"
    ):
        from_single_file(tmp_path / "less.safetensors", folders["sd1"], tmp_path / "out")


def test_pickles_and_damaged_files_are_refused(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path):
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=r"save it as \.safetensors first"):
        from_single_file(tmp_path / "model.ckpt", folders["sd1"], tmp_path / "out")
    content = files["sd1"].read_bytes()
    header = json.dumps({"x": {"dtype": "F32", "shape": [1]}}).encode()
    broken = {
        "short": content[:-100],
        "empty": b"",
        "text": b"hello, this is no model",
        "odd": len(header).to_bytes(8, "little") + header,
    }
    for name, data in broken.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(data)
        with pytest.raises(ModelError, match="truncated, damaged or no safetensors file"):
            read_shapes(file)
    with pytest.raises(ModelError, match="There is no file"):
        read_shapes(tmp_path / "none.safetensors")


def test_nothing_is_overwritten_and_other_pipelines_are_refused(
    folders: dict[str, Path], files: dict[str, Path], source: Path, tmp_path: Path
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        from_single_file(files["sd1"], folders["sd1"], tmp_path / "full")
    with pytest.raises(ModelError, match="a StableDiffusionPipeline"):
        to_single_file(source, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="a StableDiffusionPipeline"):
        from_single_file(files["sd1"], source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


# -- the command line -------------------------------------------------------------------------------------------------


def test_a_file_of_another_family_as_source_is_named(tmp_path: Path, capsys):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / "flux.safetensors")
    command = ["train", "--source", str(tmp_path / "flux.safetensors"), "--target", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*command, "--preset", "sdp", "--prompt", "a prt cat", "--class-prompt", "a cat"]) == 2
    assert "looks like a Flux checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_info_says_what_a_file_is(files: dict[str, Path], tmp_path: Path, capsys):
    assert main(["info", str(files["sd1"])]) == 0
    said = capsys.readouterr().out
    numbers = sum(value.numel() for value in load_file(files["sd1"]).values())
    assert f"looks like {STABLE_DIFFUSION}" in said
    assert f"{numbers / 1e6:.1f} million numbers" in said
    assert "unidad convert single-file" in said
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "l.safetensors")
    assert main(["info", str(tmp_path / "l.safetensors")]) == 0
    assert "looks like a LoRA" in capsys.readouterr().out
    (tmp_path / "cut.safetensors").write_bytes(files["sd1"].read_bytes()[:-9])
    assert main(["info", str(tmp_path / "cut.safetensors")]) == 2
    assert "shorter than its header says" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
def test_export_as_a_single_file(
    folders: dict[str, Path], files: dict[str, Path], finished: bool, tmp_path: Path, monkeypatch, capsys
):
    """A run's student, or the newest checkpoint's, in one file: the weights are those of its folder."""
    monkeypatch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)
    (tmp_path / "photos").mkdir()
    Image.effect_noise((40, 32), 80).convert("RGB").save(tmp_path / "photos" / "a.png")
    run, out = tmp_path / "run", tmp_path / "new" / "one.safetensors"
    sets = ("cycles=1", "fake_updates=1", "sample_every=0", "tracker=none", "precision=fp32", "lr=1e-3")
    words = ["--source", str(folders["sd1"]), "--target", str(tmp_path / "photos"), "--out", str(run), "--preset", "sdp"]
    words += ["--prompt", "a prt cat", "--class-prompt", "a cat", "--device", "cpu", *(w for s in sets for w in ("--set", s))]
    assert main(["train", *words]) == 0
    to_single_file(run / "student", tmp_path / "expected.safetensors")
    if not finished:
        (run / "student").rename(tmp_path / "aside")
    assert main(["export", str(run), "--single-file", "--out", str(out)]) == 0
    ours, expected = load_file(out), load_file(tmp_path / "expected.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert not torch.equal(ours[FIRST], load_file(files["sd1"])[FIRST])
    assert sorted(p.name for p in out.parent.glob(".*")) == []
    assert main(["export", str(run), "--single-file", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
