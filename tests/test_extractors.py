"""Where weights come from and what is refused; DINOv2 and CLIP from tiny models; statistics files; the command."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import test_lpips
import torch
from PIL import Image

from unidad.cli import main
from unidad.data import load_folder
from unidad.device import MOST
from unidad.errors import ModelError, SettingsError
from unidad.metrics import weights as files
from unidad.metrics.extractors import load_extractor
from unidad.metrics.features import EfficientNetLite0, at_a_time, resized
from unidad.metrics.inception import Inception


def pictures(n: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    return test_lpips.pictures(n, seed, side)


def known(path: Path, name: str, url: str = "https://example.org/weights") -> files.WeightsFile:
    content = path.read_bytes()
    return files.WeightsFile(name, hashlib.sha256(content).hexdigest(), len(content), url)


@pytest.fixture
def two(tmp_path: Path) -> tuple[list[Path], list[files.WeightsFile]]:
    paths = [tmp_path / "given" / name for name in ("first.bin", "second.bin")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode() * 100)
    return paths, [known(path, f"{path.stem}.pth", path.as_uri()) for path in paths]


# -- weights ----------------------------------------------------------------------------------------------------------


def test_given_files_are_told_apart_by_their_hash(two):
    paths, needed = two
    assert files.find_weights(needed, paths[::-1]) == paths


def test_weights_are_looked_for_in_one_folder(two, tmp_path, monkeypatch):
    paths, needed = two
    assert files.weights_folder() == files.cache_folder() / "weights"
    monkeypatch.setenv("UNIDAD_WEIGHTS", str(tmp_path / "here"))
    with pytest.raises(ModelError) as missing:
        files.find_weights(needed[:1])
    for part in ("first.pth", needed[0].sha256, str(tmp_path / "here"), "UNIDAD_WEIGHTS", "--weights", needed[0].url):
        assert part in str(missing.value)
    with pytest.raises(ModelError) as both:
        files.find_weights(needed)
    for file in needed:
        assert file.name in str(both.value)
        assert file.sha256 in str(both.value)
    with pytest.raises(ModelError) as other:
        files.find_weights(needed, [paths[0]])
    assert "first.pth" not in str(other.value)
    assert "second.pth" in str(other.value)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "first.pth").write_bytes(paths[0].read_bytes())
    assert files.find_weights(needed, [paths[1]]) == [tmp_path / "here" / "first.pth", paths[1]]


def test_another_hash_is_refused_wherever_the_file_lies(two, tmp_path, monkeypatch):
    paths, needed = two
    with pytest.raises(ModelError, match="which is that of none"):
        files.find_weights(needed[:1], paths)
    with pytest.raises(ModelError, match="no weights file"):
        files.find_weights(needed, [tmp_path / "nowhere"])
    monkeypatch.setenv("UNIDAD_WEIGHTS", str(tmp_path))
    (tmp_path / "first.pth").write_bytes(paths[1].read_bytes())
    with pytest.raises(ModelError, match="damaged or another file"):
        files.find_weights(needed[:1])


def test_downloads_happen_when_asked_for_and_leave_nothing_wrong_behind(two, tmp_path, monkeypatch):
    paths, needed = two
    folder = tmp_path / "fetched"
    monkeypatch.setenv("UNIDAD_WEIGHTS", str(folder))
    assert files.find_weights(needed, download=True) == [folder / "first.pth", folder / "second.pth"]
    assert (folder / "second.pth").read_bytes() == paths[1].read_bytes()
    with pytest.raises(ModelError, match="another sha256"):
        files.find_weights([replace(needed[0], name="third.pth", sha256="0" * 64)], download=True)
    with pytest.raises(ModelError, match="cannot be fetched"):
        files.find_weights([replace(needed[0], name="third.pth", url=paths[0].as_uri() + ".gone")], download=True)
    assert sorted(path.name for path in folder.iterdir()) == ["first.pth", "second.pth"]


def test_names_of_published_files_begin_with_their_hash():
    for file in (files.INCEPTION, files.VGG16, files.ALEXNET):
        assert file.name.removesuffix(".pth").rpartition("-")[2] == file.sha256[:8]
        assert file.url.endswith(file.name)


@pytest.mark.parametrize(("net", "file"), [("vgg", files.LPIPS_VGG), ("alex", files.LPIPS_ALEX)])
def test_the_linear_weights_that_torchmetrics_carries_are_the_pinned_ones(net, file):
    torchmetrics = pytest.importorskip("torchmetrics")
    path = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    assert (files.sha256_of(path), path.stat().st_size) == (file.sha256, file.size)
    linear = torch.load(path, map_location="cpu", weights_only=True)
    shapes = {key: shape for key, shape in test_lpips.weight_shapes(net).items() if key.startswith("lin")}
    assert {key: tuple(value.shape) for key, value in linear.items()} == shapes


# -- extractors by name -----------------------------------------------------------------------------------------------


@pytest.fixture
def alex_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Random LPIPS weights in two files, as if they were the published ones."""
    state = test_lpips.random_state("alex")
    paths = [tmp_path / "alexnet.pth", tmp_path / "linear.pth"]
    for path, start in zip(paths, ("features.", "lin"), strict=True):
        torch.save({key: value for key, value in state.items() if key.startswith(start)}, path)
    monkeypatch.setattr(files, "ALEXNET", known(paths[0], "alexnet-owt.pth"))
    monkeypatch.setattr(files, "LPIPS_ALEX", known(paths[1], "lpips-alex.pth"))
    return paths


