"""Guided-diffusion checkpoints: the same numbers out of diffusers' network, every weight used once, both ways to the bit."""

from __future__ import annotations

import os

import adm_reference
import pytest
import torch
from diffusers import DDPMPipeline

from unidad.backbones.load import load_model
from unidad.cli import main
from unidad.convert.guided_diffusion import KNOWN
from unidad.convert.layout import from_unet, infer, pairs, to_unet

SMALL = {"widths": (32, 64, 64), "attends": (False, True, True)}
KINDS = {
    "ffhq": {},
    "new order, classes": {"classes": 7},
    "two blocks, attention nowhere": {"blocks": 2, "attends": (False, False, False)},
    "attention everywhere": {"attends": (True, True, True)},
    "plain convolutions": {"residual": False},
    "added timestep": {"scale_shift": False, "outputs": 3},
    "plain, added, classes": {"residual": False, "scale_shift": False, "classes": 3, "outputs": 3, "blocks": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_as_the_reference_and_back_to_the_bit(kind):
    weights = adm_reference.random_weights(**SMALL | KINDS[kind])
    order = "new" if "new" in kind else "legacy"
    shape = infer(weights, 32, 16)
    unet = to_unet(weights, shape, order)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 901])
    labels = torch.tensor([0, 2]) if shape.classes else None
    with torch.no_grad():
        expected = adm_reference.forward(weights, x, t, 16, order, labels)
        given = unet(x, t, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    back = from_unet(unet, order)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_the_order_of_q_k_v_matters():
    weights = adm_reference.random_weights(**SMALL)
    shape = infer(weights, 32, 16)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    with torch.no_grad():
        legacy, new = (to_unet(weights, shape, order)(x, t).sample for order in ("legacy", "new"))
    assert (legacy - new).abs().max() > 1e-2


def test_every_weight_has_exactly_one_place():
    weights = adm_reference.random_weights(**SMALL)
    unet = to_unet(weights, infer(weights, 32, 16), "legacy")
    found = pairs(infer(weights, 32, 16), unet.state_dict())
    theirs, ours = [a for a, _ in found], [b for _, names in found for b in names]
    assert sorted(theirs) == sorted(weights)
    assert sorted(ours) == sorted(unet.state_dict())


# -- files and the command line -----------------------------------------------------------------------------------------


def small(**options):
    return adm_reference.random_weights(**SMALL | options)


GIVEN = ["--head-width", "16", "--schedule", "linear", "--size", "32"]


def convert(file, out, *options) -> int:
    return main(["convert", "guided-diffusion", str(file), "--out", str(out), *(options or GIVEN)])


@pytest.mark.parametrize("nest", [(), ("ema",), ("state_dict", "model")])
def test_there_and_back_through_files(tmp_path, nest, capsys):
    weights = small(classes=5) if nest == ("ema",) else small()
    content = {f"module.{key}": value for key, value in weights.items()} if nest else weights
    for name in nest:
        content = {name: content, "step": 3}
    torch.save(content, tmp_path / "x.pt")
    order = "new" if nest else "legacy"
    assert convert(tmp_path / "x.pt", tmp_path / "model", *GIVEN, "--attention-order", order) == 0
    assert main(["convert", "to-guided-diffusion", str(tmp_path / "model"), "--out", str(tmp_path / "back.pt")]) == 0
    assert f"{order} order" in capsys.readouterr().out.splitlines()[-1]
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)
    model = load_model(tmp_path / "model")
    assert model.backbone.unet.conv_out.out_channels == 6
    assert model.backbone.num_classes == (5 if nest == ("ema",) else None)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(model.backbone.schedule.alphas_cumprod, torch.cumprod(1 - betas, 0).float(), rtol=1e-4, atol=0)


def test_averaged_weights_win_and_stock_diffusers_draws(tmp_path):
    torch.save({"model": small(seed=1), "ema": small(seed=2)}, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "model") == 0
    assert torch.equal(load_model(tmp_path / "model").backbone.unet.conv_in.weight, small(seed=2)["input_blocks.0.0.weight"])
    pipe = DDPMPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


class Malice:
    """A pickle that calls something when it is read."""

    def __init__(self, call, *words):
        self.call, self.words = call, words

    def __reduce__(self):
        return self.call, self.words


def without(*names):
    return {key: value for key, value in small().items() if not key.startswith(names)}


def plus(**extra):
    return small() | {key.replace("__", "."): value for key, value in extra.items()}


