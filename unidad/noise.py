"""Noise schedules and the translations between what networks predict and x0.

Everything is derived from alpha and sigma of x_t = alpha_t x + sigma_t eps. Time runs from 0 (clean) to T-1 (noise), and
timesteps are whole numbers. No network is known here.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction", "sample", "flow")
TIMESTEP_LAWS: tuple[str, ...] = ("uniform", "karras", "quadratic")
STUDENT_GRIDS: tuple[str, ...] = ("lcm", "edm", "fine")
# Sigma over alpha of the grid "fine", at the last of 2 or 3 steps, and at the last two of more: t = 55, 250 and 40 on the bundled models' schedule.
FINE_LAST, FINE_LAST_TWO = 0.1, (0.427, 0.0755)


def to_x0(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """Translate a network's output into its x0-prediction (METHOD §2).

    Args:
        output: [B, C, H, W], what the network predicted.
        x_t: [B, C, H, W], the noised input it saw.
        alpha, sigma: broadcastable to x_t.
        kind: "epsilon", "v_prediction" (v = alpha eps - sigma x), "sample" (x itself) or "flow" (u = eps - x).

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "epsilon":
        return (x_t - sigma * output) / alpha
    if kind == "v_prediction":
        return alpha * x_t - sigma * output
    if kind == "sample":
        return output
    if kind == "flow":
        return (x_t - sigma * output) / (alpha + sigma)
    raise ValueError(f"prediction type must be one of {', '.join(PREDICTION_TYPES)}, not {kind!r}")


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """Inverse of `to_x0`: the output a network of this kind would give for this x0-prediction. Needs sigma > 0."""
    eps = (x_t - alpha * x0) / sigma
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    if kind == "sample":
        return x0
    if kind == "flow":
        return eps - x0
    raise ValueError(f"prediction type must be one of {', '.join(PREDICTION_TYPES)}, not {kind!r}")


