"""Distances between two sets of pictures, given as feature matrices [N, D]: pure maths in float64, no networks.

Which features they are decides what a number may be called: only Inception-v3 features make a Frechet distance an FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray
IntraMode = Literal["correct", "paper"]
INTRA_MODES: tuple[str, ...] = ("correct", "paper")
ROWS = 1024  # of a distance or kernel matrix held at a time: 1024 x 50,000 float64 are 0.4 GB


def _matrix(features: Features, least: int, what: str) -> Tensor:
    x = torch.as_tensor(features).detach().cpu().double()
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{what} must be a matrix [N, D] with N >= {least}, not of shape {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} holds numbers that are not finite")
    return x


def _matrices(first: Features, second: Features, least: int, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    x, y = _matrix(first, least, names[0]), _matrix(second, least, names[1])
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[0]} has {x.shape[1]} features a picture, {names[1]} has {y.shape[1]}: use one extractor for both")
    return x, y


# -- Frechet distance -------------------------------------------------------------------------------------------------


def _covariance_factor(x: Tensor) -> Tensor:
    """A with A^T A = covariance of x, [min(N, D), D]: the rotation in front of A cancels wherever A is used."""
    centred = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def frechet_distance(real: Features, fake: Features) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to two sets; lower is better, 0 for equal sets.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), covariances over N - 1. With S_1 = A^T A and S_2 = B^T B the trace
    of the root is the sum of the singular values of A B^T, which stays exact when N < D and the covariances are singular.
    The number falls as N grows: compare only numbers made with the same N and the same features. Heusel et al. 2017.

    Args:
        real: [N, D], N >= 2.
        fake: [M, D], M >= 2.

    Raises:
        ValueError: if a shape does not fit or a value is not finite.
    """
    x, y = _matrices(real, fake, 2, ("real", "fake"))
    a, b = _covariance_factor(x), _covariance_factor(y)
    root_trace = torch.linalg.svdvals(a @ b.T).sum()
    distance = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root_trace
    return max(0.0, float(distance))


def frechet_distance_from_moments(mu_1: Features, sigma_1: Features, mu_2: Features, sigma_2: Features) -> float:
    """`frechet_distance` from means [D] and covariances [D, D], such as published statistics files hold.

    The root's trace comes from the eigenvalues of S_1^(1/2) S_2 S_1^(1/2), which is symmetric, so no complex number appears.

    Raises:
        ValueError: if a shape does not fit.
    """
    m1, s1, m2, s2 = (torch.as_tensor(v).detach().cpu().double() for v in (mu_1, sigma_1, mu_2, sigma_2))
    if m1.ndim != 1 or m1.shape != m2.shape or s1.shape != (len(m1), len(m1)) or s2.shape != s1.shape:
        raise ValueError("means must be [D] and covariances [D, D], with one D for both sets")
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    root_trace = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root_trace))


# -- kernel distance --------------------------------------------------------------------------------------------------


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """Sum over all pairs of k(x, y) = (x.y / D + 1)^3."""
    return float(sum(((rows @ y.T) / x.shape[1] + 1).pow(3).sum() for rows in x.split(ROWS)))


def _mmd2(x: Tensor, y: Tensor) -> float:
    n, m, d = len(x), len(y), x.shape[1]
    same_x = float((x.square().sum(dim=1) / d + 1).pow(3).sum())
    same_y = float((y.square().sum(dim=1) / d + 1).pow(3).sum())
    within = (_kernel_sum(x, x) - same_x) / (n * (n - 1)) + (_kernel_sum(y, y) - same_y) / (m * (m - 1))
    return within - 2 * _kernel_sum(x, y) / (n * m)


def kernel_distance(real: Features, fake: Features) -> float:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 over the full sets, hence no randomness; lower is better.

    Its expectation does not depend on N and is 0 for equal distributions, so that small negative values occur. In Inception
    features this is the KID of Binkowski et al. 2018.

    Args:
        real: [N, D], N >= 2.
        fake: [M, D], M >= 2; need not equal N.

    Raises:
        ValueError: if a shape does not fit or a value is not finite.
    """
    return _mmd2(*_matrices(real, fake, 2, ("real", "fake")))


def kernel_distance_subsets(
    real: Features, fake: Features, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """`kernel_distance` over random subsets, as published KIDs are made: mean and standard deviation over the subsets.

    Args:
        real: [N, D], N >= size.
        fake: [M, D], M >= size.
        subsets: how many.
        size: pictures drawn from each set without replacement, at least 2.
        seed: of the draws; the same seed gives the same numbers.

    Raises:
        ValueError: if a set is smaller than `size`, or `subsets` < 1.
    """
    x, y = _matrices(real, fake, max(size, 2), ("real", "fake"))
    if subsets < 1 or size < 2:
        raise ValueError(f"needs at least one subset of at least 2 pictures, not {subsets} of {size}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        first, second = (v[torch.randperm(len(v), generator=generator)[:size]] for v in (x, y))
        values.append(_mmd2(first, second))
    return float(np.mean(values)), float(np.std(values))


# -- neighbours -------------------------------------------------------------------------------------------------------


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared euclidean distances [N, M] by one matrix product. Pass both sets centred alike: rounding grows with the norms."""
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :] - 2 * (x @ y.T)).clamp_(min=0)


@dataclass(frozen=True)
class Nearest:
    """For each picture of one set its nearest in another: `index` [N] int64 and euclidean `distance` [N] float64."""

    index: Tensor
    distance: Tensor


