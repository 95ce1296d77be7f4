"""The bundled 3-step student, regression onto the source teacher's ODE (as in DMD, arXiv 2311.18828, section 4.2).

    python scripts/avatars/regress.py --out runs/avatars-3step-regressed

Draws pairs once (where the teacher's DDIM stands at each of the student's timesteps, and where it ends), then trains the student to
jump from the one to the other. About an hour and a half on one CPU core. Pairs are kept in --out, the student in --out/student.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unidad.backbones.load import load_model
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.export import save_student
from unidad.rollout import ddim_trajectory

PER_STEP = (5, 5, 8)  # DDIM evaluations from each of the student's timesteps to the next
CHUNK, BATCH, SMOOTH = 4096, 48, 0.02
WEIGHTS = (1.0, 1.5, 2.5)  # of the three timesteps: what the last leaves undone stays in the picture


def trajectories(teacher: UNet2DBackbone, steps: list[int], seed: int) -> Tensor:
    """[CHUNK, 4, C, H, W] float16: x at each of the three timesteps, and the end."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((CHUNK, *teacher.shape), generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.cat([ddim_trajectory(teacher, batch, steps, PER_STEP) for batch in noise.split(64)]).half()


def pairs(teacher: UNet2DBackbone, steps: list[int], chunks: int, folder: Path) -> Tensor:
    """All trajectories, those that are not in `folder` drawn first."""
    for i in range(chunks):
        file = folder / f"pairs-{i:03d}.pt"
        if not file.exists():
            torch.save(trajectories(teacher, steps, 77_000 + i), file)
            print(file, flush=True)
    return torch.cat([torch.load(folder / f"pairs-{i:03d}.pt") for i in range(chunks)])


def regress(student: UNet2DBackbone, data: Tensor, steps: list[int], updates: int, rate: float) -> AveragedModel:
    """Train in place with a smooth L1 loss on the x0-prediction; returns the averaged weights."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    generator = torch.Generator().manual_seed(0)
    k = torch.arange(BATCH) % len(steps)
    t, weight = torch.tensor(steps)[k], torch.tensor(WEIGHTS)[k]
    for i in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (i + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * i / updates)))
        batch = data[torch.randint(0, len(data), (BATCH,), generator=generator)].float()
        with torch.autocast("cpu", torch.bfloat16):
            error = student.x0(batch[torch.arange(BATCH), k], t).float() - batch[:, -1]
        loss = (((error**2 + SMOOTH**2).sqrt() - SMOOTH).mean(dim=(1, 2, 3)) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(student)
        if i % 100 == 0:
            print(f"update {i} of {updates}: {loss.item():.4f}", flush=True)
    return average


def main() -> None:
    """Pairs, then the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="bundled:avatars")
    parser.add_argument("--chunks", type=int, default=6, help=f"of {CHUNK} pairs (6)")
    parser.add_argument("--updates", type=int, default=7500)
    parser.add_argument("--rate", type=float, default=4e-4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = load_model(args.source)
    assert isinstance(model.backbone, UNet2DBackbone)
    steps = model.backbone.schedule.student_steps(3)
    data = pairs(model.backbone, steps, args.chunks, args.out)
    student = model.backbone.train().requires_grad_(True)
    averaged = regress(student, data, steps, args.updates, args.rate).module.eval()
    assert isinstance(averaged, UNet2DBackbone)
    facts = {"about": "Draws like its source in 3 steps.", "source": args.source, "target": "none"}
    facts["made"] = "Regressed onto the ends of the source's DDIM trajectories (scripts/avatars/regress.py)."
    save_student(averaged, model.scheduler, steps, args.out / "student", facts, half=True)


if __name__ == "__main__":
    main()
