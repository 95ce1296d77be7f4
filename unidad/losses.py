"""The paper's losses as pure functions of tensors: no networks, no settings, no randomness.

x is a clean sample in [-1, 1], [B, C, H, W]; every xhat is an x0-prediction of the same shape. Weights are formed in float32.
Equation numbers are METHOD.md's sections, written after arXiv 2511.18281 (Uni-DAD) and 2405.14867 (DMD2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GAN_LOSSES: tuple[str, ...] = ("bce", "hinge", "lsgan", "wgan-gp")
AGGREGATIONS: tuple[str, ...] = ("per_head", "mean_logit")
DENOISING_LOSSES: tuple[str, ...] = ("epsilon", "v", "edm")


def dmd_gradient(x: Tensor, xhat_fake: Tensor, xhat_teacher: Tensor) -> Tensor:
    """g_d = (xhat_fk - xhat_d) / mean|x - xhat_d|, per sample (METHOD §4, DMD2 eq. 7). Detached, float32, finite."""
    x, fake, teacher = (v.detach().float() for v in (x, xhat_fake, xhat_teacher))
    normaliser = (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-8)
    return torch.nan_to_num((fake - teacher) / normaliser, nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """L_DMD = 1/2 mean (x - stopgrad(x - g))^2, so that dL/dx = g / numel (METHOD §4)."""
    x = x.float()
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def dual_domain_gradient(x: Tensor, xhat_fake: Tensor, xhat_source: Tensor | None, xhat_target: Tensor | None, a: float) -> Tensor:
    """g = (1 - a) g_src + a g_trg (METHOD §4). A teacher that was not run is None and must have weight 0.

    Raises:
        ValueError: if a is outside [0, 1] or a teacher with a weight is missing.
    """
    if not 0.0 <= a <= 1.0:
        raise ValueError(f"a must lie in [0, 1], not {a}")
    gradient = torch.zeros_like(x, dtype=torch.float32)
    for weight, xhat, name in ((1.0 - a, xhat_source, "source"), (a, xhat_target, "target")):
        if weight == 0.0:
            continue
        if xhat is None:
            raise ValueError(f"the {name} teacher has weight {weight} but gave no prediction")
        gradient = gradient + weight * dmd_gradient(x, xhat_fake, xhat)
    return gradient


def denoising_loss(
    x: Tensor,
    xhat: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    kind: str = "epsilon",
    sigma_data: float = 0.5,
    mask: Tensor | None = None,
    huber: float = 0.0,
) -> Tensor:
    """Weighted mean of (xhat - x)^2 (METHOD §6).

    Args:
        alpha, sigma: of x_t, broadcastable to x.
        kind: "epsilon" (the eps-MSE), "v" (the v-MSE), "edm" (s^-2 + sigma_data^-2 with s = sigma / alpha).
        mask: [B, 1, H, W] in [0, 1], no sample's all 0: each sample's mean is then weighted by it, so that a small subject counts as
            much as a large one; None counts every place.
        huber: c > 0 takes sqrt(e + c^2) - c of each weighted square e (pseudo-Huber, as in arXiv 2310.14189, but pixel by pixel): errors
            far above c count by their size, so that small ones still pull, and the best guess between two is one of them, not the mean.

    Raises:
        ValueError: for an unknown kind.
    """
    snr = (alpha.float() / sigma.float()) ** 2
    if kind == "epsilon":
        weight = snr
    elif kind == "v":
        weight = snr + 1.0
    elif kind == "edm":
        weight = snr + sigma_data**-2
    else:
        raise ValueError(f"the denoising loss must be one of {', '.join(DENOISING_LOSSES)}, not {kind!r}")
    error = weight * (xhat.float() - x.float()) ** 2
    error = (error + huber**2).sqrt() - huber if huber else error
    if mask is None:
        return error.mean()
    over = (1, 2, 3)
    return ((error * mask).mean(dim=over) / mask.mean(dim=over)).mean()


def _aggregate(logits: Tensor, aggregation: str) -> Tensor:
    # "per_head" leaves [B, heads]: its mean is averaged over heads, so that lambda does not depend on their number.
    if aggregation == "per_head":
        return logits.float()
    if aggregation == "mean_logit":
        return logits.float().mean(dim=1, keepdim=True)
    raise ValueError(f"the aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")


def gan_generator_loss(fake_logits: Tensor, kind: str = "bce", aggregation: str = "per_head") -> Tensor:
    """L_G,GAN on the heads' logits of student samples, [B, heads] (METHOD §5).

    lsgan acts on the logits, as in arXiv 1611.04076, and not on D = sigmoid(logit) as in the public code.
    """
    fake = _aggregate(fake_logits, aggregation)
    if kind == "bce":
        return F.softplus(-fake).mean()  # -log D
    if kind == "lsgan":
        return ((fake - 1.0) ** 2).mean()
    if kind in ("hinge", "wgan-gp"):
        return -fake.mean()
    raise ValueError(f"the GAN loss must be one of {', '.join(GAN_LOSSES)}, not {kind!r}")


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "bce", aggregation: str = "per_head") -> Tensor:
    """L_D on the heads' logits of target pictures and of student samples, [B, heads] each (METHOD §5)."""
    real, fake = _aggregate(real_logits, aggregation), _aggregate(fake_logits, aggregation)
    if kind == "bce":
        return F.softplus(-real).mean() + F.softplus(fake).mean()  # -log D(y) - log(1 - D(x))
    if kind == "lsgan":
        return ((real - 1.0) ** 2).mean() + (fake**2).mean()
    if kind == "hinge":
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()
    if kind == "wgan-gp":
        return fake.mean() - real.mean()
    raise ValueError(f"the GAN loss must be one of {', '.join(GAN_LOSSES)}, not {kind!r}")


def gradient_penalty(logits: Tensor, inputs: Tensor, aggregation: str = "per_head") -> Tensor:
    """WGAN-GP: mean (||d logit / d input||_2 - 1)^2 over samples and heads (arXiv 1704.00028, eq. 3).

    Args:
        logits: [B, heads], computed from `inputs` with a graph.
        inputs: [B, C, H, W] with requires_grad.
        aggregation: as for the loss it is added to.
    """
    penalties = []
    for head in _aggregate(logits, aggregation).unbind(dim=1):
        (gradient,) = torch.autograd.grad(head.sum(), inputs, create_graph=True)
        penalties.append((gradient.flatten(1).norm(dim=1) - 1.0) ** 2)
    return torch.stack(penalties).mean()
