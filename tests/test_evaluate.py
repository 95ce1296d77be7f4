from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from unidad.data import picture_grid
from unidad.errors import DataError, SettingsError, UserError
from unidad.metrics import features as f
from unidad.metrics.distances import frechet_distance, kernel_distance, prdc
from unidad.metrics.evaluate import evaluate, nearest_panel, table
from unidad.metrics.extractors import load_extractor


def pictures(n: int, seed: int = 0, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


class Flat:
    """The pictures' own numbers as features, and a count of the pictures it was asked for."""

    def __init__(self, name: str = "flat", digest: str = "ab" * 32):
        self.name, self.digest, self.resize, self.seen = name, digest, "none", 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return pixels.flatten(1)[:, :12].float() / 255


@pytest.fixture(scope="module")
def lite0() -> f.Extractor:
    return load_extractor("efficientnet-lite0", size=64)


# -- the network ------------------------------------------------------------------------------------------------------


def test_lite0_gives_1280_numbers_whatever_the_batching(lite0):
    pixels = pictures(5, side=32)
    whole = lite0(pixels)
    assert whole.shape == (5, 1280)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert 0 <= float(whole.min()) < float(whole.max()) <= 6
    one_by_one = torch.cat([lite0(picture[None]) for picture in pixels])
    torch.testing.assert_close(one_by_one, whole, rtol=1e-4, atol=1e-4)
    (whole * torch.ones(1, requires_grad=True)).sum().backward()  # usable in autograd, though made in inference mode


def test_lite0_is_named_after_its_size_and_weights(lite0):
    assert lite0.name == "efficientnet-lite0-64"
    assert lite0.digest.startswith("57934424")  # the weights' file carries its own sha256 in its name


def test_lite0_normalises_as_it_was_trained():
    extractor = load_extractor()
    assert extractor.name == "efficientnet-lite0"
    for level, value in ((127, 0.0), (255, 1.0)):
        pixels = torch.full((1, 3, 32, 32), level, dtype=torch.uint8)
        expected = extractor._network.extract_features(torch.full((1, 3, 224, 224), value)).mean(dim=(2, 3))
        torch.testing.assert_close(extractor(pixels), expected, rtol=1e-4, atol=1e-4)


def test_unknown_extractors_and_sizes_are_refused():
    with pytest.raises(SettingsError, match="Did you mean 'efficientnet-lite0'"):
        load_extractor("efficientnet-lite")
    with pytest.raises(SettingsError, match="multiple of 32"):
        load_extractor(size=100)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), pictures(2)[:, :1], pictures(2)[0], pictures(2)[:0]])
def test_pixels_of_another_kind_are_refused(bad):
    with pytest.raises(DataError, match="uint8"):
        f.features_of(Flat(), bad)


def test_resizing_agrees_with_pillow():
    pixels = pictures(1, side=32) // 2 + 64  # no extremes: Pillow clips between its two passes, torch after both
    for side in (12, 48):
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        ours = f.resized(pixels, side, side)[0].permute(1, 2, 0)
        assert float((ours - torch.tensor(list(image.tobytes())).view(side, side, 3)).abs().max()) <= 1.5


# -- the cache --------------------------------------------------------------------------------------------------------


def test_cache_returns_the_identical_matrix_without_the_network(tmp_path):
    extractor, pixels = Flat(), pictures(6)
    first = f.features_of(extractor, pixels, tmp_path / "new" / "cache")
    again = f.features_of(extractor, pixels.clone(), tmp_path / "new" / "cache")
    assert extractor.seen == 6
    assert torch.equal(first, again)
    assert torch.equal(first, f.features_of(extractor, pixels))
    assert [p.suffix for p in (tmp_path / "new" / "cache").iterdir()] == [".safetensors"]


def test_cache_key_changes_with_all_that_features_depend_on():
    pixels = pictures(6)
    changed, reordered, reshaped = pixels.clone(), pixels.flip(0), pixels.reshape(6, 3, 4, 16)
    changed[5, 2, 7, 7] ^= 1
    keys = {f.cache_key(Flat(), p) for p in (pixels, changed, reordered, reshaped, pixels[:5])}
    keys |= {f.cache_key(Flat(name="other"), pixels), f.cache_key(Flat(digest="cd" * 32), pixels)}
    assert len(keys) == 7
    assert f.cache_key(Flat(), pixels.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)) == f.cache_key(Flat(), pixels)


