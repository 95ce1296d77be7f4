"""The bundled 3-step student, regressed onto the source teacher's ODE (as in DMD, arXiv 2311.18828, section 4.2).

    python scripts/avatars/distill.py --source runs/avatars --out runs/avatars-regressed --count 49152 --batch-size 512 --minutes 0.5 --compile

Draws trajectories once (where the teacher's DDIM stands at each of the student's timesteps, and where it ends), then trains the student to
jump from the one to the other; at the last timestep every other picture is what it drew itself at the one before, noised. The bundled one
had 532 updates on an H100, on trajectories of first order. The student is in --out/student; `unidad distill` with `distill.yaml` then goes
on from it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unidad.backbones.load import load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.device import pick_device, use_bf16
from unidad.export import save_student
from unidad.rollout import ddim_trajectory

GRID = "fine"
PER_STEP = (12, 18, 10)  # DDIM evaluations from each of the student's timesteps to the next
AT_ONCE = 1024  # trajectories
WEIGHTS = (1.0, 1.5, 10.0)  # of the three timesteps: what the last leaves undone stays in the picture
SMOOTH = 0.01  # of the loss, which is quadratic below it and absolute above


def trajectories(teacher: UNet2DBackbone, steps: list[int], count: int, generator: torch.Generator) -> Tensor:
    """[count, 4, C, H, W] float16 on the generator's device: x at each of the three timesteps, and the end."""
    done, device = [], generator.device
    for start in range(0, count, AT_ONCE):
        noise = torch.randn((min(AT_ONCE, count - start), *teacher.shape), generator=generator, device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=use_bf16("auto", device)):
            done.append(ddim_trajectory(teacher, noise, steps, PER_STEP).half())
    return torch.cat(done)


def batch_of(
    data: Tensor, averaged: UNet2DBackbone, steps: list[int], n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the place k of its timestep and the end of its trajectory, n of each; own drawings among those at the last timestep."""
    device = data.device
    k = torch.arange(n, device=device) % len(steps)
    paths = data[torch.randint(0, len(data), (n,), generator=generator, device=device)].float()
    x = paths[torch.arange(n, device=device), k].clone()
    own = torch.arange(len(steps) - 1, n, 2 * len(steps), device=device)  # every other one at the last timestep
    before = torch.full_like(own, steps[-2])
    with torch.no_grad():
        drawn = averaged.x0(paths[own, len(steps) - 2], before).float()
    noise = torch.randn(drawn.shape, generator=generator, device=device)
    x[own] = averaged.schedule.add_noise(drawn, noise, torch.full_like(own, steps[-1]))
    return x, k, paths[:, -1]


def regress(
    student: UNet2DBackbone, data: Tensor, steps: list[int], args: argparse.Namespace, generator: torch.Generator
) -> UNet2DBackbone:
    """Train in place with a smooth L1 loss on the x0-prediction; returns the averaged weights."""
    device = data.device
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    table, weights = torch.tensor(steps, device=device), torch.tensor(WEIGHTS, device=device)
    began = time.monotonic()
    for i in range(args.updates):
        done = i / args.updates
        if args.minutes:  # the rate falls with the clock
            done = (time.monotonic() - began) / 60 / args.minutes
            if done >= 1:
                break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (i + 1) / 100) * (0.005 + 0.4975 * (1 + math.cos(math.pi * done)))
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16("auto", device)):
            x_t, k, clean = batch_of(data, average.module, steps, args.batch_size, generator)
            error = student.x0(x_t, table[k]).float() - clean
        loss = (((error**2 + SMOOTH**2).sqrt() - SMOOTH).mean(dim=(1, 2, 3)) * weights[k]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(student)
        began = began if i else time.monotonic()  # without compiling
        if i % 200 == 0:
            print(f"update {i}: {loss.item():.4f}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{i} updates")
    averaged = average.module.eval()
    assert isinstance(averaged, UNet2DBackbone)
    return averaged


def main() -> None:
    """Trajectories, then the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="bundled:avatars")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=81_920, help="trajectories (81,920: 2 GB)")
    parser.add_argument("--updates", type=int, default=12_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="of updates, at the most")
    parser.add_argument("--batch-size", type=int, default=384)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(0)
    model = load_model(args.source)
    student = model.backbone.to(device)
    assert isinstance(student, UNet2DBackbone)
    steps = student.schedule.student_steps(3, GRID)
    generator = torch.Generator(device).manual_seed(77_000)
    data = trajectories(student.eval(), steps, args.count, generator)
    print(f"{len(data)} trajectories", flush=True)
    if args.compile:
        student.compile_unet()
    averaged = regress(student.train().requires_grad_(True), data, steps, args, generator)
    facts = {"about": "Draws like its source in 3 steps.", "source": args.source, "target": "none"}
    facts["made"] = "Regressed onto the ends of the source's DDIM trajectories (scripts/avatars/distill.py)."
    save_student(averaged.cpu(), model.scheduler, steps, args.out / "student", facts, half=True)


if __name__ == "__main__":
    main()
