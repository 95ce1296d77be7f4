"""The student's K-step rollout (METHOD §3) and DDIM for many-step models: how samples come out of noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from unidad.backbones.base import Backbone

ROLLOUT_GRADS: tuple[str, ...] = ("all", "last", "random")
Noise = Callable[[], Tensor]


def rollout(
    student: Backbone,
    noise: Noise,
    steps: Sequence[int],
    labels: Tensor | None = None,
    grad: str = "all",
    stop_after: int | None = None,
) -> Tensor:
    """x = G(z): from pure noise at tau_1, alternately predict x0 and re-noise to the next timestep (METHOD §3).

    Args:
        student: its x0-prediction is used.
        noise: gives a fresh [B, C, H, W] of standard normal numbers each time it is called; first the start, then one per step.
        steps: tau_1 > ... > tau_K.
        labels: [B] int64 for a class-conditional student.
        grad: "all" keeps the graph of every step; "last" only that of the last step run.
        stop_after: run only so many of the K steps (DMD2's backward simulation); None runs all.

    Returns:
        The last x0-prediction, [B, C, H, W], not clamped.
    """
    x = noise()
    count = len(steps) if stop_after is None else stop_after
    for i, tau in enumerate(steps[:count]):
        t = torch.full((len(x),), tau, dtype=torch.long, device=x.device)
        if grad == "last" and i == count - 1:
            torch.clear_autocast_cache()  # torch 2.10 would take weights cast in steps without a graph, which lead to no gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grad == "all" or i == count - 1)):
            xhat = student.x0(x, t, labels)
            if i + 1 < count:
                following = torch.full_like(t, steps[i + 1])
                x = student.schedule.add_noise(xhat, noise(), following)
    return xhat


@torch.no_grad()
def ddim_states(
    model: Backbone, x: Tensor, taus: Sequence[int], labels: Tensor | None = None, clip: bool = True, order: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Deterministic DDIM (arXiv 2010.02502, eq. 12 with eta 0) from `x` [B, C, H, W], which has the noise of taus[0].

    With `order` 2 each step but the first goes by the x0-prediction extrapolated from the last two, linearly in the logarithm of
    alpha / sigma: DPM-Solver++(2M), arXiv 2211.01095, algorithm 2; the same cost, and far nearer to the ODE in a dozen steps.

    Yields, for each of the falling `taus`, x there and the x0-prediction from it, clamped to [-1, 1] when `clip` and the model is
    bounded; the last is the end.
    """
    before: tuple[Tensor, Tensor] | None = None  # the last prediction, and log(alpha / sigma) there
    for tau, following in zip(taus, [*taus[1:], None], strict=True):
        t = torch.full((len(x),), tau, dtype=torch.long, device=x.device)
        alpha, sigma = model.schedule.alpha_sigma(t, x.ndim)
        xhat = model.x0(x, t, labels)
        xhat = xhat.clamp(-1, 1) if clip and model.bounded else xhat
        yield x, xhat
        if following in (None, tau):  # the end, or the same timestep again: nothing moves
            continue
        after, here, heading = torch.full_like(t, following), (alpha / sigma).log(), xhat
        if order == 2 and before is not None:
            next_alpha, next_sigma = model.schedule.alpha_sigma(after, x.ndim)
            share = ((next_alpha / next_sigma).log() - here) / (2 * (here - before[1]))
            heading = xhat + share * (xhat - before[0])
        before = xhat, here
        x = model.schedule.add_noise(heading, (x - alpha * heading) / sigma, after)


def ddim(model: Backbone, noise: Tensor, n_steps: int, labels: Tensor | None = None, clip: bool = True) -> Tensor:
    """DDIM from pure noise [B, C, H, W] in `n_steps` network evaluations, evenly spaced from T-1 down ("trailing")."""
    total = len(model.schedule)
    taus = [round(total - i * total / n_steps) - 1 for i in range(n_steps)]
    for _, xhat in ddim_states(model, noise, taus, labels, clip):
        end = xhat
    return end


def _span(high: int, low: int, n: int) -> list[int]:
    """n timesteps from `high` down towards `low`, their distances to 0 squared where `low` is 0."""
    return [round(low + (high - low) * (1 - i / n) ** (1 if low else 2)) for i in range(n)]


def ddim_trajectory(
    model: Backbone, noise: Tensor, steps: Sequence[int], per_step: Sequence[int], labels: Tensor | None = None
) -> Tensor:
    """DDIM of second order from `noise` [B, C, H, W] at tau_1 with per_step[k] evaluations after each tau_k: x at every tau_k, and the end.

    Evenly spaced, but denser towards 0 after tau_K: what the last evaluation is left with stays in the picture as grain.

    Returns:
        [B, K + 1, C, H, W], float32.
    """
    path = [tau for span in zip(steps, [*steps[1:], 0], per_step, strict=True) for tau in _span(*span)]
    starts, kept = list(accumulate(per_step, initial=0))[:-1], []
    for i, (x, xhat) in enumerate(ddim_states(model, noise, path, labels, order=2)):
        if i in starts:
            kept.append(x)
        end = xhat
    return torch.stack([*kept, end], dim=1).float()


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Noise:
    """Noise for `rollout` in which picture i draws from its own generator, seeded seeds[i], whatever the batch it is in.

    This is diffusers' convention for a list of generators; numbers are drawn on the CPU so that devices agree.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    return draw


def batch_noise(shape: tuple[int, ...], generator: torch.Generator) -> Noise:
    """Noise for training: each call draws `shape` = [B, C, H, W] from one generator, on its device."""

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return draw
