from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unidad.metrics import distances as d


def features(n: int, dim: int = 16, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))  # correlated, as features are
    return torch.randn(n, dim, generator=generator) @ mix * scale + shift


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.double().mean(dim=0), torch.cov(x.double().T)


# -- Frechet distance -------------------------------------------------------------------------------------------------


def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = features(300), features(200, seed=1, shift=0.5, scale=1.3)
    expected = float(fid._compute_fid(*moments(a), *moments(b)))
    assert d.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert d.frechet_distance_from_moments(*moments(a), *moments(b)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("n", "m"), [(10, 200), (200, 10), (10, 12), (2, 2), (48, 48)])
def test_frechet_with_fewer_pictures_than_features_agrees_with_the_moments(n, m):
    a, b = features(n, dim=48), features(m, dim=48, seed=1, shift=0.5)
    from_moments = d.frechet_distance_from_moments(*moments(a), *moments(b))
    assert d.frechet_distance(a, b) == pytest.approx(from_moments, rel=1e-5)


def test_frechet_closed_forms():
    a = features(400)
    assert d.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert d.frechet_distance(a[:5], a[:5]) == pytest.approx(0.0, abs=1e-9)
    assert d.frechet_distance(a, a.double() + 0.5) == pytest.approx(16 * 0.25, rel=1e-6)
    # scaling about the mean by c adds (c - 1)^2 tr S
    mean, cov = moments(a)
    assert d.frechet_distance(a, (a.double() - mean) * 3 + mean) == pytest.approx(4 * float(cov.trace()), rel=1e-6)
    sigma_1, sigma_2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 0.0]))
    by_hand = 25 + (1 - 3) ** 2 + (2 - 0) ** 2
    assert d.frechet_distance_from_moments(torch.zeros(2), sigma_1, torch.tensor([3.0, 4.0]), sigma_2) == pytest.approx(by_hand)


def test_frechet_is_symmetric_and_unmoved_by_rotation_and_order():
    a, b = features(100), features(60, seed=1, shift=1.0)
    value = d.frechet_distance(a, b)
    q = torch.linalg.qr(features(16).double()).Q
    assert d.frechet_distance(b, a) == pytest.approx(value, rel=1e-9)
    assert d.frechet_distance(a.double() @ q, b.double() @ q) == pytest.approx(value, rel=1e-9)
    assert d.frechet_distance(a.flip(0), b.numpy()) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("bad", [torch.zeros(1, 16), torch.zeros(4), torch.zeros(4, 15), torch.full((4, 16), float("nan"))])
def test_frechet_refuses_what_does_not_fit(bad):
    with pytest.raises(ValueError, match=r"matrix|finite|extractor"):
        d.frechet_distance(features(10), bad)


def test_moments_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="covariances"):
        d.frechet_distance_from_moments(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))


# -- kernel distance --------------------------------------------------------------------------------------------------


def test_kernel_distance_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = features(150), features(150, seed=1, shift=0.5)
    expected = float(kid.poly_mmd(a.double(), b.double()))
    assert d.kernel_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_by_hand_with_sets_of_unequal_size():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    # k(x, y) = (xy + 1)^3; within a: k(0,1) = 1; within b: k(1,2) = 27, k(1,0) = k(2,0) = 1; across: 1,1,1 and 8,27,1
    assert d.kernel_distance(a, b) == pytest.approx(1 + 29 / 3 - 2 * 39 / 6)


def test_kernel_distance_is_unbiased_and_does_not_depend_on_the_tiling(monkeypatch):
    pairs = [d.kernel_distance(features(30, seed=s, scale=0.2), features(30, seed=1000 + s, scale=0.2)) for s in range(100)]
    assert abs(np.mean(pairs)) < 4 * np.std(pairs) / 10
    assert min(pairs) < 0 < max(pairs)
    a, b = features(50), features(40, seed=1)
    whole = d.kernel_distance(a, b)
    monkeypatch.setattr(d, "ROWS", 7)
    assert d.kernel_distance(a, b) == pytest.approx(whole, rel=1e-9)


def test_kernel_distance_subsets():
    a, b = features(60), features(60, seed=1, shift=0.5)
    first = d.kernel_distance_subsets(a, b, subsets=20, size=30, seed=3)
    assert first == d.kernel_distance_subsets(a, b, subsets=20, size=30, seed=3)
    assert first != d.kernel_distance_subsets(a, b, subsets=20, size=30, seed=4)
    full = d.kernel_distance(a, b)
    assert abs(first[0] - full) < 3 * first[1]
    assert d.kernel_distance_subsets(a, b, subsets=2, size=60) == (pytest.approx(full), pytest.approx(0.0, abs=1e-6))
    for wrong in ({"size": 61}, {"size": 1}, {"size": 30, "subsets": 0}):
        with pytest.raises(ValueError, match=r"at least|N >="):
            d.kernel_distance_subsets(a, b, **wrong)


# -- neighbours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_agrees_with_the_prdc_package(k):
    package = pytest.importorskip("prdc")
    a, b = features(150, dim=6).double(), features(120, dim=6, seed=1, shift=0.7).double()
    expected = package.compute_prdc(a.numpy(), b.numpy(), nearest_k=k)
    assert d.prdc(a, b, k) == {name: pytest.approx(float(value), rel=1e-9) for name, value in expected.items()}
    assert 0 < expected["precision"] < 1


