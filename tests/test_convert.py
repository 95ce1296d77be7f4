"""Guided-diffusion checkpoints: the same numbers out of diffusers' network, every weight used once, both ways to the bit."""

from __future__ import annotations

import adm_reference
import pytest
import torch

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
