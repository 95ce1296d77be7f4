"""Folders of pictures: safe decoding, one square size, a contact sheet, and the endless stream that training draws from.

Pictures are data from strangers: formats come from an allow-list, sizes are checked before decoding, nothing is executed.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from unidad.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 64_000_000
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, struct.error)  # what broken files raise in Pillow
MASK = "_mask"  # what the name of a picture's mask ends in
# Larger pictures are refused by `open_picture` itself; Pillow need not warn as well.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one folder, decoded: `pixels` is [N, 3, size, size] uint8; `names` are file names in the same order.

    `masks`, where there are some, is [N, 1, size, size] float32 in [0, 1]. `more`, [M, 3, size, size] uint8, are pictures that were made of
    these (`recombine`).
    """

    pixels: Tensor
    names: list[str]
    digest: str
    notes: list[str] = field(default_factory=list)
    masks: Tensor | None = None
    more: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Side in pixels."""
        return int(self.pixels.shape[-1])

    @property
    def learnt_from(self) -> Tensor:
        """All that a model learns from, [N + M, 3, size, size] uint8."""
        return self.pixels if self.more is None else torch.cat([self.pixels, self.more])


def list_pictures(folder: str | Path) -> list[Path]:
    """Picture files lying directly in a folder, by name; `photo_mask.png` beside a `photo` is its mask and none of them.

    Raises:
        DataError: if the folder is missing, is no folder, or holds no file with a picture's ending.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"There is no folder '{folder}'. Give the path of a folder of pictures.")
    if not folder.is_dir():
        raise DataError(f"'{folder}' is a file. Give the folder that holds the pictures.")
    inside = sorted(folder.iterdir(), key=lambda p: p.name)
    files = [p for p in inside if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    stems = {p.stem for p in files}
    files = [p for p in files if not (p.stem.endswith(MASK) and p.stem.removesuffix(MASK) in stems)]
    if not files:
        subfolders = [p.name for p in inside if p.is_dir() and any(f.suffix.lower() in SUFFIXES for f in p.glob("*"))]
        hint = f" Its pictures may lie in '{subfolders[0]}': give that folder." if subfolders else ""
        raise DataError(f"'{folder}' holds no pictures ({', '.join(SUFFIXES)}).{hint}")
    return files


def open_picture(path: Path) -> tuple[Image.Image, list[str]]:
    """Decode one file to upright RGB on white, and say in notes what was unusual about it.

    Raises:
        DataError: if it is too large, truncated, or not one of the formats it may be.
    """
    image, notes = decode(path)
    return to_rgb(image), notes


def decode(path: Path) -> tuple[Image.Image, list[str]]:
    """`open_picture` before it is turned into RGB."""
    notes: list[str] = []
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"'{path}' is {image.width}x{image.height}: over {MAX_PIXELS // 10**6} million pixels. Make it smaller first."
                )
            if getattr(image, "n_frames", 1) > 1:
                notes.append(f"'{path.name}' is animated: only its first frame is used.")
                image.seek(0)
            image.load()
            return ImageOps.exif_transpose(image), notes
    except Image.DecompressionBombError:
        raise DataError(f"'{path}' claims more than {MAX_PIXELS // 10**6} million pixels. Make it smaller first.") from None
    except UnidentifiedImageError:
        raise DataError(f"'{path}' is not a picture ({', '.join(FORMATS)}). Remove it or save it anew.") from None
    except UNREADABLE as error:
        raise DataError(f"'{path}' cannot be read: {error}. Remove it or save it anew.") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in 8-bit RGB; where it is transparent, on white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: .convert would clip it to white
        grey = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or grey.max() > 255 else 255.0
        return Image.fromarray((grey / top * 255.0).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _square(path: Path, size: int) -> tuple[np.ndarray | None, list[str], tuple[int, int]]:
    image, notes = open_picture(path)
    if min(image.size) < size:
        return None, notes, image.size
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image), notes, (side, side)


def load_folder(folder: str | Path, size: int, limit: int | None = None) -> PictureSet:
    """Read the pictures of a folder: upright, centre-cropped to a square, resized to `size` pixels.

    Args:
        folder: pictures lie directly in it; other files are passed over.
        size: side in pixels, that of the model.
        limit: read only the first so many by name.

    Raises:
        DataError: folder missing or empty, a file unreadable, or a picture smaller than `size`; names the files.
    """
    return load_files(list_pictures(folder)[:limit], size, folder)


def smallest_side(folder: str | Path) -> int:
    """The shortest side, in pixels, of a folder's pictures; nothing is decoded.

    Raises:
        DataError: folder missing or empty, or a file unreadable.
    """
    return min(min(_dimensions(path)) for path in list_pictures(folder))