def nearest(queries: Features, among: Features) -> Nearest:
    """The nearest row of `among` [M, D], M >= 1, for each row of `queries` [N, D]; an exact copy has distance exactly 0.

    Raises:
        ValueError: if a shape does not fit or a value is not finite.
    """
    x, y = _matrices(queries, among, 1, ("queries", "among"))
    centre = y.mean(dim=0)
    index = torch.cat([_squared_distances(rows - centre, y - centre).argmin(dim=1) for rows in x.split(ROWS)])
    return Nearest(index, torch.cat([(rows - y[i]).norm(dim=1) for rows, i in zip(x.split(ROWS), index.split(ROWS), strict=True)]))


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, [N]."""
    # a row's smallest distance is that to itself, which is why the (k+1)-th is taken
    return torch.cat([_squared_distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(ROWS)])


def prdc(real: Features, fake: Features, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage by k-nearest-neighbour balls; higher is better.

    precision: share of fakes inside some real picture's ball. recall: share of reals inside some fake's ball. density: real
    balls around a fake, on average, over k; may exceed 1. coverage: share of reals whose ball holds a fake. All but density
    lie in [0, 1]. Kynkaanniemi et al. 2019 (precision, recall), Naeem et al. 2020 (density, coverage).

    Args:
        real: [N, D], N > k.
        fake: [M, D], M > k.
        k: neighbours that set a ball's radius.

    Raises:
        ValueError: if k < 1, a set has k pictures or fewer, or a value is not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    x, y = _matrices(real, fake, k + 1, ("real", "fake"))
    centre = x.mean(dim=0)
    x, y = x - centre, y - centre
    real_radii, fake_radii = _squared_radii(x, k), _squared_radii(y, k)
    balls_around_fake = torch.zeros(len(y), dtype=torch.int64)
    recalled, covered = 0, 0
    for rows, radii in zip(x.split(ROWS), real_radii.split(ROWS), strict=True):
        squared = _squared_distances(rows, y)
        balls_around_fake += (squared < radii[:, None]).sum(dim=0)
        recalled += int((squared < fake_radii[None, :]).any(dim=1).sum())
        covered += int((squared.min(dim=1).values < radii).sum())
    return {
        "precision": float((balls_around_fake > 0).double().mean()),
        "recall": recalled / len(x),
        "density": float(balls_around_fake.double().mean()) / k,
        "coverage": covered / len(x),
    }


# -- few-shot scores --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntraDiversity:
    """`value` (nan if no cluster counts), `clusters` that entered the mean, and `small` ones with fewer than 2 members."""

    value: float
    clusters: int
    small: int


def intra_diversity(fake: Features, targets: Features, max_per_cluster: int = 100, mode: IntraMode = "correct") -> IntraDiversity:
    """Variety among the fakes that lie nearest to the same training picture; higher is better, 0 if they are all copies.

    Each fake joins the cluster of its nearest target; a cluster's score is the mean pairwise distance of its first
    `max_per_cluster` members; the result is the mean over clusters. Distances are squared euclidean: that is what LPIPS is in
    its own weighted features, so with those this is the Intra-LPIPS of Ojha et al. 2021, without any pair-by-pair call
    (mean |x_i - x_j|^2 over pairs = 2 / (n - 1) * sum |x_i - mean|^2).

    Args:
        fake: [N, D].
        targets: [M, D], the few training pictures.
        max_per_cluster: at least 2.
        mode: what a cluster with fewer than 2 members does: "correct" leaves it out, "paper" scores it 0 as the public code
            does, so that a generator that forgets a target scores lower.

    Raises:
        ValueError: for an unknown mode, `max_per_cluster` < 2, or matrices that do not fit.
    """
    if mode not in INTRA_MODES or max_per_cluster < 2:
        raise ValueError(f"mode must be one of {', '.join(INTRA_MODES)} and max_per_cluster at least 2")
    x, y = _matrices(fake, targets, 1, ("fake", "targets"))
    index = nearest(x, y).index
    scores = []
    for cluster in range(len(y)):
        members = x[index == cluster][:max_per_cluster]
        if len(members) >= 2:
            scores.append(float(2 * (members - members.mean(dim=0)).square().sum() / (len(members) - 1)))
    small = len(y) - len(scores)
    counted = len(y) if mode == "paper" else len(scores)
    return IntraDiversity(sum(scores) / counted if counted else float("nan"), counted, small)


@dataclass(frozen=True)
class Copying:
    """`share` of fakes in [0, 1] closer to the training set than `threshold`, and for each fake its `nearest` in that set."""

    share: float
    threshold: float
    nearest: Nearest


def copying(fake: Features, train: Features, heldout: Features) -> Copying:
    """How many fakes are nearer to a training picture than honest new pictures of the domain come.

    The threshold is the 5% quantile of the held-out pictures' distances to their nearest training picture, i.e. 95% of them
    keep a larger distance: a generator as good as the domain itself scores about 0.05, one that replays its training set 1.

    Args:
        fake: [N, D].
        train: [M, D], the pictures the generator learned from.
        heldout: [L, D], pictures of the same domain that it never saw; hundreds make a steady threshold.

    Raises:
        ValueError: if a set is empty or the matrices do not fit.
    """
    return copies(nearest(fake, train), nearest(heldout, train))


def copies(fake: Nearest, heldout: Nearest) -> Copying:
    """`copying` where the nearest training pictures are known already, by whatever distance."""
    threshold = float(heldout.distance.quantile(0.05))
    return Copying(float((fake.distance < threshold).double().mean()), threshold, fake)
