"""Statistics files (.npz) that stand for the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_extractors import pictures

from unidad.errors import DataError
from unidad.metrics.distances import frechet_distance, kernel_distance, prdc
from unidad.metrics.evaluate import evaluate, score_names, table
from unidad.metrics.reference import load_statistics


class Flat:
    """The pictures' own first numbers as features."""

    name, digest, resize = "inception-fid", "ab" * 32, "none"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :12].float() / 255


def test_statistics_files_stand_for_the_reference(tmp_path):
    samples, reference, train = pictures(40, 1), pictures(50, 2), pictures(4, 3)
    real, fake = Flat()(reference), Flat()(samples)
    moments = {"mu": real.mean(0).numpy(), "sigma": np.cov(real.numpy(), rowvar=False)}
    np.savez(tmp_path / "fid.npz", **moments)
    np.savez_compressed(tmp_path / "act.npz", act=real.numpy(), **moments)
    bare = evaluate(samples, load_statistics(tmp_path / "fid.npz"), train, Flat())
    assert bare["frechet_distance"] == pytest.approx(frechet_distance(real, fake), rel=1e-4)
    assert (bare["reference"], bare["kernel_distance"], bare["precision"], bare["copying"]) == (None, None, None, None)
    assert bare["intra_diversity"] > 0
    whole = evaluate(samples, load_statistics(tmp_path / "act.npz"), train, Flat())
    assert whole["reference"] == 50
    assert whole["frechet_distance"] == pytest.approx(bare["frechet_distance"])
    assert whole["kernel_distance"] == pytest.approx(kernel_distance(real, fake))
    assert {key: whole[key] for key in ("precision", "recall")} == {k: v for k, v in prdc(real, fake, 5).items() if k[0] in "pr"}
    assert "statistics of the reference" in table(bare)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "does not hold"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "does not hold"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "act": np.zeros((9, 4))}, "'act'"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "cannot be read"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "the extractor makes 12"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=message):
        evaluate(pictures(9), load_statistics(tmp_path / "s.npz"), None, Flat())


def test_statistics_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04" + bytes(40))
    for name, message in (("text.npz", "cannot be read"), ("cut.npz", "cannot be read"), ("absent.npz", "no statistics file")):
        with pytest.raises(DataError, match=message) as refused:
            load_statistics(tmp_path / name)
        assert "pickle" not in str(refused.value), "numpy's text tells how to load it unsafely"


def test_only_inception_makes_a_frechet_distance_an_fid():
    assert score_names("inception-fid")["frechet_distance"] == "FID"
    assert score_names("inception-fid")["kernel_distance"] == "KID"
    for name in ("efficientnet-lite0", "dinov2:base", "clip:x", "lpips-vgg"):
        assert not {"FID", "KID"} & set(score_names(name).values())
    assert score_names("lpips-vgg")["intra_diversity"] == "Intra-LPIPS"