def _dimensions(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (UnidentifiedImageError, Image.DecompressionBombError, *UNREADABLE) as error:
        raise DataError(f"'{path}' cannot be read: {error}. Remove it or save it anew.") from None


def load_files(files: list[Path], size: int, folder: str | Path) -> PictureSet:
    """`load_folder` for chosen files of a folder, at least one."""
    with ThreadPoolExecutor(4) as pool:
        tried = list(pool.map(lambda p: _square_or_why_not(p, size), files))
    refused = {path.name: why for path, why in zip(files, tried, strict=True) if isinstance(why, DataError)}
    if refused:
        name, *others = refused
        raise DataError(f"{refused[name]} Nor can {_some(others)} be used." if others else str(refused[name]))
    squares = [square for square in tried if not isinstance(square, DataError)]
    small = [f"{p.name} ({w}x{h})" for p, (a, _, (w, h)) in zip(files, squares, strict=True) if a is None]
    if small:
        raise DataError(
            f"In '{folder}' these are smaller than the model's {size}x{size}: {_some(small)}. "
            "Replace them by larger ones or take them out."
        )
    pixels = torch.from_numpy(np.stack([a for a, _, _ in squares if a is not None])).permute(0, 3, 1, 2).contiguous()
    notes = [note for _, some, _ in squares for note in some]
    if len(files) == 1:
        notes.append("There is only one picture: the student can learn its look but hardly any variety.")
    notes += _duplicates(pixels, [p.name for p in files])
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    return PictureSet(pixels, [p.name for p in files], digest, notes)


def _square_or_why_not(path: Path, size: int) -> tuple[np.ndarray | None, list[str], tuple[int, int]] | DataError:
    try:
        return _square(path, size)
    except DataError as error:
        return error


def _some(names: list[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _duplicates(pixels: Tensor, names: list[str]) -> list[str]:
    seen: dict[bytes, str] = {}
    notes = []
    for picture, name in zip(pixels, names, strict=True):
        key = hashlib.sha256(picture.numpy().tobytes()).digest()
        if key in seen:
            notes.append(f"'{name}' is the same picture as '{seen[key]}'.")
        seen.setdefault(key, name)
    return notes


def looks_one_way(pixels: Tensor) -> bool:
    """Whether the pictures [N, 3, H, W] uint8 all look one way: mirrored ones are farther from the others than they are themselves.

    Farther by more than a twentieth, in mean pixel distance at 32 pixels a side; of more than 200 pictures the first 200 are looked at.
    """
    x = functional.adaptive_avg_pool2d(to_signed(pixels[:200]), 32)
    others = ~torch.eye(len(x), dtype=torch.bool)
    plain, mirrored = (torch.cdist(y.flatten(1), x.flatten(1))[others].sum() for y in (x, x.flip(-1)))
    return bool(mirrored > 1.05 * plain)


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) -> uint8, rounded as diffusers' pipelines round."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def picture_grid(pixels: Tensor, columns: int = 8, scale: int = 1, gap: int = 2) -> Image.Image:
    """Lay [N, 3, H, W] uint8 pictures out in rows, each enlarged `scale` times without smoothing, on white."""
    n, _, h, w = pixels.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    h, w = h * scale, w * scale
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, picture in enumerate(pixels.cpu()):
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(tile.resize((w, h), Image.Resampling.NEAREST), ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return sheet


class PictureStream:
    """Draws pictures for ever: every picture once in shuffled order, then again in another order.

    The order depends on the seed and on how many were drawn, so that `drawn` alone restores its place. A batch may be
    larger than the set.

    Args:
        pixels: [N, 3, S, S] uint8.
        hflip: mirror each drawn picture with probability 1/2.
        seed: of the order and the mirroring.
        device: where batches (and the pictures) live.
        masks: [N, 1, S, S] float32 in [0, 1], of pictures that have masks.
    """

    labels: Tensor | None = None

    def __init__(self, pixels: Tensor, *, hflip: bool, seed: int, device: torch.device | str = "cpu", masks: Tensor | None = None):
        self.pixels = pixels.to(device)
        self.masks = None if masks is None else masks.to(device)
        self.hflip, self.seed, self.drawn = hflip, seed, 0
        self._round: tuple[int, Tensor, Tensor] | None = None

    def _order(self, round_: int) -> tuple[Tensor, Tensor]:
        if self._round is None or self._round[0] != round_:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + round_) % 2**63)
            n, device = len(self.pixels), self.pixels.device
            order, flips = torch.randperm(n, generator=generator), torch.rand(n, generator=generator) < 0.5
            self._round = (round_, order.to(device, non_blocking=True), (flips & self.hflip).to(device, non_blocking=True))
        return self._round[1], self._round[2]

    def next(self, n: int) -> Tensor:
        """The next n pictures, [n, 3, S, S] float32 in [-1, 1]."""
        return self.batch(n)[0]

    def batch(self, n: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The next n pictures; their labels, [n] int64, where each has one of its own; their masks, [n, 1, S, S], where they have them."""
        orders, flips, end = [], [], self.drawn + n
        while True:
            round_, place = divmod(self.drawn, len(self.pixels))
            order, flip = self._order(round_)
            there = slice(place, place + end - self.drawn)
            orders.append(order[there])
            flips.append(flip[there])
            self.drawn += len(orders[-1])
            if self.drawn == end:
                break
        places, mirrored = torch.cat(orders), torch.cat(flips).view(-1, 1, 1, 1)
        masks = None if self.masks is None else self.masks[places]
        masks = None if masks is None else torch.where(mirrored, masks.flip(-1), masks)
        return self._take(places, mirrored), None if self.labels is None else self.labels[places], masks

    def _take(self, index: Tensor, mirrored: Tensor) -> Tensor:
        x = to_signed(self.pixels[index])
        return torch.where(mirrored, x.flip(-1), x)


class LatentStream(PictureStream):
    """The same over latents, [N, c, s, s] float32, and over those of the mirrored pictures: a mirrored latent is not the latter.

    Args:
        labels: [N] int64, the row of each picture's caption.
    """

    def __init__(
        self,
        latents: Tensor,
        mirrored: Tensor,
        labels: Tensor,
        *,
        hflip: bool,
        seed: int,
        device: torch.device | str = "cpu",
        masks: Tensor | None = None,
    ):
        super().__init__(latents, hflip=hflip, seed=seed, device=device, masks=masks)
        self.labels = labels.to(device)
        self._mirrored = mirrored.to(device)

    def _take(self, index: Tensor, mirrored: Tensor) -> Tensor:
        return torch.where(mirrored, self._mirrored[index], self.pixels[index])
