"""How a network that learnt hands what it learnt to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unidad.sharding import share_like


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one architecture agree in every bit."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


@torch.no_grad()
def add_change(to: nn.Module, before: Mapping[str, Tensor], after: nn.Module, share: float = 1.0) -> None:
    """to += share * (after - before), weight by weight, in place; numbers that are not floating point stay.

    What fine-tuning changed in a many-step model does much the same to a few-step model distilled from it, for both began at the same
    weights (task arithmetic, arXiv 2212.04089; LCM-LoRA adds such changes too, arXiv 2311.05556).

    Args:
        to: changed in place.
        before: the weights that `after` started from, by the same names, on any device.
        share: 0 leaves `to` as it is.
    """
    learnt = after.state_dict()
    for key, value in to.state_dict().items():
        if value.is_floating_point():
            value += share * (learnt[key] - share_like(before[key].to(value.device), value))
