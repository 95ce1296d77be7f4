"""SDXL as a source, from end to end on a tiny random pipeline with two text encoders and added conditions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sd
import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from test_sdp import floats, settings, tensors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unidad.adapt import build_method, train
from unidad.architectures import TEXT_UNETS, text_unet
from unidad.backbones import load_text
from unidad.backbones.lora import LoraRole
from unidad.backbones.unet2d_cond import TIME_IDS
from unidad.commands import export_run, load_product, sample_to_folder
from unidad.errors import ModelError, SettingsError
from unidad.ingredients_text import gather_text
from unidad.plan import plan
from unidad.run import RunFolder

CPU = torch.device("cpu")
PROMPTS = ["a prt cat", "a prt cat on the dog"]
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([500, 600])


def random_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,  # groups of one channel would take away what time and sizes add
        attention_head_dim=(1, 2),
        cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + TIME_IDS * 8,
    ).eval()


def write_sdxl(folder: Path, force_zeros: bool = True) -> Path:
    tokenizer = sd.write_tokenizer(folder.with_name(f"{folder.name}-words"))
    torch.manual_seed(100)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.13025,
        force_upcast=True,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )

    def text(width: int, kind: type) -> torch.nn.Module:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return kind(CLIPTextConfig(vocab_size=tokenizer.vocab_size, projection_dim=16, **sizes, **ends)).eval()

    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text(16, CLIPTextModel),
        text_encoder_2=text(24, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=random_unet(),
        scheduler=sd.scheduler(),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def stock(folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: StableDiffusionXLPipeline, prompt: str, **call: object) -> torch.Tensor:
    """[2, 3, 16, 16] in [0, 1], seeds 5 and 6."""
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pictures = pipe([prompt] * 2, generator=seeds, output_type="np", guidance_scale=1.0, **call).images
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(autouse=True, scope="module")
def _no_report():
    """Most of a tiny run's time goes into its report, which is the other track's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unidad.ingredients_text.write_report", lambda *_args, **_counts: None)
        yield


