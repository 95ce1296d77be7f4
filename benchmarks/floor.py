"""What a Frechet distance means here: held-out pictures against each other, with grain, and what the ten pictures alone
can give: themselves repeated, all that their parts and colours make when they are put together anew, and what `recombine` makes of them.

python benchmarks/floor.py --target toonHead      draws the held-out pictures first, as avatarshift.py does
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from avatarshift import ROOT, drawn, find_target

from unidad.backbones.load import bundled_names
from unidad.data import load_folder
from unidad.metrics.distances import frechet_distance
from unidad.metrics.features import EfficientNetLite0
from unidad.recombine import with_more


def noisy(pixels: Tensor, grain: int) -> Tensor:
    """Pictures [N, 3, H, W] uint8 with Gaussian noise of that standard deviation."""
    noise = grain * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels.float() + noise).round().clamp(0, 255).to(torch.uint8)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="toonHead")
    parser.add_argument("--heldout", type=Path, default=ROOT / "data" / "heldout")
    args = parser.parse_args()
    target, features = find_target(args.target, args.heldout), EfficientNetLite0()
    pixels, ten = load_folder(target.heldout, 32).pixels, load_folder(target.train, 32)
    first, reference = pixels[:1000], features(pixels[1000:2000])
    print(f"1,000 held-out pictures against 1,000 others: {frechet_distance(features(first), reference):.1f}")
    for grain in (1, 2, 3, 5):
        print(f"with noise of {grain}/255: {frechet_distance(features(noisy(first, grain)), reference):.1f}")
    if args.target in bundled_names("targets"):  # of other folders nobody knows the parts
        parts = drawn(target.name, args.heldout.parent / "recombined" / target.name, 1000, "recombined", "--parts-of", "target")
        anew = load_folder(parts, 32).pixels
        print(f"the ten pictures' parts and colours, put together anew: {frechet_distance(features(anew), reference):.1f}")
        print(f"the same with noise of 2/255: {frechet_distance(features(noisy(anew, 2)), reference):.1f}")
    made = with_more(ten, 1000, 0, target.train).more
    if made is not None:
        print(f"the ten pictures recombined (the setting recombine): {frechet_distance(features(made), reference):.1f}")
    repeated = ten.pixels[torch.arange(1000) % len(ten)]
    print(f"the ten pictures, repeated: {frechet_distance(features(repeated), reference):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
