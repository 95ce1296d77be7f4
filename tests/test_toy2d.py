"""The example in the plane shows what it says: both teachers together keep a cluster that ten points leave out."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def toy():
    path = Path(__file__).parent.parent / "examples" / "toy2d.py"
    spec = importlib.util.spec_from_file_location("toy2d", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_teachers_keep_the_cluster_that_the_ten_points_leave_out(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "VARIANTS", {"target teacher alone": 1.0, "Uni-DAD": 0.25})
    results = toy.main(str(tmp_path / "toy.png"))
    alone, distance_alone = results["target teacher alone"]
    both, distance_both = results["Uni-DAD"]
    assert alone[toy.LEFT_OUT] < 0.01
    assert both[toy.LEFT_OUT] > 0.04
    assert (both > 0.03).all(), "every cluster of the source is still drawn"
    assert both.sum() > 0.7, "and most points belong to one"
    assert toy.RADIUS + 0.02 < distance_both < distance_alone < toy.RADIUS + toy.MOVE, "and they moved towards the target"
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_shares_count_points_of_both_places_and_no_others(toy):
    points = torch.cat([toy.centres(toy.RADIUS), toy.centres(toy.RADIUS + toy.MOVE), torch.zeros(6, 2), 1.2 * toy.centres(1.0)])
    assert torch.allclose(toy.shares(points), torch.full((6,), 2 / 24))