def test_prdc_extremes_and_tiling(monkeypatch):
    a = features(60)
    assert d.prdc(a, a) == {"precision": 1, "recall": 1, "density": pytest.approx(1, abs=0.5), "coverage": 1}
    assert d.prdc(a, a + 1e4) == dict.fromkeys(("precision", "recall", "density", "coverage"), 0)
    # every fake on one real picture: precise, dense, but it covers little and recalls nothing of the rest
    collapsed = d.prdc(a, a[:1] + 1e-3 * features(60, seed=5))
    assert collapsed["precision"] == 1
    assert collapsed["coverage"] < 0.5
    assert collapsed["recall"] < 0.1
    b = features(40, seed=1, shift=0.3)
    whole = d.prdc(a, b)
    monkeypatch.setattr(d, "ROWS", 7)
    assert d.prdc(a, b) == whole


def test_prdc_refuses_too_few_pictures():
    with pytest.raises(ValueError, match="N >= 6"):
        d.prdc(features(5), features(20))
    with pytest.raises(ValueError, match="k must"):
        d.prdc(features(20), features(20), k=0)


def test_nearest_agrees_with_cdist_far_from_the_origin(monkeypatch):
    monkeypatch.setattr(d, "ROWS", 7)
    a, b = features(50).double() + 1e4, features(30, seed=1).double() + 1e4
    found = d.nearest(a, b)
    distance, index = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.distance, distance, rtol=1e-12, atol=0)
    assert torch.equal(d.nearest(b, b).distance, torch.zeros(30, dtype=torch.float64))


# -- few-shot scores --------------------------------------------------------------------------------------------------


TARGETS = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
TWO_CLUSTERS = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 1.0], [100.0, 0.0], [102.0, 0.0]])
# squared distances: 25 in the first cluster; 1, 5 and 4 in the second; none in the third
FIRST, SECOND = 25.0, 10 / 3


def test_intra_diversity_by_hand_in_both_modes():
    correct = d.intra_diversity(TWO_CLUSTERS, TARGETS)
    assert (correct.clusters, correct.small) == (2, 1)
    assert correct.value == pytest.approx((FIRST + SECOND) / 2)
    paper = d.intra_diversity(TWO_CLUSTERS, TARGETS, mode="paper")
    assert (paper.clusters, paper.small) == (3, 1)
    assert paper.value == pytest.approx((FIRST + SECOND) / 3)


def test_intra_diversity_of_a_lone_member_counts_as_small():
    fake = torch.cat([TWO_CLUSTERS, torch.tensor([[0.0, 99.0]])])
    assert d.intra_diversity(fake, TARGETS) == d.intra_diversity(TWO_CLUSTERS, TARGETS)


def test_intra_diversity_takes_the_first_members_only():
    assert d.intra_diversity(TWO_CLUSTERS, TARGETS, max_per_cluster=2).value == pytest.approx((25 + 1) / 2)


def test_intra_diversity_equals_pair_by_pair_distances():
    fake, targets = features(200, dim=8), features(4, dim=8, seed=1)
    index = torch.cdist(fake, targets).argmin(dim=1)
    per_cluster = [torch.pdist(fake[index == c].double()).square().mean() for c in range(4) if int((index == c).sum()) > 1]
    assert d.intra_diversity(fake, targets, max_per_cluster=200).value == pytest.approx(
        float(torch.stack(per_cluster).mean()), rel=1e-6
    )


def test_intra_diversity_without_any_cluster():
    lone = d.intra_diversity(TARGETS[:1], TARGETS)
    assert math.isnan(lone.value)
    assert (lone.clusters, lone.small) == (0, 3)
    assert d.intra_diversity(TARGETS[:1], TARGETS, mode="paper").value == 0.0


@pytest.mark.parametrize("wrong", [{"mode": "papr"}, {"max_per_cluster": 1}])
def test_intra_diversity_refuses_wrong_settings(wrong):
    with pytest.raises(ValueError, match="mode must be"):
        d.intra_diversity(TWO_CLUSTERS, TARGETS, **wrong)


def test_copying_of_copies_of_far_pictures_and_of_honest_ones():
    train, heldout = features(10), features(1000, seed=1)
    copied = d.copying(train.repeat(3, 1), train, heldout)
    assert copied.share == 1.0
    assert copied.nearest.index.tolist() == list(range(10)) * 3
    assert float(copied.nearest.distance.max()) == 0.0
    assert d.copying(features(50, shift=100.0), train, heldout).share == 0.0
    assert d.copying(features(2000, seed=2), train, heldout).share == pytest.approx(0.05, abs=0.02)


def test_copying_threshold_is_what_95_percent_of_the_heldout_pictures_keep():
    train = torch.zeros(1, 1)
    heldout = torch.arange(1.0, 101.0)[:, None]
    found = d.copying(torch.tensor([[5.0], [5.9], [6.0], [-3.0]]), train, heldout)
    assert int((heldout[:, 0] > found.threshold).sum()) == 95
    assert found.threshold == pytest.approx(5.95)
    assert found.share == 0.75
