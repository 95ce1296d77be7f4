"""LPIPS as features and as streamed clusters, against LPIPS as it is published: one pair at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad.errors import DataError, ModelError
from unidad.metrics.distances import intra_diversity
from unidad.metrics.evaluate import evaluate, table
from unidad.metrics.lpips import Lpips, Net, intra_lpips, nearest_lpips, weight_shapes

NETS: tuple[Net, ...] = ("vgg", "alex")
ENDS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the ReLUs that are compared, by their place in `features`


def random_state(net: Net, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in weight_shapes(net).items():
        if key.startswith("lin"):
            state[key] = torch.rand(shape, generator=generator)
        else:
            state[key] = torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5 * 0.9
    return state


def torchvision_features(net: Net) -> nn.Sequential:
    """The layers of torchvision's `vgg16().features` and `alexnet().features`, written out."""
    if net == "alex":
        c1, c2, c3 = nn.Conv2d(3, 64, 11, 4, 2), nn.Conv2d(64, 192, 5, padding=2), nn.Conv2d(192, 384, 3, padding=1)
        c4, c5 = nn.Conv2d(384, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1)
        pools = nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2)
        return nn.Sequential(c1, nn.ReLU(), pools[0], c2, nn.ReLU(), pools[1], c3, nn.ReLU(), c4, nn.ReLU(), c5, nn.ReLU())
    layers: list[nn.Module] = []
    channels = 3
    for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()] if out else [nn.MaxPool2d(2, 2)]
        channels = out or channels
    return nn.Sequential(*layers)


class PairByPair:
    """LPIPS of one pair of pictures in [-1, 1], the published way."""

    def __init__(self, net: Net, state: dict[str, Tensor]):
        self.ends = ENDS[net]
        self.network = torchvision_features(net)
        self.network.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")})
        self.linear = [state[f"lin{i}.model.1.weight"] for i in range(5)]

    def taps(self, x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        found = []
        for i, layer in enumerate(self.network):
            x = layer(x)
            if i in self.ends:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float:
        pairs = zip(self.taps(a[None]), self.taps(b[None]), self.linear, strict=True)
        return float(sum(F.conv2d((f - g).square(), w).mean() for f, g, w in pairs))


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[Lpips, PairByPair]]:
    return {net: (Lpips(net, random_state(net), "cd" * 32, batch_size=7), PairByPair(net, random_state(net))) for net in NETS}