@pytest.fixture(scope="module", params=[0, 2], ids=["whole", "lora"])
def rank(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def run(folder: Path, rank: int, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    s = settings(folder, lora_rank=rank, lr=1e-2, fake_updates=1, sample_every=1)
    return train(picture_folder, tmp_path_factory.mktemp("runs") / "cat", s)


# -- what the network is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_zeros", [True, False])
def test_prompts_are_encoded_as_the_pipeline_does(tmp_path: Path, force_zeros: bool):
    folder = write_sdxl(tmp_path / "m", force_zeros)
    net, pipe = load_text.load_text_model(folder).backbone, stock(folder)
    net.set_prompts(load_text.encode_prompts(folder, [*PROMPTS, ""]))
    told = net._condition(torch.arange(3))
    with torch.no_grad():
        theirs, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    assert torch.allclose(told["encoder_hidden_states"], torch.cat([theirs, empty[:1]]), atol=1e-6)
    assert torch.allclose(told["added_cond_kwargs"]["text_embeds"], torch.cat([pooled, empty_pooled[:1]]), atol=1e-6)
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    assert bool(told["encoder_hidden_states"][-1].any()) != force_zeros
    assert bool(load_text.encode_prompts(folder, ["", "a cat"])[0, :-1].any()), "a prompt of one's own is never zeros"


def test_added_conditions_reach_the_network(folder: Path):
    net = load_text.load_text_model(folder).backbone
    table = load_text.encode_prompts(folder, [*PROMPTS, ""])
    net.set_prompts(table)
    labels = torch.tensor([0, 1])

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [net.x0(X, T, labels), *net.features(X, T, labels)]

    before = outputs()
    for place in (0, -1, -3):  # the pooled embedding; sizes
        changed = table.clone()
        changed[0, -1, place] += 5
        net.set_prompts(changed)
        for old, new in zip(before, outputs(), strict=True):
            assert not torch.allclose(old[0], new[0], atol=1e-5)
            assert torch.equal(old[1], new[1]), "the other picture keeps its own"
    with torch.no_grad():
        told = {"text_embeds": table[:2, -1, :16], "time_ids": table[:2, -1, -6:]}
        raw = net.unet(X, T, table[:2, :-1], added_cond_kwargs=told).sample
    net.set_prompts(table)
    alpha, sigma = net.schedule.alpha_sigma(T)
    assert torch.allclose(net.x0(X, T, labels), (X - sigma * raw) / alpha, rtol=1e-4, atol=1e-4)


def test_every_phase_tells_every_network_prompts_with_their_added_conditions(
    folder: Path, rank: int, picture_folder: Path, tmp_path: Path
):
    (tmp_path / "own.txt").write_text("a {} on the dog\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "00.png").symlink_to(picture_folder / "00.png")
    (photos / "00.txt").write_text("the prt cat")
    s = settings(folder, lora_rank=rank, prompts=str(tmp_path / "own.txt"))
    parts = gather_text(s, photos)
    method = build_method(s, parts, CPU, torch.Generator().manual_seed(0))
    row = {
        text: load_text.encode_prompts(folder, [text, "x"])[0] for text in ("a cat", "a cat on the dog", *PROMPTS, "the prt cat")
    }
    row["empty"] = load_text.encode_prompts(folder, [""])[0]
    seen: dict[str, set[str]] = {}
    for name, asked in ((n, net.told) for n, net in method.networks.items() if n != "heads"):

        def note(rows: torch.Tensor, name: str = name, asked=asked) -> dict:
            found = [next(text for text, known in row.items() if torch.allclose(known, one, atol=1e-5)) for one in rows]
            seen.setdefault(name, set()).update(found)
            return asked(rows)

        method.networks[name].told = note
    for _ in range(5):
        for phase in method.phases:
            pictures, labels, _ = parts.stream(s, CPU).batch(1)
            phase.loss(pictures, labels)
    assert seen["student"] == set(PROMPTS)
    assert seen["source_teacher"] == {"a cat", "a cat on the dog", "empty"}
    assert seen["fake_teacher"] == set(PROMPTS)
    assert seen["target_teacher"] == {*PROMPTS, "the prt cat", "empty"}


def test_fresh_lora_roles_are_the_base_to_the_bit(folder: Path):
    base, labels = load_text.load_text_model(folder).backbone, torch.tensor([0, 1])
    table = load_text.encode_prompts(folder, [*PROMPTS, ""])
    base.set_prompts(table)
    with torch.no_grad():
        expected = [base.x0(X, T, labels), *base.features(X, T, labels, "layer")]
        for role in ("student", "fake_teacher", "target_teacher", "source_teacher"):
            net = LoraRole(base, role, 0 if role == "source_teacher" else 2, table)
            for ours, theirs in zip([net.x0(X, T, labels), *net.features(X, T, labels, "layer")], expected, strict=True):
                assert torch.equal(ours, theirs)


# -- a run, and what it leaves ----------------------------------------------------------------------------------------


def test_a_run_trains_three_networks_and_draws_grids(run: RunFolder, rank: int, folder: Path):
    start, saved = load_text.load_text_model(folder).backbone.state_dict(), tensors(run)
    for name in ("student", "fake_teacher", "target_teacher"):
        trained = saved[f"network.{name}"]
        if rank:
            assert all(value.abs().sum() > 0 for value in trained.values())
        else:
            assert trained.keys() == start.keys()
            assert any(not torch.equal(trained[key], start[key]) for key in start)
    assert len(list((run.path / "samples").glob("*.png"))) >= 2
    assert run.read()["hashes"]["text_encoder"] == load_text.load_text_model(folder).parts[1]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2], indirect=True, ids=["whole", "lora"], scope="module")
def test_a_stopped_run_goes_on_to_the_same_bits(
    run: RunFolder, rank: int, folder: Path, picture_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("unidad.adapt.finish", lambda *_: None)  # the checkpoints are compared
    values = {"lora_rank": rank, "lr": 1e-2, "fake_updates": 1}
    train(picture_folder, tmp_path / "again", settings(folder, cycles=1, **values))
    again = train(picture_folder, tmp_path / "again", settings(folder, **values), resume=True)
    whole, resumed = tensors(run), tensors(again)
    assert whole.keys() == resumed.keys()
    for group in whole:
        for key, value in whole[group].items():
            assert torch.equal(value, resumed[group][key]), (group, key)


def test_the_stock_pipeline_alone_draws_what_we_draw(run: RunFolder, tmp_path: Path):
    pipe, model = stock(run.student), load_text.load_text_model(run.student)
    one = torch.stack([drawn(pipe, prompt, num_inference_steps=1) for prompt in PROMPTS])
    two = torch.stack([drawn(pipe, prompt, timesteps=[999, 399]) for prompt in PROMPTS])
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert (model.student_steps, model.prompt) == ([999], "a prt cat")
    assert (one - floats(model, PROMPTS, [999])).abs().max() < 1e-5
    assert (two - floats(model, PROMPTS, [999, 399])).abs().max() < 1e-5
    assert (one - two).abs().max() > 1e-3
    assert (one[0] - one[1]).abs().max() > 1e-5
    grid = sample_to_folder(run.path, 2, tmp_path / "drawn", seed=5, batch_size=1, device="cpu", prompts=PROMPTS)
    for row in range(2):
        for i in range(2):
            with Image.open(grid.parent / f"{row:02d}-{5 + i:06d}.png") as picture:
                ours = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            assert (ours - one[row, i] * 255).abs().max() <= 0.51
    card = (run.student / "README.md").read_text()
    assert "StableDiffusionXLPipeline.from_pretrained(" in card
    assert "pipe('a prt cat', num_inference_steps=1, guidance_scale=1.0)" in card


def test_a_many_step_model_names_its_own_pipeline(folder: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="StableDiffusionXLPipeline"):
        sample_to_folder(str(folder), 1, tmp_path / "x", device="cpu", prompts=["a cat"])


def test_export_of_a_run_that_has_not_finished(run: RunFolder, tmp_path: Path):
    finished, aside = load_product(run.path), run.student.rename(tmp_path / "aside")
    try:
        out = export_run(str(run.path), tmp_path / "exported", half=True)
    finally:
        aside.rename(run.student)
    again = load_text.load_text_model(out)
    for key, value in finished.backbone.state_dict().items():
        assert torch.equal(value.half().float(), again.backbone.state_dict()[key])


def test_the_lora_file_on_the_source_draws_what_the_merged_student_draws(run: RunFolder, rank: int, folder: Path):
    assert (run.path / "lora").exists() == bool(rank)
    if not rank:
        return
    pipe = stock(folder)
    pipe.scheduler = LCMScheduler.from_pretrained(run.path / "lora", subfolder="scheduler")
    bare = drawn(pipe, "a prt cat", num_inference_steps=1)
    pipe.load_lora_weights(run.path / "lora")
    with_lora, merged = (drawn(p, "a prt cat", num_inference_steps=1) for p in (pipe, stock(run.student)))
    assert (with_lora - merged).abs().max() < 1e-4
    assert (bare - merged).abs().max() > 1e-3
    assert "StableDiffusionXLPipeline" in (run.path / "lora" / "README.md").read_text()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"projection_class_embeddings_input_dim": None}, "as SDXL's does"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "shifts its latents"),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_relatives_of_sdxl_are_refused_by_name(folder: Path, tmp_path: Path, file: str, changes: dict, words: str):
    from test_load_text import edited

    with pytest.raises(ModelError, match=words):
        load_text.load_text_model(edited(folder, tmp_path / "m", file, **changes))