def test_lpips_by_name_reads_both_files(alex_files):
    extractor = load_extractor("lpips-alex", alex_files[::-1], batch_size=3)
    direct = test_lpips.Lpips("alex", test_lpips.random_state("alex"), "")
    assert torch.equal(extractor(pictures(2)), direct(pictures(2)))
    both = "\n".join(file.sha256 for file in (files.ALEXNET, files.LPIPS_ALEX))
    assert extractor.digest == hashlib.sha256(both.encode()).hexdigest()
    with pytest.raises(ModelError, match=r"'lpips-alex\.pth'"):
        load_extractor("lpips-alex", alex_files[:1])


@pytest.mark.parametrize(
    ("name", "file"), [("inception-fid", files.INCEPTION), ("lpips-vgg", files.VGG16), ("lpips-alex", files.ALEXNET)]
)
def test_without_weights_the_file_is_named(name, file):
    with pytest.raises(ModelError, match=file.sha256):
        load_extractor(name)


def test_weights_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="brings its own"):
        load_extractor("efficientnet-lite0", [tmp_path])
    with pytest.raises(SettingsError, match="takes one"):
        load_extractor("clip", ["a", "b"])


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=28, patch_size=14))
    dino.save_pretrained(folder / "tiny-dino")
    vision = {**sizes, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    text = {**sizes, "intermediate_size": 32, "vocab_size": 50}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    clip.save_pretrained(folder / "tiny-clip")
    first = transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=32, image_size=32), add_pooling_layer=False)
    first.save_pretrained(folder / "tiny-vit")
    return {"dino": folder / "tiny-vit", "dinov2": folder / "tiny-dino", "clip": folder / "tiny-clip"}


def vit_by_hand(x: torch.Tensor, w: dict[str, torch.Tensor], layers: int = 2, heads: int = 2) -> torch.Tensor:
    """A ViT as arXiv 2010.11929 has it, pre-norm, over 16x16 patches, with the last norm: pictures -> tokens [B, 1 + patches, D]."""
    import torch.nn.functional as F

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    patches = "embeddings.patch_embeddings.projection"
    tokens = F.conv2d(x, w[f"{patches}.weight"], w[f"{patches}.bias"], stride=16).flatten(2).transpose(1, 2)
    tokens = torch.cat([w["embeddings.cls_token"].expand(len(x), -1, -1), tokens], 1) + w["embeddings.position_embeddings"]
    for i in (f"layers.{n}" for n in range(layers)):
        h = norm(f"{i}.layernorm_before", tokens)
        q, k, v = (linear(f"{i}.attention.{p}_proj", h).unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv")
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        tokens = tokens + linear(f"{i}.attention.o_proj", attended.transpose(1, 2).flatten(2))
        tokens = tokens + linear(f"{i}.mlp.fc2", F.gelu(linear(f"{i}.mlp.fc1", norm(f"{i}.layernorm_after", tokens))))
    return norm("layernorm", tokens)


def test_dino_under_its_published_names(tiny_models, tmp_path):
    """facebook/dino-vits16 has a ViT's older names, and may come with a pooler that DINO never trained."""
    import safetensors.torch

    state, older = safetensors.torch.load_file(tiny_models["dino"] / "model.safetensors"), {}
    for name, value in state.items():
        for ours, theirs in {
            "attention.q_proj": "attention.attention.query",
            "attention.k_proj": "attention.attention.key",
            "attention.v_proj": "attention.attention.value",
            "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "layers.": "encoder.layer.",
        }.items():
            name = name.replace(ours, theirs)
        older[name] = value
    assert "encoder.layer.1.attention.attention.query.weight" in older
    older |= {"pooler.dense.weight": torch.ones(16, 16), "pooler.dense.bias": torch.zeros(16)}
    (tmp_path / "config.json").write_bytes((tiny_models["dino"] / "config.json").read_bytes())
    safetensors.torch.save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = load_extractor("dino", [tmp_path]), load_extractor("dino", [tiny_models["dino"]])
    assert theirs.digest == ours.digest
    assert torch.equal(theirs(pictures(2)), ours(pictures(2)))


@pytest.mark.parametrize(("family", "side", "dim"), [("dino", 32, 16), ("dinov2", 224, 16), ("clip", 32, 12)])
def test_transformers_features_are_the_models_own(tiny_models, family, side, dim):
    import transformers

    extractor = load_extractor(family, [str(tiny_models[family])], batch_size=2)
    pixels = pictures(3, side=48)
    ours = extractor(pixels)
    assert ours.shape == (3, dim)
    assert extractor.name == f"{family}:{tiny_models[family].name}"
    assert extractor.resize == f"bicubic to {side}x{side}, antialiased"
    published = {
        "dino": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    }
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in published[family])
    x = (resized(pixels, side, side) / 255 - mean) / deviation
    model = transformers.AutoModel.from_pretrained(tiny_models[family], local_files_only=True).eval()
    with torch.no_grad():
        if family == "dino":
            expected = vit_by_hand(x, model.state_dict())[:, 0]
        elif family == "dinov2":
            expected = model(pixel_values=x).pooler_output
        else:
            expected = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert len(extractor.digest) == 64


