"""Does the source model, beside one fine-tuned to ten pictures, draw better pictures of their domain? DDIM with both, scored.

    python benchmarks/two_teachers.py runs/bench-short/toonHead/ft-seed0 --target toonHead --until 900 800 --away 0.25 0.6

`--until T`: the source model above timestep T, the fine-tuned one below. `--from T`: the source model below T. `--away G`: the fine-tuned
model's x0-prediction and G times its difference from the source model's. A first row is the fine-tuned model alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from avatarshift import ROOT, SAMPLE_SEED, find_target
from torch import Tensor

from unidad.backbones.base import Backbone
from unidad.commands import load_product
from unidad.data import load_folder, to_uint8
from unidad.metrics.evaluate import evaluate
from unidad.metrics.features import EfficientNetLite0
from unidad.rollout import ddim_states, seeded_noise

Prediction = Callable[[Tensor, Tensor], Tensor]
SHOWN = ("frechet_distance", "kernel_distance", "precision", "recall", "intra_diversity", "copying")


class Mixed:
    """As much of a Backbone as DDIM needs, with an x0-prediction made of two models'."""

    def __init__(self, like: Backbone, prediction: Prediction):
        self.schedule, self.bounded, self._prediction = like.schedule, like.bounded, prediction

    def x0(self, x: Tensor, t: Tensor, _labels: Tensor | None = None) -> Tensor:
        return self._prediction(x, t)


def rows(source: Backbone, tuned: Backbone, args: argparse.Namespace) -> dict[str, Prediction]:
    """Every mixture asked for, by its name."""

    def between(above: Backbone, below: Backbone, limit: int) -> Prediction:
        return lambda x, t: (above if int(t[0]) > limit else below).x0(x, t)

    def away(g: float) -> Prediction:
        return lambda x, t: torch.lerp(source.x0(x, t), tuned.x0(x, t), 1 + g)

    found = {"fine-tuned": tuned.x0}
    found |= {f"source until {limit}": between(source, tuned, limit) for limit in args.until}
    found |= {f"source from {limit}": between(tuned, source, limit) for limit in args.end}
    return found | {f"away {g}": away(g) for g in args.away}


@torch.no_grad()
def drawn(model: Mixed, n: int, steps: int, shape: tuple[int, ...]) -> Tensor:
    """n pictures, uint8; steps are a little denser towards the end."""
    last = len(model.schedule) - 1
    taus = [round(last * (1 - i / steps) ** 1.3) for i in range(steps)]
    done = []
    for start in range(0, n, 50):
        noise = seeded_noise(range(SAMPLE_SEED + start, SAMPLE_SEED + min(start + 50, n)), shape)()
        *_, (_, end) = ddim_states(model, noise, taus)  # type: ignore[arg-type]
        done.append(to_uint8(end))
    return torch.cat(done)


def main() -> None:
    """Draw, score and print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished `unidad finetune`")
    parser.add_argument("--target", required=True)
    parser.add_argument("--until", type=int, nargs="+", default=[])
    parser.add_argument("--from", type=int, nargs="+", default=[], dest="end")
    parser.add_argument("--away", type=float, nargs="+", default=[])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--heldout", type=Path, default=ROOT / "data" / "heldout")
    args = parser.parse_args()
    source, tuned = (load_product(name).backbone for name in ("bundled:avatars", args.run))
    target, extractor, size = find_target(args.target, args.heldout), EfficientNetLite0(), tuned.shape[-1]
    reference, train = (load_folder(folder, size).pixels for folder in (target.heldout, target.train))
    for name, prediction in rows(source, tuned, args).items():
        samples = drawn(Mixed(tuned, prediction), args.n, args.steps, tuned.shape)
        scores = evaluate(samples, reference, train, extractor, cache_dir=Path(args.run) / "features")
        print(name, *(f"{key} {scores[key]:.3g}" for key in SHOWN), sep="  ", flush=True)


if __name__ == "__main__":
    main()
