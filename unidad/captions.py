"""Captions of a folder of photos: a line of metadata.jsonl each, or a text file of the same name beside each."""

from __future__ import annotations

import json
from pathlib import Path

from unidad.errors import DataError

METADATA = "metadata.jsonl"


def read_captions(folder: Path, names: list[str]) -> list[str] | None:
    """A caption for each of the pictures named, or None where the folder has none at all.

    Raises:
        DataError: some pictures have one and others have not, one is empty, or metadata.jsonl is damaged or names a file elsewhere.
    """
    found = _from_metadata(folder) if (folder / METADATA).exists() else _from_text_files(folder, names)
    if not found:
        return None
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise DataError(
            f"In '{folder}' these have no caption or an empty one: {', '.join(missing[:5])}. Give all of them one, or none."
        )
    return [found[name] for name in names]


def _from_text_files(folder: Path, names: list[str]) -> dict[str, str]:
    beside = {name: (folder / name).with_suffix(".txt") for name in names}
    return {name: _text(path) for name, path in beside.items() if path.is_file()}


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The caption '{path}' cannot be read: {error}.") from None


def _from_metadata(folder: Path) -> dict[str, str]:
    path, found = folder / METADATA, {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read: {error}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f'Line {number} of \'{path}\' must look like {{"file_name": "1.png", "text": "a cat"}}.') from None
        if not isinstance(name, str) or not isinstance(text, str) or Path(name).name != name or "\\" in name or name in ("", ".."):
            raise DataError(
                f"Line {number} of '{path}' names {name!r}; only pictures in this very folder can have a caption there."
            )
        if name in found:
            raise DataError(f"Line {number} of '{path}' gives '{name}' a second caption. Leave one.")
        found[name] = " ".join(text.split())
    return found