def test_transformers_digest_is_that_of_the_numbers(tiny_models, tmp_path):
    from transformers import Dinov2Model

    first = load_extractor("dinov2", [tiny_models["dinov2"]]).digest
    model = Dinov2Model.from_pretrained(tiny_models["dinov2"])
    model.save_pretrained(tmp_path / "same", max_shard_size="10KB")
    assert load_extractor("dinov2", [tmp_path / "same"]).digest == first
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    model.save_pretrained(tmp_path / "other")
    assert load_extractor("dinov2", [tmp_path / "other"]).digest != first


def test_transformers_models_of_another_kind_or_absent_are_refused(tiny_models, tmp_path, monkeypatch):
    for family in ("dino", "dinov2"):
        with pytest.raises(ModelError, match="'clip' model"):
            load_extractor(family, [tiny_models["clip"]])
    with pytest.raises(ModelError, match="'dinov2' model"):
        load_extractor("dino", [tiny_models["dinov2"]])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_extractor("clip", [tmp_path])
    import safetensors.torch

    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "config.json").write_bytes((tiny_models["dinov2"] / "config.json").read_bytes())
    state = safetensors.torch.load_file(tiny_models["dinov2"] / "model.safetensors")
    del state["layernorm.bias"]
    safetensors.torch.save_file(state, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        load_extractor("dinov2", [tmp_path / "partial"])


def test_a_hub_id_is_not_fetched_unless_asked(monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = []

    def from_pretrained(source: str, **options: object) -> None:
        asked.append((source, options["local_files_only"]))
        raise OSError("not in the cache")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    for download in (False, True):
        with pytest.raises(ModelError, match="--download"):
            load_extractor("dinov2", download=download)
    assert asked == [("facebook/dinov2-base", True), ("facebook/dinov2-base", False)]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    train = pictures(3, 5)
    for name, pixels in (("samples", test_lpips.around(train, 12)), ("reference", pictures(9, 2)), ("train", train)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pixels):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:02d}.png")
    return {name: str(tmp_path / name) for name in ("samples", "reference", "train")}


def test_the_command_scores_in_lpips_in_the_papers_mode(folders, alex_files, tmp_path, capsys):
    args = ["evaluate", folders["samples"], "--reference", folders["reference"], "--train", folders["train"]]
    args += ["--extractor", "lpips-alex", "--mode", "paper", "--json", str(tmp_path / "s.json"), "--panel", str(tmp_path / "p.png")]
    assert main([*args, "--weights", str(alex_files[0]), "--weights", str(alex_files[1])]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    samples, train = (load_folder(folders[name], 32).pixels for name in ("samples", "train"))
    ours = test_lpips.Lpips("alex", test_lpips.random_state("alex"), "")
    assert scores["intra_diversity"] == test_lpips.intra_lpips(ours, samples, train, mode="paper")[0].value
    assert (scores["mode"], scores["seed"], scores["samples"], scores["names"]["intra_diversity"]) == (
        "paper",
        None,
        12,
        "Intra-LPIPS",
    )
    assert (tmp_path / "p.png").exists()
    assert "mode: paper" in capsys.readouterr().out


def test_the_command_keeps_features_by_content_unless_told_not_to(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    args = ["evaluate", folders["samples"], "--reference", folders["reference"], "--train", folders["train"]]
    assert main([*args, "--no-cache"]) == 0
    assert not (tmp_path / "cache").exists()
    assert main(args) == 0
    kept = sorted((tmp_path / "cache" / "unidad" / "features").iterdir())
    assert len(kept) == 2  # reference and training pictures
    before = [path.stat().st_mtime_ns for path in kept]
    assert main(args) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--extractor", "inception-fid"], files.INCEPTION.sha256),
        (["--extractor", "lpips-vgg"], "add --train"),
        (["--json", "no/such/folder/s.json"], "there is no folder"),
        (["--weights", "x.pth"], "brings its own"),
    ],
)
def test_the_command_says_what_is_missing_before_it_draws(folders, capsys, more, message):
    assert main(["evaluate", folders["samples"], "--reference", folders["reference"], *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "side"),
    [(lambda: EfficientNetLite0()._network.extract_features, 224), (Inception, 299)],
    ids=["efficientnet", "inception"],
)
def test_no_layer_asks_for_more_than_the_process_keeps(network, side):
    """On a CPU, with as many pictures at a time as are usual: larger blocks come from the system and are cleared each time."""
    found = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *told: found.append(told[2].nbytes))
    with torch.inference_mode():
        network()(torch.zeros(1, 3, side, side))
    hook.remove()
    assert len(found) > 50
    assert max(found) * at_a_time("cpu") <= MOST < max(found) * at_a_time("cuda")
