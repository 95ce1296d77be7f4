"""Uni-DAD on points of the plane: a source of six clusters, a target that moved, and ten points of it in five clusters only.

    python examples/toy2d.py --out toy2d.png

The clusters of the target lie further out than those of the source. From ten points, two in each of five clusters, three students
are trained that draw in 3 steps: with the target teacher alone (a = 1), with the GAN alone, and by Uni-DAD with both teachers and
the GAN. The first two lose the cluster that the ten points leave out; Uni-DAD keeps it and still moves the others outwards.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from unidad.backbones.base import Backbone, Granularity
from unidad.heads import MultiHead
from unidad.methods.base import Method, only_training
from unidad.methods.finetune import Finetune
from unidad.methods.objective import Objective
from unidad.methods.unidad import UniDAD
from unidad.noise import NoiseSchedule
from unidad.rollout import rollout, seeded_noise

CLUSTERS, WIDTH, RADIUS, MOVE = 6, 0.06, 0.6, 0.15
LEFT_OUT = 0
STEPS = 3
VARIANTS = {"target teacher alone": 1.0, "GAN alone": None, "Uni-DAD": 0.25}  # their a; None: no DMD


class Plane(Backbone):
    """A small MLP over points, shaped [B, 2, 1, 1] like pictures of one pixel with two channels; predicts v."""

    prediction_type = "v_prediction"
    shape = (2, 1, 1)

    def __init__(self, width: int = 128):
        super().__init__()
        self.schedule = NoiseSchedule(torch.cos(torch.linspace(0.02, math.pi / 2 - 0.01, 1000)) ** 2)
        self.first = nn.Linear(2 + 12 + 8, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 2)

    def _hidden(self, x_t: Tensor, t: Tensor) -> list[Tensor]:
        x, u = x_t.flatten(1), t[:, None] / len(self.schedule)
        waves = [f(k * x) for k in (3, 6, 12) for f in (torch.sin, torch.cos)]
        times = [f(k * math.pi * u) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
        h, outputs = torch.nn.functional.silu(self.first(torch.cat([x, *waves, *times], dim=1))), []
        for layer in self.body:
            h = h + torch.nn.functional.silu(layer(h))
            outputs.append(h[:, :, None, None])
        return outputs

    def x0(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """alpha x_t - sigma v."""
        return self.x0_and_features(x_t, t)[0]

    def features(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage") -> list[Tensor]:
        """The hidden layers' outputs."""
        return self._hidden(x_t, t)

    def x0_and_features(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, granularity: Granularity = "stage"
    ) -> tuple[Tensor, list[Tensor]]:
        """Both."""
        hidden = self._hidden(x_t, t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return alpha * x_t - sigma * self.last(hidden[-1].flatten(1))[:, :, None, None], hidden

    def feature_channels(self, granularity: Granularity = "stage") -> list[int]:
        """Width of each hidden layer."""
        return [layer.out_features for layer in self.body]


def centres(radius: float) -> Tensor:
    """[CLUSTERS, 2]."""
    angle = 2 * math.pi * torch.arange(CLUSTERS) / CLUSTERS
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def draw(radius: float, which: Tensor, generator: torch.Generator) -> Tensor:
    """One point [2, 1, 1] of each cluster named in `which`."""
    points = centres(radius)[which] + WIDTH * torch.randn((len(which), 2), generator=generator)
    return points[:, :, None, None]


def fit(method: Method, data: Tensor, cycles: int, rates: dict[str, float], generator: torch.Generator, batch: int = 256) -> None:
    """The whole loop: the phases of each cycle in order, one optimizer for each network, the rate falling to 0."""
    optimizers = {name: torch.optim.AdamW(method.networks[name].parameters(), lr=rates[name], betas=(0.5, 0.99)) for name in rates}
    for cycle in range(cycles):
        for phase in method.cycle_phases(cycle):
            for _ in range(phase.repeats):
                real = data[torch.randint(len(data), (batch,), generator=generator)]
                with only_training(method.networks, phase.trains):
                    phase.loss(real)["total"].backward()
                for name in phase.trains:
                    for group in optimizers[name].param_groups:
                        group["lr"] = rates[name] * (1 - cycle / cycles)
                    nn.utils.clip_grad_norm_(method.networks[name].parameters(), 1.0)
                    optimizers[name].step()
                    optimizers[name].zero_grad()


def train_source(generator: torch.Generator) -> Plane:
    """The source model: plain diffusion training on as many points as it likes."""
    model = Plane()
    data = draw(RADIUS, torch.randint(CLUSTERS, (20000,), generator=generator), generator)
    fit(Finetune(model, generator, "v"), data, 1500, {"model": 2e-3}, generator)
    return model.requires_grad_(False)


def adapt(source: Plane, ten: Tensor, a: float | None, cycles: int = 500, seed: int = 1) -> Plane:
    """A student in one stage; `a` as in METHOD §4, None for the GAN alone."""
    objective = Objective(
        a=a or 0.0,
        dmd_weight=0.0 if a is None else 1.0,
        gan_weight=0.1,
        disc_weight=0.1,
        denoising="v",
        fake_updates=3,
        timestep_law="karras",
    )
    torch.manual_seed(seed)
    student = copy.deepcopy(source)
    method = UniDAD(
        student=student,
        source_teacher=source if objective.uses_source else None,
        fake_teacher=copy.deepcopy(source),
        target_teacher=copy.deepcopy(source) if objective.uses_target else None,
        heads=MultiHead(source.feature_channels()),
        objective=objective,
        student_steps=source.schedule.student_steps(STEPS),
        batch_size=256,
        generator=torch.Generator().manual_seed(seed),
        target_warmup=100,
    )
    rates = {name: 5e-4 if name == "student" else 1e-3 for name in method.trained()}
    fit(method, ten, cycles, rates, method.generator)
    return student


def sample(student: Plane, n: int = 2000) -> Tensor:
    """Points [n, 2] in STEPS steps."""
    with torch.no_grad():
        return rollout(student, seeded_noise(range(n), student.shape), student.schedule.student_steps(STEPS)).flatten(1)


def shares(points: Tensor) -> Tensor:
    """Share of the points [n, 2] that belong to each cluster, be it at the source's place, the target's, or between: [CLUSTERS]."""
    along = points @ centres(1.0).T
    aside = (points.norm(dim=1, keepdim=True) ** 2 - along**2).clamp_min(0).sqrt()
    belongs = (aside < 3 * WIDTH) & (along > RADIUS - 3 * WIDTH) & (along < RADIUS + MOVE + 3 * WIDTH)
    return belongs.float().mean(dim=0)


def panel(points: Tensor, title: str, ten: Tensor, size: int = 300) -> Image.Image:
    """The points in blue, the ten in red, circles of two widths round the source's clusters (grey) and the target's (black)."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)

    def disc(centre: Tensor, radius: float, **style: str) -> None:
        (x, y), r = ((centre + 1.1) / 2.2 * size).tolist(), radius / 2.2 * size
        pen.ellipse((x - r, y - r, x + r, y + r), **style)

    for point in points:
        disc(point, 0.006, fill="#4a78c8")
    for radius, colour in ((RADIUS, "#bbbbbb"), (RADIUS + MOVE, "black")):
        for centre in centres(radius):
            disc(centre, 2 * WIDTH, outline=colour)
    for point in ten.flatten(1):
        disc(point, 0.025, fill="#d03030")
    pen.text((6, 4), title, fill="black")
    return image


def main(out: str) -> dict[str, tuple[Tensor, float]]:
    """Trains all, prints a table, writes the picture; gives each variant's shares and mean distance from the middle."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    source = train_source(generator)
    seen = torch.tensor([c for c in range(CLUSTERS) if c != LEFT_OUT]).repeat(2)
    ten = draw(RADIUS + MOVE, seen, generator)
    clouds = {"source": draw(RADIUS, torch.arange(2000) % CLUSTERS, generator).flatten(1)}
    clouds["target"] = draw(RADIUS + MOVE, torch.arange(2000) % CLUSTERS, generator).flatten(1)
    clouds |= {name: sample(adapt(source, ten, a)) for name, a in VARIANTS.items()}
    results, strip = {}, Image.new("RGB", (300 * len(clouds), 300), "white")
    print(f"{'':22} distance from the middle   share of the cluster left out   of all six")
    for i, (name, points) in enumerate(clouds.items()):
        share, distance = shares(points), float(points.norm(dim=1).mean())
        results[name] = (share, distance)
        print(f"{name:22} {distance:24.3f}   {float(share[LEFT_OUT]):29.1%}   {float(share.sum()):10.1%}")
        strip.paste(panel(points, name, ten), (300 * i, 0))
    strip.save(out)
    print(f"Picture: {out}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Uni-DAD on points of the plane.")
    parser.add_argument("--out", default="toy2d.png", help="the picture to write")
    main(parser.parse_args().out)