def pictures(n: int, seed: int = 0, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def around(centres: Tensor, n: int, seed: int = 0) -> Tensor:
    """n pictures, the i-th half way between centre i mod M and noise."""
    return centres[torch.arange(n) % len(centres)] // 2 + pictures(n, seed, centres.shape[-1]) // 2


def by_pairs(distance: PairByPair, fake: Tensor, targets: Tensor, most: int, paper: bool) -> float:
    """Intra-LPIPS as the public code loops over it; `paper` with its range of values and its empty clusters."""
    x, y = (fake / 255.0 if paper else fake / 127.5 - 1), targets / 127.5 - 1
    clusters: list[list[Tensor]] = [[] for _ in y]
    for picture in x:
        clusters[int(np.argmin([distance(picture, target) for target in y]))].append(picture)
    scores = []
    for members in clusters:
        pairs = [distance(a, b) for a, b in itertools.combinations(members[:most], 2)]
        if pairs or paper:
            scores.append(float(np.mean(pairs)) if pairs else 0.0)
    return float(np.mean(scores))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("size", [(32, 32), (40, 67)])
def test_squared_distances_of_features_are_lpips(networks, net, size):
    ours, reference = networks[net]
    a, b = (torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = [reference(x, y) for x, y in zip(a / 127.5 - 1, b / 127.5 - 1, strict=True)]
    assert min(expected) > 0.01
    assert (ours(a) - ours(b)).square().sum(dim=1).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("net", "n"), [("vgg", 14), ("alex", 40)])
@pytest.mark.parametrize("mode", ["correct", "paper"])
def test_intra_lpips_equals_pair_by_pair_calls(networks, net, n, mode):
    ours, reference = networks[net]
    targets = torch.cat([pictures(3, 5), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])  # black: nobody's nearest
    fake = around(targets[:3], n)
    found, nearest = intra_lpips(ours, fake, targets, max_per_cluster=9, mode=mode)
    expected = by_pairs(reference, fake, targets, 9, mode == "paper")
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    if mode == "correct":
        assert (found.clusters, found.small) == (3, 1)
        assert nearest.index.tolist() == [i % 3 for i in range(n)]
        assert float(nearest.distance[4]) == pytest.approx(reference(fake[4] / 127.5 - 1, targets[1] / 127.5 - 1), rel=1e-4)
    else:
        assert found.clusters == 4


def test_streaming_equals_the_matrix_of_all_features(networks):
    ours, _ = networks["alex"]
    targets = pictures(4, 5)
    fake = around(targets, 60)
    streamed, nearest = intra_lpips(ours, fake, targets, max_per_cluster=11)
    whole = intra_diversity(ours(fake), ours(targets), max_per_cluster=11)
    assert streamed.value == pytest.approx(whole.value, rel=1e-5)
    assert (streamed.clusters, streamed.small) == (whole.clusters, whole.small) == (4, 0)
    assert torch.equal(nearest.index, torch.arange(60) % 4)


def test_copies_have_distance_0_and_no_variety(networks):
    ours, _ = networks["alex"]
    targets = pictures(3, 5)
    found, nearest = intra_lpips(ours, targets.repeat(4, 1, 1, 1), targets)
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert float(nearest.distance.max()) == pytest.approx(0.0, abs=1e-9)
    alone, _ = intra_lpips(ours, targets[:1], targets)
    assert math.isnan(alone.value)
    assert (alone.clusters, alone.small) == (0, 3)


def test_evaluate_in_lpips_scores_pairs_only_and_says_what_it_did(networks):
    ours, _ = networks["alex"]
    train = pictures(3, 5)
    reference = torch.cat([train, around(train, 30, 8)])
    samples = torch.cat([around(train, 20), train])
    scores = {mode: evaluate(samples, reference, train, ours, mode=mode, seed=4) for mode in ("correct", "paper")}
    for mode, found in scores.items():
        assert found["intra_diversity"] == intra_lpips(ours, samples, train, mode=mode)[0].value
        assert found["frechet_distance"] is None
        assert found["nearest"]["distance"] == nearest_lpips(ours, samples, train).distance.tolist()
        assert (found["heldout"], found["copying"] >= 3 / 23) == (30, True)
        facts = {"extractor": "lpips-alex", "digest": "cd" * 32, "resize": "none", "samples": 23, "seed": 4, "mode": mode}
        assert {key: found[key] for key in facts} == facts
    assert scores["paper"]["intra_diversity"] != pytest.approx(scores["correct"]["intra_diversity"], rel=0.01)
    assert "Intra-LPIPS" in table(scores["correct"])
    assert "[0, 1] against" not in table(scores["correct"])
    assert "samples in [0, 1] against training pictures in [-1, 1]" in table(scores["paper"])
    assert evaluate(samples, reference, None, ours)["intra_diversity"] is None


def test_wrong_weights_and_pictures_are_refused(networks):
    ours, _ = networks["alex"]
    state = random_state("alex")
    classifier = {"classifier.6.bias": torch.zeros(1000)}
    assert Lpips("alex", state | classifier, "").name == "lpips-alex"
    for wrong in (
        random_state("vgg"),
        {k: v for k, v in state.items() if k != "lin4.model.1.weight"},
        state | {"features.3.bias": torch.zeros(5)},
    ):
        with pytest.raises(ModelError, match="not the weights of LPIPS"):
            Lpips("alex", wrong, "")
    with pytest.raises(ModelError, match="negative"):
        Lpips("alex", state | {"lin0.model.1.weight": -state["lin0.model.1.weight"]}, "")
    with pytest.raises(DataError, match="32 pixels"):
        ours(pictures(2, side=16))
    with pytest.raises(DataError, match="one size"):
        intra_lpips(ours, pictures(2), pictures(2, side=40))
    with pytest.raises(ValueError, match="mode must be"):
        intra_lpips(ours, pictures(2), pictures(2), mode="papr")