def narrow_time():
    weights = small()
    return weights | {"time_embed.0.weight": torch.zeros(128, 64)}


BAD = {
    "malice": (lambda: {"ema": Malice(print, "run by the pickle")}, "holds more than weights"),
    "malice of the system": (lambda: {"ema": Malice(os.system, "echo run by the pickle")}, "holds more than weights"),
    "malice beside weights": (
        lambda: {"ema": small(), "step": Malice(eval, "print('run by the pickle')")},
        "holds more than weights",
    ),
    "a whole module": (lambda: torch.nn.Linear(2, 2), "holds more than weights"),
    "no network": (lambda: {"conv.weight": torch.zeros(3)}, "no guided-diffusion network"),
    "a list": (lambda: [small()], "no guided-diffusion network"),
    "no tensors": (lambda: small() | {"out.0.bias": "text"}, "no guided-diffusion network"),
    "a classifier": (lambda: without("output_blocks", "out.") | {"out.2.weight": torch.zeros(6, 8)}, "0 output blocks"),
    "a piece missing": (lambda: without("input_blocks.3.0.emb_layers"), "no 'input_blocks.3.0.emb_layers.1.weight'"),
    "decoder cut": (lambda: without("output_blocks.5"), "5 output blocks for 3 resolutions"),
    "more than it needs": (lambda: plus(extra__weight=torch.zeros(3)), "such as 'extra.weight'"),
    "another shape": (lambda: plus(out__0__bias=torch.zeros(31)), "'out.0.bias' is [31], where [32] is needed"),
    "six channels": (lambda: plus(input_blocks__0__0__weight=torch.zeros(32, 6, 3, 3)), "super-resolution"),
    "half first level": (narrow_time, "timestep embedding has 64 channels"),
    "odd widths": (lambda: small(widths=(32, 48, 64)), "not multiples of 32"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, kind, capfd):
    make, words = BAD[kind]
    torch.save(make(), tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "model") == 2
    said = capfd.readouterr()
    assert words in said.err
    assert "run by the pickle" not in said.out
    assert said.err.count("\n") == 1
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_and_foreign_files(tmp_path, legacy, capsys):
    torch.save(small(), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "x.pt").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint"):
        (tmp_path / "x.pt").write_bytes(content)
        assert convert(tmp_path / "x.pt", tmp_path / "model") == 2
        assert "is truncated, damaged or no torch checkpoint" in capsys.readouterr().err
    assert convert(tmp_path / "absent.pt", tmp_path / "model") == 2
    assert not (tmp_path / "model").exists()


def test_what_weights_do_not_tell_is_asked_for(tmp_path, capsys):
    torch.save(small(classes=4), tmp_path / "x.pt")
    for options, words in (
        (["--size", "32"], "give --head-width, --schedule"),
        (["--arch", "ffhq256"], "it is not ffhq256: its widths are (32, 64, 64)"),
        (["--arch", "imagenet128"], "4 attention heads at every resolution"),
        (["--arch", "ffhq255"], "Did you mean 'ffhq256'"),
        ([*GIVEN, "--unconditional"], "class-conditional (4 classes)"),
        ([*GIVEN[:4], "--size", "30"], "give another --size"),
        (["--head-width", "48", *GIVEN[2:]], "give another --head-width"),
    ):
        assert convert(tmp_path / "x.pt", tmp_path / "model", *options) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert convert(tmp_path / "x.pt", tmp_path / "full") == 2
    assert main(["convert", "to-guided-diffusion", "bundled:avatars", "--out", str(tmp_path / "y.pt")]) == 2
    assert "which guided-diffusion's network does not have" in capsys.readouterr().err
    assert main(["convert", "to-guided-diffusion", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2


def test_the_published_shapes_are_expressible():
    """The weights' names and shapes that each row of the table implies, put through and counted; nothing is allocated."""
    for name, known in KNOWN.items():
        attends = tuple(known.unsaid.size // 2**i in known.attended for i in range(len(known.widths)))
        with torch.device("meta"):
            weights = adm_reference.random_weights(known.widths, attends, known.blocks, classes=known.classes)
        shape = infer(weights, known.unsaid.size, known.unsaid.head_width)
        unet = to_unet(weights, shape, known.unsaid.attention_order)
        assert sum(p.numel() for p in unet.parameters()) == sum(w.numel() for w in weights.values()), name
