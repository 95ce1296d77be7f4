"""Masks of photos: `photo_mask.png` beside `photo.jpg`, white where the subject is; cropped and resized as the photo is."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidad.data import MASK, SUFFIXES, PictureSet, decode, open_picture, to_rgb
from unidad.errors import DataError


def with_masks(pictures: PictureSet, folder: Path) -> PictureSet:
    """The pictures with the masks that lie in their folder, [N, 1, size, size] float32 in [0, 1]; as given where there are none.

    A picture without a mask among others with one counts as a whole. The digest is of pictures and masks together.

    Raises:
        DataError: a mask has no photo or belongs to a photo that has another; it has another shape than its photo, is transparent, black
            all over, or cannot be read.
    """
    found = _find(folder, pictures.names)
    if not found:
        unread = (folder / "masks").is_dir()
        note = f"'{folder / 'masks'}' is not read: a mask lies beside its photo, as 'photo{MASK}.png' beside 'photo.png'."
        return replace(pictures, notes=[*pictures.notes, note]) if unread else pictures
    whole = torch.ones(1, pictures.size, pictures.size)
    masks = torch.stack([_read(found[name], folder / name, pictures.size) if name in found else whole for name in pictures.names])
    without = [name for name in pictures.names if name not in found]
    notes = [f"These have no mask and count as a whole: {', '.join(without[:5])}."] if without else []
    digest = hashlib.sha256(pictures.digest.encode() + masks.numpy().tobytes()).hexdigest()
    return replace(pictures, masks=masks, digest=digest, notes=[*pictures.notes, *notes])


def _find(folder: Path, names: list[str]) -> dict[str, Path]:
    """The mask's file of each picture that has one."""
    found: dict[str, Path] = {}
    files = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.stem.endswith(MASK) and not p.name.startswith("."))
    for path in sorted(files):
        of = [name for name in names if Path(name).stem == path.stem.removesuffix(MASK)]
        if not of:
            raise DataError(
                f"'{path}' is named as a mask, but beside it is no photo '{path.stem.removesuffix(MASK)}'. Rename one of them."
            )
        if of[0] in found:
            raise DataError(f"'{of[0]}' in '{folder}' has two masks, '{found[of[0]].name}' and '{path.name}'. Leave one.")
        found |= dict.fromkeys(of, path)
    return found


def _read(path: Path, photo: Path, size: int) -> Tensor:
    image, _ = decode(path)
    if image.mode in ("RGBA", "LA", "PA") and int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255:
        raise DataError(f"The mask '{path}' is transparent in places. Save it in black and white, the subject white.")
    (w, h), (width, height) = image.size, open_picture(photo)[0].size
    if abs(w * height - h * width) > max(width, height):  # more than the rounding of one side
        raise DataError(f"The mask '{path}' is {w}x{h}, which is not the shape of its photo '{photo.name}' ({width}x{height}).")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left * w / width, top * h / height, (left + side) * w / width, (top + side) * h / height)
    grey = Image.fromarray(np.asarray(to_rgb(image).convert("L"), dtype=np.float32) / 255.0)
    mask = torch.from_numpy(np.asarray(grey.resize((size, size), Image.Resampling.BOX, box=box)).copy())[None]
    if not bool(mask.any()):
        raise DataError(
            f"The mask '{path}' is black in all that is used of its photo, the square in its middle. Paint the subject white."
        )
    return mask
