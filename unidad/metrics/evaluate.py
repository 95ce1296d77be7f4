"""One call from pictures to all scores, the scores as a table for the terminal, and a panel that shows suspected copies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unidad.data import picture_grid
from unidad.errors import DataError
from unidad.metrics import distances
from unidad.metrics.features import Extractor, check_pixels, features_of, resized

_ROWS = (
    ("frechet_distance", "Frechet distance", "lower"),
    ("kernel_distance", "kernel distance", "lower"),
    ("precision", "precision", "higher"),
    ("recall", "recall", "higher"),
    ("density", "density", "higher"),
    ("coverage", "coverage", "higher"),
    ("intra_diversity", "intra diversity", "higher"),
    ("copying", "copying", "lower"),
)

_TRAINING_KEYS = ("heldout", "intra_diversity", "intra_clusters", "intra_small", "copying", "copying_threshold", "nearest")


def evaluate(
    samples: Tensor,
    reference: Tensor,
    train: Tensor | None,
    extractor: Extractor,
    n: int | None = None,
    *,
    k: int = 5,
    mode: distances.IntraMode = "correct",
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Score drawn pictures: Frechet and kernel distance, precision, recall, density, coverage, intra diversity, copying.

    Args:
        samples: [N, 3, H, W] uint8, what the generator drew; N >= 2.
        reference: [M, 3, H, W] uint8, pictures of the target domain, more than the training set; M >= 2.
        train: [L, 3, H, W] uint8, what it learned from; None leaves out intra diversity and copying. Reference pictures
            that are equal to one of these do not count as held out.
        extractor: judges all three sets; its name and digest stand in the result.
        n: score the first n samples only; None scores all.
        k: neighbours for precision, recall, density, coverage.
        mode: "correct" or "paper", see `distances.intra_diversity`.
        cache_dir: keep features there, see `features_of`. The samples' are not kept: they are seldom scored twice.

    Returns:
        Ready for JSON: scores (None where one cannot be had, e.g. a set of k pictures or fewer), the facts they depend on,
        and under "nearest" each sample's nearest training picture (index) and distance.

    Raises:
        DataError: if pictures are not uint8 [N, 3, H, W], or there are fewer than 2 or than n.
        ValueError: for an unknown mode or k < 1.
    """
    if n is not None and n > len(samples):
        raise DataError(f"Asked to score {n} samples, but there are only {len(samples)}. Draw more or ask for fewer.")
    samples = samples[:n]
    for what, pixels in (("samples", samples), ("reference", reference), *(() if train is None else (("train", train),))):
        check_pixels(pixels)
        if len(pixels) < 2 and what != "train":
            raise DataError(f"Scores need at least 2 pictures in '{what}', there is {len(pixels)}.")
    fake, real = features_of(extractor, samples), features_of(extractor, reference, cache_dir)
    scores: dict[str, Any] = {
        "extractor": extractor.name,
        "digest": extractor.digest,
        "samples": len(samples),
        "reference": len(reference),
        "train": 0 if train is None else len(train),
        "k": k,
        "mode": mode,
        "frechet_distance": distances.frechet_distance(real, fake),
        "kernel_distance": distances.kernel_distance(real, fake),
    }
    enough = min(len(real), len(fake)) > k
    scores |= distances.prdc(real, fake, k) if enough else dict.fromkeys(("precision", "recall", "density", "coverage"))
    if train is None:
        return scores | dict.fromkeys(_TRAINING_KEYS)
    heldout = real[_unseen(reference, train)]
    return scores | _against_training(fake, features_of(extractor, train, cache_dir), heldout, mode)


def _against_training(fake: Tensor, train: Tensor, heldout: Tensor, mode: distances.IntraMode) -> dict[str, Any]:
    intra = distances.intra_diversity(fake, train, mode=mode)
    copied = distances.copying(fake, train, heldout) if len(heldout) else None
    found = copied.nearest if copied else distances.nearest(fake, train)
    return {
        "heldout": len(heldout),
        "intra_diversity": intra.value if intra.clusters else None,
        "intra_clusters": intra.clusters,
        "intra_small": intra.small,
        "copying": copied.share if copied else None,
        "copying_threshold": copied.threshold if copied else None,
        "nearest": {"index": found.index.tolist(), "distance": found.distance.tolist()},
    }


def _unseen(reference: Tensor, train: Tensor) -> Tensor:
    """[M] bool: which reference pictures are not among the training pictures, pixel for pixel."""
    known = {_picture_digest(picture) for picture in train}
    return torch.tensor([_picture_digest(picture) not in known for picture in reference])


def _picture_digest(picture: Tensor) -> bytes:
    return hashlib.sha256(f"{list(picture.shape)}".encode() + picture.cpu().contiguous().numpy().tobytes()).digest()


def table(scores: Mapping[str, Any]) -> str:
    """The result of `evaluate` as plain text: facts in the first line, then a line for each score."""
    sets = f"{scores['samples']} samples, {scores['reference']} reference, {scores['train']} training pictures"
    lines = [f"{sets}; features: {scores['extractor']} ({scores['digest'][:8]})"]
    for key, label, better in _ROWS:
        value = scores.get(key)
        note = "; new pictures of the domain itself score 0.05" if key == "copying" else ""
        lines.append(f"  {label:<18}{'-' if value is None else format(value, '.4f'):>12}  {better} is better{note}")
    if scores.get("intra_small"):
        treated = "scored 0" if scores["mode"] == "paper" else "left out"
        lines.append(
            f"  {scores['intra_small']} of {scores['train']} training pictures have fewer than 2 samples near them: {treated}."
        )
    return "\n".join(lines)


def nearest_panel(
    samples: Tensor, train: Tensor, nearest: Mapping[str, Sequence[float]], count: int = 10, scale: int = 2
) -> Image.Image:
    """Two rows: the samples closest to the training set, closest first, and below each its nearest training picture.

    Args:
        samples: [N, 3, H, W] uint8, those that were scored.
        train: [L, 3, h, w] uint8; shown at the samples' size.
        nearest: "index" and "distance" for each sample, as `evaluate` returns them under "nearest".
        count: how many samples at the most.
        scale: enlarge so many times.

    Raises:
        DataError: if `nearest` holds fewer entries than it needs, or names a picture that `train` does not have.
    """
    index, distance = torch.tensor(nearest["index"], dtype=torch.int64), torch.tensor(nearest["distance"], dtype=torch.float64)
    if not 0 < len(index) == len(distance) <= len(samples) or int(index.max()) >= len(train) or count < 1:
        raise DataError("These samples and training pictures are not those that the nearest neighbours were found for.")
    order = distance.argsort(stable=True)[:count]
    below = resized(train[index[order]], *samples.shape[-2:]).round().to(torch.uint8)
    return picture_grid(torch.cat([samples[order].cpu(), below.cpu()]), columns=len(order), scale=scale)
