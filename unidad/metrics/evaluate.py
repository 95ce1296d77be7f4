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
from unidad.metrics.lpips import Lpips, intra_lpips, nearest_lpips
from unidad.metrics.reference import Statistics

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

# From so many pictures on, the Frechet distance is told without a caution; it never is independent of their number.
MANY = 500
_SET_KEYS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
_TRAINING_KEYS = ("heldout", "intra_diversity", "intra_clusters", "intra_small", "copying", "copying_threshold", "nearest")


def evaluate(
    samples: Tensor,
    reference: Tensor | Statistics,
    train: Tensor | None,
    extractor: Extractor,
    n: int | None = None,
    *,
    k: int = 5,
    mode: distances.IntraMode = "correct",
    seed: int | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Score drawn pictures: Frechet and kernel distance, precision, recall, density, coverage, intra diversity, copying.

    Args:
        samples: [N, 3, H, W] uint8, what the generator drew; N >= 2.
        reference: [M, 3, H, W] uint8, pictures of the target domain, more than the training set; M >= 2. Or the statistics
            of such a set: without its features they serve the Frechet distance alone, and in no case copying.
        train: [L, 3, H, W] uint8, what it learned from; None leaves out intra diversity and copying. Reference pictures
            that are equal to one of these do not count as held out.
        extractor: judges all three sets; its name, digest and resizing stand in the result. `Lpips` compares pictures in
            pairs only: it gives intra diversity, copying and the nearest training pictures.
        n: score the first n samples only; None scores all.
        k: neighbours for precision, recall, density, coverage.
        mode: "correct" or "paper", see `distances.intra_diversity` and `lpips.intra_lpips`; only intra diversity differs.
        seed: that the samples were drawn with, to be told beside the scores.
        cache_dir: keep features there, see `features_of`. The samples' are not kept: they are seldom scored twice.

    Returns:
        Ready for JSON: scores (None where one cannot be had, e.g. a set of k pictures or fewer), the facts they depend on,
        and under "nearest" each sample's nearest training picture (index) and distance.

    Raises:
        DataError: if pictures are not uint8 [N, 3, H, W], there are fewer than 2 or than n, or statistics do not fit.
        ValueError: for an unknown mode or k < 1.
    """
    samples = _checked(samples, reference, train, n)
    counts = {"samples": len(samples), "reference": _count(reference), "train": 0 if train is None else len(train)}
    judge = {"extractor": extractor.name, "digest": extractor.digest, "resize": extractor.resize}
    facts: dict[str, Any] = {**judge, **counts, "seed": seed, "k": k, "mode": mode}
    if isinstance(extractor, Lpips):
        return facts | _by_lpips(extractor, samples, reference, train, mode)
    fake = features_of(extractor, samples)
    real = reference if isinstance(reference, Statistics) else features_of(extractor, reference, cache_dir)
    scores = _against_reference(fake, real, k)
    if train is None:
        return facts | scores | dict.fromkeys(_TRAINING_KEYS)
    known = features_of(extractor, train, cache_dir)
    unseen = _heldout(reference, train)
    heldout = distances.nearest(real[unseen], known) if isinstance(real, Tensor) and len(unseen) else None
    return (
        facts
        | scores
        | _against_training(distances.intra_diversity(fake, known, mode=mode), distances.nearest(fake, known), heldout)
    )


def _checked(samples: Tensor, reference: Tensor | Statistics, train: Tensor | None, n: int | None) -> Tensor:
    """The samples to score, once all pictures are known to be fit for it."""
    if n is not None and n > len(samples):
        raise DataError(f"Asked to score {n} samples, but there are only {len(samples)}. Draw more or ask for fewer.")
    for what, pixels, least in (("samples", samples[:n], 2), ("reference", reference, 2), ("train", train, 1)):
        if isinstance(pixels, Tensor):
            check_pixels(pixels)
            if len(pixels) < least:
                raise DataError(f"Scores need at least {least} pictures in '{what}', there is {len(pixels)}.")
    return samples[:n]


def _count(reference: Tensor | Statistics) -> int | None:
    """How many reference pictures, None where a statistics file does not tell."""
    pictures = reference.features if isinstance(reference, Statistics) else reference
    return None if pictures is None else len(pictures)


def _against_reference(fake: Tensor, reference: Tensor | Statistics, k: int) -> dict[str, Any]:
    """The scores that compare two sets; those that need the reference's own features are None where there are none."""
    real = reference.features if isinstance(reference, Statistics) else reference
    scores: dict[str, Any] = dict.fromkeys(_SET_KEYS)
    if isinstance(reference, Statistics):
        scores["frechet_distance"] = reference.frechet_distance(fake)
    else:
        scores["frechet_distance"] = distances.frechet_distance(reference, fake)
    if real is not None:
        scores["kernel_distance"] = distances.kernel_distance(real, fake)
        if min(len(real), len(fake)) > k:
            scores |= distances.prdc(real, fake, k)
    return scores


def _against_training(
    intra: distances.IntraDiversity, found: distances.Nearest, heldout: distances.Nearest | None
) -> dict[str, Any]:
    copied = distances.copies(found, heldout) if heldout else None
    return {
        "heldout": len(heldout.index) if heldout else 0,
        "intra_diversity": intra.value if intra.clusters else None,
        "intra_clusters": intra.clusters,
        "intra_small": intra.small,
        "copying": copied.share if copied else None,
        "copying_threshold": copied.threshold if copied else None,
        "nearest": {"index": found.index.tolist(), "distance": found.distance.tolist()},
    }


def _by_lpips(
    extractor: Lpips, samples: Tensor, reference: Tensor | Statistics, train: Tensor | None, mode: distances.IntraMode
) -> dict[str, Any]:
    """What pairs of pictures tell; the scores that need features of whole sets are None."""
    nothing = dict.fromkeys((*_SET_KEYS, *_TRAINING_KEYS))
    if train is None:
        return nothing
    intra, found = intra_lpips(extractor, samples, train, mode=mode)
    if mode == "paper":  # its distances, between two ranges of values, are no measure of copying
        found = nearest_lpips(extractor, samples, train)
    unseen = _heldout(reference, train)
    heldout = nearest_lpips(extractor, reference[unseen], train) if isinstance(reference, Tensor) and len(unseen) else None
    return nothing | _against_training(intra, found, heldout)


def _heldout(reference: Tensor | Statistics, train: Tensor) -> Tensor:
    """[L] int64: which reference pictures are not among the training pictures, pixel for pixel; none of mere statistics."""
    if isinstance(reference, Statistics):
        return torch.empty(0, dtype=torch.int64)
    known = {_picture_digest(picture) for picture in train}
    return torch.tensor([i for i, picture in enumerate(reference) if _picture_digest(picture) not in known], dtype=torch.int64)


def _picture_digest(picture: Tensor) -> bytes:
    return hashlib.sha256(f"{list(picture.shape)}".encode() + picture.cpu().contiguous().numpy().tobytes()).digest()


def score_names(extractor: str) -> dict[str, str]:
    """What the scores are called in these features: a Frechet distance is an FID in Inception's alone, and so on."""
    names = {key: label for key, label, _ in _ROWS}
    if extractor == "inception-fid":
        names |= {"frechet_distance": "FID", "kernel_distance": "KID"}
    if extractor.startswith("lpips-"):
        names["intra_diversity"] = "Intra-LPIPS"
    return names


def table(scores: Mapping[str, Any]) -> str:
    """The result of `evaluate` as plain text: facts in the first lines, then a line for each score."""
    reference = "statistics of the reference" if scores["reference"] is None else f"{scores['reference']} reference"
    seed = "" if scores["seed"] is None else f" (seed {scores['seed']})"
    names = score_names(scores["extractor"])
    lines = [
        f"{scores['samples']} samples{seed}, {reference}, {scores['train']} training pictures",
        f"features: {scores['extractor']} ({scores['digest'][:8]}); resize: {scores['resize']}; mode: {scores['mode']}",
    ]
    for key, _, better in _ROWS:
        value = scores.get(key)
        note = "; new pictures of the domain itself score 0.05" if key == "copying" else ""
        lines.append(f"  {names[key]:<18}{'-' if value is None else format(value, '.4f'):>12}  {better} is better{note}")
    if scores.get("intra_small"):
        treated = "scored 0" if scores["mode"] == "paper" else "left out"
        lines.append(
            f"  {scores['intra_small']} of {scores['train']} training pictures have fewer than 2 samples near them: {treated}."
        )
    if scores["mode"] == "paper" and scores["extractor"].startswith("lpips-") and scores["train"]:
        lines.append("  Intra-LPIPS as the public code has it: samples in [0, 1] against training pictures in [-1, 1].")
    return "\n".join([*lines, *(f"  {sentence}" for sentence in _cautions(scores))])


def _cautions(scores: Mapping[str, Any]) -> list[str]:
    """Why some scores are missing, and where numbers say less than they seem to."""
    counts = [n for n in (scores["samples"], scores["reference"]) if n is not None]
    by_pairs, found = scores["extractor"].startswith("lpips-"), []
    if by_pairs:
        found.append(f"{scores['extractor']} compares pictures in pairs: the first six scores need another extractor.")
    elif scores["kernel_distance"] is None:
        found.append("The statistics file holds no features: all but the Frechet distance need them, or the pictures themselves.")
    elif scores["precision"] is None:
        found.append(f"Precision to coverage need more than {scores['k']} pictures on both sides.")
    if not scores["train"]:
        found.append("Intra diversity and copying need the training pictures: --train FOLDER.")
    elif scores["copying"] is None:
        found.append("Copying needs held-out pictures in --reference, pictures that are not in --train; there are none.")
    if not by_pairs and min(counts) < MANY:
        found.append(f"With fewer than {MANY:,} pictures on a side, distances depend on how many: compare at equal numbers only.")
    return found


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
