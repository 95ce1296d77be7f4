"""The two-dimensional example, shortened: what the method is for, in numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "toy2d.py"
spec = importlib.util.spec_from_file_location("toy2d", PATH)
toy2d = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy2d)


def test_network_keeps_the_promises_of_a_backbone():
    net, x, t = toy2d.PointNet(), torch.randn(5, 2, 1, 1), torch.tensor([0, 1, 500, 998, 999])
    xhat, features = net.x0_and_features(x, t)
    assert torch.equal(xhat, net.x0(x, t))
    assert [f.shape for f in features] == [(5, c, 1, 1) for c in net.feature_channels()]
    assert all(torch.equal(a, b) for a, b in zip(features, net.features(x, t), strict=True))


def test_score_of_known_clouds():
    centres = toy2d.mode_centres() + toy2d.SHIFT
    everything = toy2d.score(centres.repeat(50, 1))
    assert (everything.modes, everything.distance) == (8, pytest.approx(0.0, abs=1e-6))
    assert toy2d.score(centres[:3].repeat(50, 1)).modes == 3
    assert toy2d.score(torch.zeros(100, 2) + 5).modes == 0
    assert toy2d.score(toy2d.target_points().flatten(1)).modes == len(toy2d.SHOWN)


def test_uni_dad_moves_to_the_target_and_keeps_the_modes(tmp_path):
    panels = toy2d.run(toy2d.SHORT)
    source, finetuned, alone, ours = (toy2d.score(points) for points in panels.values())
    assert source.modes == 8 or source.distance > 0.2
    assert ours.distance < 0.6 * source.distance  # it has moved to the target
    assert ours.modes > alone.modes  # and kept modes that no target point shows,
    assert ours.modes > finetuned.modes  # which both rivals have lost
    toy2d.picture(panels, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000
