"""Intra-LPIPS once over the features against pair-by-pair calls: the same number, and how much sooner.

    python benchmarks/intra_lpips.py --net alex --n 1000 --out benchmarks/results/intra_lpips_alex.json

Random weights of the true architecture give the true speed, so that no file is needed. Pair by pair means what the public code
does: both pictures of a pair go through the network, one pair a call, for the assignment and inside the clusters. `--pairs`
measures so many of its calls only and says how long all would take; without it all are made and the two scores are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from unidad.metrics.lpips import Lpips, intra_lpips, weight_shapes
from unidad.report import peak_memory

TARGETS, PER_CLUSTER = 10, 100


def random_weights(net: str) -> dict[str, Tensor]:
    """Weights that keep the features' scale from layer to layer; linear ones in 0..1."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in weight_shapes(net).items():
        fan = torch.Size(shape[1:]).numel()
        values = torch.rand(shape, generator=generator) if key.startswith("lin") else torch.randn(shape, generator=generator)
        state[key] = values if key.startswith("lin") else values * (2 / max(1, fan)) ** 0.5
    return state


def pictures(n: int, size: int) -> tuple[Tensor, Tensor]:
    """n pictures, each half way between one of ten targets and noise, hence ten clusters of n / 10; and the targets."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 256, (TARGETS, 3, size, size), dtype=torch.uint8, generator=generator)
    noise = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return targets[torch.arange(n) % TARGETS] // 2 + noise // 2, targets


def pair(extractor: Lpips, a: Tensor, b: Tensor) -> float:
    """One call: LPIPS of two pictures [3, H, W]."""
    first, second = next(extractor.batches(a[None])), next(extractor.batches(b[None]))
    return float((first - second).square().sum())


def pair_by_pair(extractor: Lpips, fake: Tensor, targets: Tensor) -> float:
    """Intra-LPIPS with one call a pair."""
    clusters: list[list[Tensor]] = [[] for _ in targets]
    for picture in fake:
        distances = torch.tensor([pair(extractor, picture, target) for target in targets])
        clusters[int(distances.argmin())].append(picture)
    means = []
    for members in clusters:
        found = [pair(extractor, a, b) for a, b in itertools.combinations(members[:PER_CLUSTER], 2)]
        if found:
            means.append(sum(found) / len(found))
    return sum(means) / len(means)


def count_pairs(n: int) -> int:
    """Calls that `pair_by_pair` makes for n pictures in ten equal clusters."""
    sizes = [min(PER_CLUSTER, len(range(c, n, TARGETS))) for c in range(TARGETS)]
    return n * TARGETS + sum(size * (size - 1) // 2 for size in sizes)


def measure(net: str, n: int, size: int, pairs: int | None, batch_size: int) -> dict[str, object]:
    """Seconds of both ways on this machine, and the scores that were computed."""
    extractor = Lpips(net, random_weights(net), "random", batch_size)
    fake, targets = pictures(n, size)
    pair(extractor, fake[0], fake[1])  # the first call of a network is slower
    began = time.perf_counter()
    once, _ = intra_lpips(extractor, fake, targets, PER_CLUSTER)
    once_seconds = time.perf_counter() - began
    peak = peak_memory()
    total = count_pairs(n)
    began = time.perf_counter()
    if pairs is None:
        by_pairs = pair_by_pair(extractor, fake, targets)
        pair_seconds = time.perf_counter() - began
    else:
        by_pairs = None
        for i in range(pairs):
            pair(extractor, fake[i % n], fake[(i + 1) % n])
        pair_seconds = (time.perf_counter() - began) * total / pairs
    return {
        "net": net,
        "n": n,
        "size": size,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "calls": total,
        "calls_made": total if pairs is None else pairs,
        "seconds_once": round(once_seconds, 2),
        "peak_memory_once": peak,
        "seconds_pair_by_pair": round(pair_seconds, 2),
        "times_faster": round(pair_seconds / once_seconds, 1),
        "score_once": once.value,
        "score_pair_by_pair": by_pairs,
        "relative_difference": None if by_pairs is None else abs(by_pairs - once.value) / by_pairs,
    }


def main() -> None:
    """Print the measurement as JSON, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("vgg", "alex"), default="alex")
    parser.add_argument("--n", type=int, default=1000, help="pictures (1000)")
    parser.add_argument("--size", type=int, default=32, help="their side in pixels, at least 32 (32)")
    parser.add_argument("--pairs", type=int, metavar="P", help="make only P of the calls and extrapolate")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time, once over (16)")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    text = json.dumps(measure(args.net, args.n, args.size, args.pairs, args.batch_size), indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
