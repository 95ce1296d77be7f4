"""A folder of drawn pictures, one file a seed, that can be broken off at any time and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from unidad.data import load_files, picture_grid
from unidad.errors import DataError

FACTS = "samples.json"
GRID = "grid.png"
SHOWN = 256  # pictures in the grid, at the most


def refuse_full_folder(folder: Path, hint: str = "") -> None:
    """Raise DataError unless `folder` is absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"'{folder}' is not an empty folder. Give another --out; nothing there was touched.{hint}")


def new_folder(out: str | Path) -> Path:
    """Make a folder to write to.

    Raises:
        DataError: if it holds something already or cannot be made.
    """
    folder = Path(out)
    refuse_full_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"'{folder}' cannot be made: {error.strerror}. Give another --out.") from None
    return folder


def weights_digest(network: nn.Module) -> str:
    """sha256 over the names and numbers of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().float().numpy().tobytes())
    return digest.hexdigest()


def open_samples(out: str | Path, facts: Mapping[str, Any], resume: bool) -> Path:
    """The folder, with `facts` (what decides the pictures) in samples.json.

    Args:
        resume: a folder that holds pictures of the same facts already is gone on with.

    Raises:
        DataError: if it holds anything else, or cannot be made.
    """
    folder = Path(out)
    if not resume or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        same = _facts(folder) == facts
        if same:
            refuse_full_folder(folder, " It holds pictures of the same model and seed: add --resume to go on with them.")
        folder = new_folder(folder)
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        return folder
    there = _facts(folder)
    if there is None:
        raise DataError(f"'{folder}' has no readable {FACTS}, so its pictures cannot be gone on with. Give another --out.")
    for key, value in facts.items():
        if there.get(key) != value:
            told = f": {there.get(key)}, not {value}" if key != "model" else ""
            raise DataError(f"The pictures in '{folder}' were not drawn with this {key}{told}. Give another --out.")
    return folder


def _facts(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def fill(
    folder: Path, n: int, seed: int, batch_size: int, draw: Callable[[int, int], Tensor], rank: int = 0, count: int = 1
) -> None:
    """Draw the pictures that are not there, batch by batch; of `count` processes this one, `rank`, draws every count-th batch.

    A batch with a picture missing is drawn whole, so that its pictures are those of a run that was never broken off, to the bit.

    Args:
        draw: (count, first seed) -> pictures [count, 3, H, W] uint8.
    """
    names = [folder / f"{i:06d}.png" for i in range(seed, seed + n)]
    for start in range(rank * batch_size, n, count * batch_size):
        batch = names[start : start + batch_size]
        if not all(file.exists() for file in batch):
            for file, picture in zip(batch, draw(len(batch), seed + start), strict=True):
                if not file.exists():
                    _write_whole(file, picture)


def grid_of(folder: Path, n: int, seed: int) -> Path:
    """Write grid.png, the first of the n pictures; returns its path."""
    names = [folder / f"{i:06d}.png" for i in range(seed, seed + min(n, SHOWN))]
    first = load_files(names, Image.open(names[0]).height, folder).pixels
    scale = max(1, 64 // first.shape[-1])
    picture_grid(first, columns=min(16, max(4, round(n**0.5))), scale=scale).save(folder / GRID)
    return folder / GRID


def _write_whole(file: Path, picture: Tensor) -> None:
    part = file.with_name(f".{file.name}.partial")
    try:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(part, format="png")
        os.replace(part, file)
    except BaseException:  # a full disk, or Ctrl-C: the folder is left without litter
        part.unlink(missing_ok=True)
        raise