def test_damaged_cache_file_is_made_anew(tmp_path):
    extractor, pixels = Flat(name="with/slash"), pictures(6)
    first = f.features_of(extractor, pixels, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(f.features_of(extractor, pixels, tmp_path), first)
    assert extractor.seen == 12
    f.features_of(extractor, pixels, tmp_path)
    assert extractor.seen == 12


def test_cache_folder_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        f.features_of(Flat(), pictures(2), tmp_path / "file")


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_returns_the_distances_and_their_facts(tmp_path):
    samples, reference, train = pictures(40, 1), pictures(50, 2), pictures(4, 3)
    extractor = Flat()
    scores = evaluate(samples, reference, train, extractor, n=30, cache_dir=tmp_path)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    real, fake = extractor(reference), extractor(samples[:30])
    assert scores["frechet_distance"] == frechet_distance(real, fake)
    assert scores["kernel_distance"] == kernel_distance(real, fake)
    assert {key: scores[key] for key in ("precision", "recall", "density", "coverage")} == prdc(real, fake)
    facts = {"extractor": "flat", "digest": "ab" * 32, "samples": 30, "reference": 50, "train": 4, "heldout": 50, "mode": "correct"}
    assert {key: scores[key] for key in facts} == facts
    assert len(scores["nearest"]["index"]) == 30
    assert len(list(tmp_path.iterdir())) == 2  # reference and training set, not the samples


def test_evaluate_finds_copies_and_does_not_take_training_pictures_for_held_out():
    train = pictures(4, 3)
    reference = torch.cat([train, pictures(50, 2)])
    scores = evaluate(train.repeat(5, 1, 1, 1), reference, train, Flat())
    assert scores["heldout"] == 50
    assert scores["copying"] == 1.0
    assert scores["copying_threshold"] > 0
    assert scores["intra_diversity"] == 0.0
    honest = evaluate(pictures(40, 1), reference, train, Flat())
    assert honest["copying"] < 0.3
    assert honest["intra_diversity"] > 0


def test_evaluate_without_what_some_scores_need():
    few = evaluate(pictures(5, 1), pictures(40, 2), None, Flat())
    assert few["precision"] is None
    assert few["copying"] is None
    assert few["nearest"] is None
    assert math.isfinite(few["frechet_distance"])
    same = pictures(10, 2)
    no_heldout = evaluate(pictures(20, 1), same, same, Flat())
    assert (no_heldout["heldout"], no_heldout["copying"], len(no_heldout["nearest"]["index"])) == (0, None, 20)
    alone = evaluate(pictures(2, 1), pictures(10, 2), pictures(50, 3), Flat())
    json.dumps(alone, allow_nan=False)
    for scores in (few, no_heldout, alone):
        assert scores.keys() == few.keys()
        assert "-" in table(scores)
    assert "more than 5 pictures" in table(few)
    assert "--train FOLDER" in table(few)
    assert "held-out pictures in --reference" in table(no_heldout)


def test_the_table_warns_of_few_pictures():
    few, many = (table(evaluate(pictures(n, 1), pictures(n, 2), pictures(9, 3), Flat())) for n in (499, 500))
    assert "fewer than 500" in few
    assert "fewer than 500" not in many


def test_evaluate_in_the_papers_mode_scores_small_clusters_0():
    bright, black = pictures(33, 1) // 2 + 128, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    samples, train = bright[:30], torch.cat([bright[30:], black])
    correct, paper = (evaluate(samples, pictures(40, 2), train, Flat(), mode=mode) for mode in ("correct", "paper"))
    assert correct["intra_small"] == 1
    assert paper["intra_diversity"] == pytest.approx(correct["intra_diversity"] * 3 / 4)
    assert "left out" in table(correct)
    assert "scored 0" in table(paper)


@pytest.mark.parametrize(
    ("n_samples", "n_reference", "n", "message"), [(1, 9, None, "'samples'"), (9, 1, None, "'reference'"), (9, 9, 10, "only 9")]
)
def test_evaluate_refuses_too_few_pictures(n_samples, n_reference, n, message):
    with pytest.raises(DataError, match=message):
        evaluate(pictures(n_samples), pictures(n_reference), None, Flat(), n=n)


def test_table_shows_every_score_in_plain_text():
    scores = evaluate(pictures(40, 1), pictures(50, 2), pictures(4, 3), Flat())
    text = table(scores)
    assert text.isascii()
    for key in ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "intra_diversity", "copying"):
        assert format(scores[key], ".4f") in text
    assert "flat (abababab)" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_lite0_scores_a_shifted_set_worse(lite0):
    reference, near = pictures(12, 1, side=16), pictures(12, 2, side=16)
    far = (near // 4).contiguous()
    scores = [evaluate(samples, reference, None, lite0) for samples in (near, far)]
    assert scores[0]["frechet_distance"] < scores[1]["frechet_distance"]
    assert scores[0]["kernel_distance"] < scores[1]["kernel_distance"]


# -- the panel --------------------------------------------------------------------------------------------------------


def test_panel_puts_the_closest_samples_above_their_neighbours():
    samples, train = pictures(4, 1), pictures(3, 2)
    nearest = {"index": [2, 0, 1, 2], "distance": [0.3, 0.1, 0.9, 0.2]}
    panel = nearest_panel(samples, train, nearest, count=3, scale=1)
    expected = picture_grid(torch.cat([samples[[1, 3, 0]], train[[0, 2, 2]]]), columns=3)
    assert panel.tobytes() == expected.tobytes()
    assert nearest_panel(samples, pictures(3, 2, side=20), nearest, scale=1).size == (4 * 10 - 2, 2 * 10 - 2)


@pytest.mark.parametrize(
    "nearest", [{"index": [3], "distance": [0.1]}, {"index": [0] * 5, "distance": [0.1] * 5}, {"index": [], "distance": []}]
)
def test_panel_refuses_neighbours_of_other_pictures(nearest):
    with pytest.raises(DataError, match="are not those"):
        nearest_panel(pictures(4), pictures(3), nearest)