class NoiseSchedule:
    """A discrete variance-preserving schedule of T timesteps, x_t = alpha_t x + sigma_t eps.

    Args:
        alphas_cumprod: [T] float32 in (0, 1), falling; alpha^2, as diffusers' schedulers store it.

    Raises:
        ValueError: if the values are not in (0, 1) or do not fall.
    """

    def __init__(self, alphas_cumprod: Tensor):
        bar = alphas_cumprod.detach().float().cpu()
        if bar.ndim != 1 or len(bar) < 2 or not bool(((bar > 0) & (bar < 1)).all()) or bool((bar[1:] > bar[:-1]).any()):
            raise ValueError("alphas_cumprod must be one row of falling numbers strictly between 0 and 1")
        self.alphas_cumprod = bar
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """Build from beta_t, [T] in (0, 1)."""
        return cls(torch.cumprod(1.0 - betas.float(), dim=0))

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for timesteps t: [B] int64, each shaped [B, 1, 1, ...] with `ndim` dimensions, float32."""
        if t.device not in self._tables:
            bar = self.alphas_cumprod.to(t.device)
            self._tables[t.device] = (bar.sqrt(), (1.0 - bar).sqrt())
        alpha, sigma = self._tables[t.device]
        shape = (-1,) + (1,) * (ndim - 1)
        return alpha[t].view(shape), sigma[t].view(shape)

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t eps for x, eps: [B, C, H, W] and t: [B]."""
        alpha, sigma = self.alpha_sigma(t, x.ndim)
        return alpha * x + sigma * eps

    def scales(self) -> Tensor:
        """s = sigma_t / alpha_t, [T] float64, rising: the noise level of the EDM frame xbar = x + s eps (METHOD §2)."""
        bar = self.alphas_cumprod.double()
        return ((1.0 - bar) / bar).sqrt()

    def nearest_timestep(self, s: Tensor) -> Tensor:
        """Timesteps whose sigma/alpha lies nearest to s, in log: s [N] > 0 -> [N] int64."""
        grid = self.scales().log()
        return (grid[None, :] - s.double().cpu().log()[:, None]).abs().argmin(dim=1)

    # -- the student's timesteps, METHOD §3 ---------------------------------------------------------------------------

    def student_steps(self, k: int, grid: str = "lcm") -> list[int]:
        """The K falling timesteps tau_1 > ... > tau_K of the student's rollout (METHOD §3).

        "lcm": i * (T // K) - 1, which diffusers' LCMScheduler(original_inference_steps=K) makes by itself.
        "edm": s from 80 to 0.5, evenly spaced in log s, snapped to the schedule (K = 1: s = 80).
        "fine": "lcm", but noise that is still there at the last step stays as grain, so it ends at little: of 2 or 3 steps the last is where
            s = 0.1, of 4 and more the last two where s = 0.427 and 0.0755, after the first of one step less.

        Raises:
            ValueError: if K is not in 1..T, the grid is unknown, or the schedule is too coarse for K different steps.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"the number of student steps must lie in 1..{len(self)}, not {k}")
        even = [i * (len(self) // k) - 1 for i in range(k, 0, -1)]
        if grid == "lcm" or (grid == "fine" and k == 1):
            return even
        if grid == "fine":
            return self._fine(k)
        if grid != "edm":
            raise ValueError(f"the student grid must be one of {', '.join(STUDENT_GRIDS)}, not {grid!r}")
        s = torch.exp(torch.linspace(math.log(80.0), math.log(0.5), k, dtype=torch.float64))
        steps = self.nearest_timestep(s).tolist()
        if len(set(steps)) != k:
            raise ValueError(f"this noise schedule has no {k} different timesteps between s = 80 and s = 0.5")
        return steps

    def _fine(self, k: int) -> list[int]:
        last = (FINE_LAST,) if k < 4 else FINE_LAST_TWO
        first = self.student_steps(k - len(last) + 1)[:-1]
        steps = [*first, *self.nearest_timestep(torch.tensor(last)).tolist()]
        if any(early <= late for early, late in pairwise(steps)):
            raise ValueError(f"this noise schedule has no timesteps with s = {' and '.join(map(str, last))} below {first[-1]}")
        return steps

    # -- laws of t for the losses, METHOD §4-§6 -----------------------------------------------------------------------

    def uniform(self, n: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """t ~ U{low*T .. min(high*T, T - 1)}, both ends included, [n] int64 on the generator's device.

        METHOD §4 uses 0.02..0.98 of T, §5 and §6 all of 0..T-1.
        """
        lo, hi = int(low * len(self)), min(int(high * len(self)), len(self) - 1)
        return torch.randint(lo, hi + 1, (n,), generator=generator, device=generator.device)

    def karras(self, n: int, generator: torch.Generator, points: int = 1000) -> Tensor:
        """t uniform over a Karras grid, rho 7, s in 0.002..80, snapped: the public FSIG code's law (METHOD §4). [n] int64."""
        ramp = torch.linspace(0, 1, points, dtype=torch.float64)
        s = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        grid = self.nearest_timestep(s).to(generator.device)
        return grid[torch.randint(0, points, (n,), generator=generator, device=generator.device)]

    def draw_timesteps(self, law: str, n: int, generator: torch.Generator) -> Tensor:
        """Timesteps for L_DMD, [n] int64: law "uniform" in 0.02T..0.98T (METHOD §4), "karras" or "quadratic".

        Raises:
            ValueError: for an unknown law.
        """
        if law == "uniform":
            return self.uniform(n, generator, 0.02, 0.98)
        if law == "karras":
            return self.karras(n, generator)
        if law == "quadratic":
            return self.quadratic(n, generator)
        raise ValueError(f"the timestep law must be one of {', '.join(TIMESTEP_LAWS)}, not {law!r}")

    def quadratic(self, n: int, generator: torch.Generator, high: float = 0.98) -> Tensor:
        """t = high*T*u^2 for u ~ U[0, 1), rounded down: half of the draws lie below a quarter of the range. [n] int64.

        Ours: on a cosine schedule the uniform law of METHOD §4 spends 1 draw in 20 where faint noise shows (s < 0.1), this one 1 in 4.
        """
        u = torch.rand((n,), generator=generator, device=generator.device)  # float32: MPS knows no float64
        return (u.square() * high * len(self)).long()

    def detail(self, n: int, generator: torch.Generator) -> Tensor:
        """`quadratic` over all of 0..T-1 for one draw in three, over its lowest 0.4 for the others. [n] int64.

        Ours: what is learnt by heart of ten pictures is their layouts, at high noise; how their lines and colours look takes longer.
        """
        low = torch.rand((n,), generator=generator, device=generator.device) < 2 / 3
        return torch.where(low, self.quadratic(n, generator, 0.4), self.quadratic(n, generator, 1.0))
