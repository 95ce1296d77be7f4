"""Uni-DAD in two dimensions: eight modes, ten target points, a few-step student. Under a minute on a CPU.

The source model knows a ring of eight Gaussians. The target is that ring moved, but only ten points of it are seen, and
they show five of its eight modes. A student that follows the target alone forgets the three modes that no point shows;
Uni-DAD moves and keeps them. Run `python examples/toy2d.py --out toy2d.png`.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from torch import Tensor, nn

from unidad.backbones.base import Backbone, Granularity
from unidad.heads import build_heads
from unidad.methods.base import Method, only_training
from unidad.methods.finetune import Finetune
from unidad.methods.unidad import Objective, UniDAD
from unidad.noise import NoiseSchedule, to_x0
from unidad.rollout import ddim, rollout, seeded_noise

MODES, RADIUS, STD = 8, 0.7, 0.06
SHIFT = torch.tensor([0.17, 0.10])
SHOWN = (0, 2, 3, 5, 6)  # the modes that the ten points show, two points each
STEPS = 2


class PointNet(Backbone):
    """An MLP that denoises points [B, 2, 1, 1]; it predicts v, and its hidden layers are the encoder's features."""

    prediction_type = "v_prediction"
    shape = (2, 1, 1)

    def __init__(self, width: int = 96, layers: int = 4):
        super().__init__()
        self.schedule = NoiseSchedule(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)
        self.width, self.encoder_layers = width, layers - 1
        self.layers = nn.ModuleList(nn.Linear(2 + 12 + 16 if i == 0 else width, width) for i in range(layers))
        self.out = nn.Linear(width, 2)

    def _hidden(self, x_t: Tensor, t: Tensor, count: int) -> list[Tensor]:
        angle = t[:, None] / len(self.schedule) * math.pi * 2.0 ** torch.arange(-1, 7)
        x = x_t.flatten(1)
        waves = [f(k * x) for k in (3.0, 6.0, 12.0) for f in (torch.sin, torch.cos)]
        h, found = torch.cat([x, *waves, angle.sin(), angle.cos()], dim=1), []
        for layer in self.layers[:count]:
            h = nn.functional.silu(layer(h))
            found.append(h)
        return found

    def _to_x0(self, h: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return to_x0(self.out(h)[:, :, None, None], x_t, alpha, sigma, self.prediction_type)

    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `Backbone.x0`."""
        return self._to_x0(self._hidden(x_t, t, len(self.layers))[-1], x_t, t)

    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        """Hidden layers but the last, each [B, width, 1, 1]."""
        return [h[:, :, None, None] for h in self._hidden(x_t, t, self.encoder_layers)]

    def x0_and_features(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage"
    ) -> tuple[Tensor, list[Tensor]]:
        """Both from one pass."""
        hidden = self._hidden(x_t, t, len(self.layers))
        return self._to_x0(hidden[-1], x_t, t), [h[:, :, None, None] for h in hidden[: self.encoder_layers]]

    def feature_channels(self, granularity: Granularity = "stage") -> list[int]:
        """One width per encoder layer."""
        return [self.width] * self.encoder_layers


@dataclass(frozen=True)
class Length:
    """How long everything is trained: updates of the source model, target teacher updates before the first cycle, cycles."""

    source: int = 2000
    warmup: int = 500
    cycles: int = 500
    batch: int = 128


SHORT = Length(source=1500, cycles=250)


def mode_centres() -> Tensor:
    """Centres of the source's modes, [8, 2]; the target's are these plus SHIFT."""
    angle = torch.arange(MODES) * 2 * math.pi / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)


def target_points() -> Tensor:
    """The ten points the student is shown, [10, 2, 1, 1]."""
    centres = (mode_centres() + SHIFT)[list(SHOWN)].repeat(2, 1)
    points = centres + STD * torch.randn(centres.shape, generator=torch.Generator().manual_seed(0))
    return points[:, :, None, None]


def loop(method: Method, cycles: int, draw: callable, rate: float) -> None:
    """The loop of the library without its comforts: each phase, each repeat, one update of the networks that learn."""
    optimizers = {
        n: torch.optim.AdamW(method.networks[n].parameters(), lr=rate, weight_decay=0.0, fused=True) for n in method.trained()
    }
    for cycle in range(cycles):
        for phase in method.cycle_phases(cycle):
            for _ in range(phase.repeats):
                with only_training(method.networks, phase.trains):
                    phase.loss(draw() if phase.needs_data else torch.empty(0, 2, 1, 1))["total"].backward()
                for name in phase.trains:
                    optimizers[name].param_groups[0]["lr"] = rate * (1 - cycle / cycles)
                    optimizers[name].step()
                    optimizers[name].zero_grad(set_to_none=True)


def train_source(length: Length) -> PointNet:
    """A many-step model of the ring."""
    torch.manual_seed(0)
    net, generator = PointNet(), torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        centres = mode_centres()[torch.randint(MODES, (length.batch,), generator=generator)]
        return (centres + STD * torch.randn(centres.shape, generator=generator))[:, :, None, None]

    loop(Finetune(net, generator, "v"), length.source, draw, 4e-3)
    return net.eval()


def train_student(source: PointNet, a: float, length: Length, **numbers: object) -> PointNet:
    """A Uni-DAD student from the source model and the ten points; a = 1 is the same without the source teacher."""
    generator, points = torch.Generator().manual_seed(1), target_points()
    method = UniDAD(
        student=copy.deepcopy(source),
        source_teacher=copy.deepcopy(source),
        fake_teacher=copy.deepcopy(source),
        target_teacher=copy.deepcopy(source),
        heads=build_heads("multi", source.feature_channels(), 0),
        objective=Objective(**({"a": a, "denoising": "v", "fake_updates": 2} | numbers)),
        student_steps=source.schedule.student_steps(STEPS),
        batch_size=length.batch,
        generator=generator,
        target_warmup=length.warmup,
    )
    loop(method, length.cycles, lambda: points[torch.randint(10, (length.batch,), generator=generator)], 1e-3)
    return method.student.eval()


def finetune(source: PointNet, length: Length) -> PointNet:
    """The plain baseline: the source model, trained on the ten points as often as Uni-DAD's target teacher is."""
    net, generator, points = copy.deepcopy(source), torch.Generator().manual_seed(2), target_points()
    loop(
        Finetune(net, generator, "v"),
        length.warmup + length.cycles,
        lambda: points[torch.randint(10, (length.batch,), generator=generator)],
        1e-3,
    )
    return net.eval()


@torch.no_grad()
def sample(net: PointNet, n: int = 2000, few_steps: bool = True) -> Tensor:
    """N points, [n, 2]: K steps of a student, or 50 of DDIM."""
    noise = seeded_noise(range(n), net.shape)
    x = rollout(net, noise, net.schedule.student_steps(STEPS)) if few_steps else ddim(net, noise(), 50)
    return x.flatten(1)


@dataclass(frozen=True)
class Score:
    """Modes of the moved ring that hold at least 2 % of the samples, within half the way to the next mode; mean distance to one."""

    modes: int
    distance: float
    shares: tuple[float, ...]


def score(points: Tensor, shift: Tensor = SHIFT) -> Score:
    """Compare points [n, 2] with the ring moved by `shift`."""
    distance, nearest = torch.cdist(points, mode_centres() + shift).min(dim=1)
    close = distance < RADIUS * math.sin(math.pi / MODES)
    shares = tuple(float(((nearest == m) & close).float().mean()) for m in range(MODES))
    return Score(sum(s >= 0.02 for s in shares), float(distance.mean()), shares)


def picture(panels: dict[str, Tensor], out: Path, side: int = 320) -> None:
    """Draw each cloud with the target's modes (circles) and the ten points (crosses)."""
    sheet = Image.new("RGB", (side * len(panels), side + 24), "white")
    pen = ImageDraw.Draw(sheet)

    def place(xy: Tensor, i: int) -> tuple[float, float]:
        return i * side + (float(xy[0]) + 1.25) / 2.5 * side, 24 + (1.25 - float(xy[1])) / 2.5 * side

    for i, (name, points) in enumerate(panels.items()):
        pen.text((i * side + 8, 6), name, fill="black")
        for point in points:
            x, y = place(point, i)
            pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(70, 110, 200))
        for centre in mode_centres() + SHIFT:
            x, y = place(centre, i)
            pen.ellipse((x - 14, y - 14, x + 14, y + 14), outline=(200, 120, 40))
        for point in target_points().flatten(1):
            x, y = place(point, i)
            pen.line((x - 3, y - 3, x + 3, y + 3), fill=(200, 30, 30))
            pen.line((x - 3, y + 3, x + 3, y - 3), fill=(200, 30, 30))
    sheet.save(out)


def run(length: Length = Length(), a: float = 0.5, **numbers: object) -> dict[str, Tensor]:
    """Train everything; samples of the source model, the fine-tuned one, the a = 1 student and the Uni-DAD student."""
    source = train_source(length)
    return {
        "source, 50 steps": sample(source, few_steps=False),
        "fine-tuned, 50 steps": sample(finetune(source, length), few_steps=False),
        f"target teacher alone (a = 1), {STEPS} steps": sample(train_student(source, 1.0, length, **numbers)),
        f"Uni-DAD (a = {a:g}), {STEPS} steps": sample(train_student(source, a, length, **numbers)),
    }


def main() -> None:
    """Train, print the scores, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("toy2d.png"))
    parser.add_argument("--a", type=float, default=0.5)
    args = parser.parse_args()
    panels = run(a=args.a)
    for name, points in panels.items():
        s = score(points)
        print(f"{name:42s} modes {s.modes}/{MODES}   mean distance to a target mode {s.distance:.3f}")
    picture(panels, args.out)
    print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
