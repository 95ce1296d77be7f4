"""Every feature extractor by its name; their weights are found, checked and read here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unidad.errors import SettingsError, did_you_mean
from unidad.metrics import weights as files
from unidad.metrics.features import EfficientNetLite0, Extractor
from unidad.metrics.inception import InceptionFid
from unidad.metrics.lpips import Lpips, Net, combined_digest
from unidad.metrics.vision import VisionFeatures

Given = Sequence[str | Path]


def _read(path: Path) -> dict[str, torch.Tensor]:
    """A file whose hash is known to be right; nothing in it is run all the same."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _efficientnet(given: Given, _download: bool, **settings: Any) -> Extractor:
    if given:
        raise SettingsError("efficientnet-lite0 brings its own weights: leave out --weights, or choose another --extractor.")
    return EfficientNetLite0(**settings)


def _inception(given: Given, download: bool, **settings: Any) -> Extractor:
    (path,) = files.find_weights((files.INCEPTION,), given, download)
    return InceptionFid(_read(path), files.INCEPTION.sha256, **settings)


def _lpips(net: Net, given: Given, download: bool, **settings: Any) -> Extractor:
    needed = {"vgg": (files.VGG16, files.LPIPS_VGG), "alex": (files.ALEXNET, files.LPIPS_ALEX)}[net]
    backbone, linear = (_read(path) for path in files.find_weights(needed, given, download))
    return Lpips(net, backbone | linear, combined_digest([file.sha256 for file in needed]), **settings)


def _vision(family: str, given: Given, download: bool, **settings: Any) -> Extractor:
    if len(given) > 1:
        raise SettingsError(f"{family} takes one --weights: a folder saved by transformers, or a hub id.")
    return VisionFeatures(family, given[0] if given else None, download, **settings)


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "efficientnet-lite0": _efficientnet,
    "inception-fid": _inception,
    "lpips-vgg": partial(_lpips, "vgg"),
    "lpips-alex": partial(_lpips, "alex"),
    "dino": partial(_vision, "dino"),
    "dinov2": partial(_vision, "dinov2"),
    "clip": partial(_vision, "clip"),
}


def load_extractor(
    name: str = "efficientnet-lite0",
    weights: Given = (),
    download: bool = False,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Extractor:
    """Build an extractor by its name in `EXTRACTORS`.

    Args:
        name: which one.
        weights: files with its weights, see `find_weights`; for dino, dinov2 and clip one folder or hub id. The default
            extractor has its own, the others look into the weights folder or the hub's cache.
        download: fetch what is missing.
        device: where its network runs.
        settings: for its constructor: batch_size; for efficientnet-lite0 also size.

    Raises:
        SettingsError: for an unknown name, or settings that do not fit.
        ModelError: if weights are missing, or not those they should be.
    """
    if name not in EXTRACTORS:
        raise SettingsError(
            f"There is no feature extractor '{name}'.{did_you_mean(name, EXTRACTORS)} Known: {', '.join(sorted(EXTRACTORS))}."
        )
    return EXTRACTORS[name](weights, download, device=device, **settings)
