"""The bundled 3-step student, second part: its last step moved to little noise (the grid "fine"), its first two kept.

    node draw.mjs --domain source --count 6000 --prefix train --out data/source
    python scripts/avatars/last_step.py --data data/source --student runs/avatars-3step-regressed/student --out runs/avatars-3step

At the new last timestep the student learns to denoise pictures of the source domain; at the other two it is held to what it says
already. About half an hour on one CPU core. (The bundled one had 260 updates at t = 63 before these.)
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from unidad.backbones.load import load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.data import load_folder
from unidad.export import save_student

PICTURES, KEPT = 16, 4  # in a batch: at the last timestep, and at each of the others
RATE, UPDATES = 4e-4, 2000


def batch(before: UNet2DBackbone, pixels: Tensor, steps: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the x0 to be predicted: pictures noised to the last timestep, and the rollout of the student as it was."""
    schedule, states, times, clean = before.schedule, [], [], []

    def noised(x: Tensor, tau: int) -> Tensor:
        t = torch.full((len(x),), tau)
        states.append(schedule.add_noise(x, torch.randn(x.shape, generator=generator), t))
        times.append(t)
        return states[-1]

    chosen = pixels[torch.randint(0, len(pixels), (PICTURES,), generator=generator)].float() / 127.5 - 1
    noised(chosen, steps[-1])
    clean.append(chosen)
    xhat = torch.zeros(KEPT, *before.shape)
    for i, tau in enumerate(steps[:-1]):
        if i:
            x_t = noised(xhat, tau)
        else:
            x_t = torch.randn(xhat.shape, generator=generator)
            states.append(x_t)
            times.append(torch.full((KEPT,), tau))
        with torch.no_grad():
            xhat = before.x0(x_t, times[-1])
        clean.append(xhat)
    return torch.cat(states), torch.cat(times), torch.cat(clean)


def train(student: UNet2DBackbone, before: UNet2DBackbone, pixels: Tensor, steps: list[int]) -> AveragedModel:
    """Train in place on the v-weighted error; returns the averaged weights."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average = AveragedModel(student, avg_fn=lambda kept, new, n: kept.lerp(new, 1 - min(0.995, (1 + float(n)) / (10 + float(n)))))
    for i in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (i + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * i / UPDATES)))
        x_t, t, clean = batch(before, pixels, steps, generator)
        sigma = student.schedule.alpha_sigma(t)[1]
        loss = ((student.x0(x_t, t) - clean) / sigma).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
        if i % 100 == 0:
            print(f"update {i} of {UPDATES}: {loss.item():.4f}", flush=True)
    return average


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = load_model(args.student)
    before = model.backbone.eval().requires_grad_(False)
    assert isinstance(before, UNet2DBackbone)
    steps = before.schedule.student_steps(3, "fine")
    student = copy.deepcopy(before).train().requires_grad_(True)
    averaged = train(student, before, load_folder(args.data, before.shape[-1]).pixels, steps).module.eval()
    assert isinstance(averaged, UNet2DBackbone)
    facts = {"about": "Draws like its source in 3 steps.", "source": "bundled:avatars", "target": "none"}
    facts["made"] = (
        "Regressed onto the ends of the source's DDIM trajectories (scripts/avatars/regress.py), then its last step moved to less noise "
        "(scripts/avatars/last_step.py)."
    )
    save_student(averaged, model.scheduler, steps, args.out, facts, half=True)


if __name__ == "__main__":
    main()
