"""The discriminator: small heads on the fake teacher's encoder features. Built from declared channels, never lazily."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEAD_KINDS: tuple[str, ...] = ("multi", "single")


class MultiHead(nn.Module):
    """One head per feature: 1x1 convolution to one channel, then the average over the picture (METHOD §5).

    Args:
        channels: channels of each feature, as `Backbone.feature_channels` lists them.
    """

    def __init__(self, channels: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, kernel_size=1) for c in channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features [B, c_b, h_b, w_b] -> logits [B, heads].

        Raises:
            ValueError: if there are not as many features as heads.
        """
        logits = [head(f).mean(dim=(1, 2, 3)) for head, f in zip(self.heads, features, strict=True)]
        return torch.stack(logits, dim=1).float()


class SingleHead(nn.Module):
    """DMD2's one head on the bottleneck: two convolutions down to one logit; the ablation of METHOD §5.

    Args:
        channels: as for `MultiHead`; only the last, the mid block's, is used.
    """

    def __init__(self, channels: list[int]):
        super().__init__()
        c = channels[-1]
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if c % g == 0)
        self.body = nn.Sequential(
            nn.Conv2d(c, c, kernel_size=4, stride=2, padding=1),
            nn.GroupNorm(groups, c),
            nn.SiLU(),
            nn.Conv2d(c, 1, kernel_size=1),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features [B, c_b, h_b, w_b] -> logits [B, 1]."""
        return self.body(features[-1]).mean(dim=(1, 2, 3))[:, None].float()


def build_heads(kind: str, channels: list[int], seed: int) -> nn.Module:
    """Heads of a kind ("multi" or "single"), initialised the same way for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiHead(channels) if kind == "multi" else SingleHead(channels)