def test_a_pipeline_without_its_second_encoder_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "m").mkdir()
    for part in folder.iterdir():
        if part.name != "text_encoder_2":
            (tmp_path / "m" / part.name).symlink_to(part)
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_2"]
    with pytest.raises(ModelError, match="has no text_encoder_2"):
        load_text.load_text_model(tmp_path / "m")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2], indirect=True, ids=["whole", "lora"], scope="module")
def test_the_plan_knows_sdxl_by_folder_and_by_name(folder: Path, rank: int, tmp_path: Path):
    unet = text_unet(TEXT_UNETS["sdxl"]).unet
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684  # of the published base model
    for file in ("model_index.json", "unet/config.json"):  # no weights are read
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    found = plan(settings(tmp_path, lora_rank=rank))
    net = load_text.load_text_model(folder).backbone
    whole = 4 * sum(p.numel() for p in net.parameters())
    role = 4 * sum(p.numel() for p in LoraRole(net, "student", rank, net.prompts).parameters()) if rank else whole
    told = 4 * 2 * 78 * 40
    assert found.weights["student"] == role + told
    assert found.weights["source_teacher"] == (0 if rank else whole) + told
    assert found.weights.get("base") == (whole if rank else None)
    assert found.optimizer == 2 * (3 * role + found.weights["heads"])
    assert min(found.activations.values()) > 0
