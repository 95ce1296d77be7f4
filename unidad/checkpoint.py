"""Checkpoints: a folder that is whole or absent. safetensors and JSON only, every file hashed, nothing pickled.

A checkpoint is written beside its final place, synced, described by a manifest and renamed; it is read back only if every byte
is as the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidad.errors import CheckpointError

MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
FORMAT = 1


@dataclass
class Snapshot:
    """Everything resume needs.

    Attributes:
        tensors: groups of tensors by name ("network.student", "optimizer.student", "ema", "random", "carried").
        counters: plain JSON values: cycle, place in the cycle, updates of each network, place in the data.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all tensors; the files are a little larger."""
        return sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows neither needs nor allows syncing a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_full_disk(folder: Path, needed: int, what: str) -> None:
    """Raise CheckpointError if fewer than `needed` bytes are free where `folder` is, or will be."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{what} need {needed:,} bytes in '{folder}', where {free:,} are free. Free some space or give another --out."
        )


def save(folder: Path, name: str, snapshot: Snapshot) -> Path:
    """Write `folder/name`, whole or not at all. A whole one of that name is kept: one place of a run has one state.

    Raises:
        CheckpointError: if the disk refuses; what was there before is untouched and nothing is left behind.
    """
    final, staged = folder / name, folder / f".{name}.partial"
    needed = snapshot.size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for litter in folder.glob(".*"):  # of a process that was killed; the run's lock keeps others out
            shutil.rmtree(litter, ignore_errors=True)
        if final.exists():
            if _is_whole(final):
                return final
            shutil.rmtree(final)
        refuse_full_disk(folder, needed, f"The files of the checkpoint '{name}'")
        _write(staged, snapshot)
        staged.rename(final)
        _sync(folder)
    except Exception as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        free = f"; {shutil.disk_usage(folder).free:,} are free there" if folder.exists() else ""
        raise CheckpointError(
            f"The checkpoint '{final}' could not be written ({error}). It needs {needed:,} bytes{free}. "
            "Earlier checkpoints are untouched."
        ) from error
    return final


def _write(staged: Path, snapshot: Snapshot) -> None:
    staged.mkdir()
    files = {}
    for group, tensors in snapshot.tensors.items():
        path = staged / f"{group}{SUFFIX}"
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
        files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        _sync(path)
    manifest = {"format": FORMAT, "files": files, "counters": snapshot.counters}
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (staged / MANIFEST).write_text(json.dumps({"sha256": digest, "manifest": manifest}, indent=1), encoding="utf-8")
    _sync(staged / MANIFEST)
    _sync(staged)


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def load(path: Path) -> Snapshot:
    """Read a checkpoint, checking every file against the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or altered.
    """
    try:
        wrapped = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest = wrapped["manifest"]
        intact = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest() == wrapped["sha256"]
        expected = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"The checkpoint '{path}' has no readable {MANIFEST}.") from None
    if not intact or manifest.get("format") != FORMAT:
        raise CheckpointError(f"'{path / MANIFEST}' was altered or is of another version.")
    snapshot = Snapshot(counters=manifest["counters"])
    for name, fact in expected.items():
        file = path / name
        if file.parent != path or file.suffix != SUFFIX:
            raise CheckpointError(f"'{path / MANIFEST}' names '{name}', which is no file of a checkpoint.")
        if not file.is_file() or file.stat().st_size != fact["bytes"] or _sha256(file) != fact["sha256"]:
            raise CheckpointError(f"'{file}' is missing or damaged.")
        snapshot.tensors[name.removesuffix(SUFFIX)] = _read(file)
    return snapshot


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:  # hashed as it is, but never a file of ours
        raise CheckpointError(f"'{file}' is no safetensors file: {error}.") from None


def names(folder: Path) -> list[str]:
    """Checkpoints in a folder, oldest first, valid or not."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []


def latest(folder: Path) -> tuple[str, Snapshot] | None:
    """The newest checkpoint that is whole, with a warning for each newer one that is not; None where there is none at all.

    Raises:
        CheckpointError: if there are checkpoints and none is whole.
    """
    damage = []
    for name in reversed(names(folder)):
        try:
            found = load(folder / name)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for sentence in damage:
            warnings.warn(f"{sentence} Going on from '{name}' instead.", stacklevel=2)
        return name, found
    if damage:
        raise CheckpointError(f"No checkpoint in '{folder}' is whole. {' '.join(damage)}")
    return None


def prune(folder: Path, keep: int, newest: str) -> None:
    """Delete old checkpoints, and later ones that are damaged, once `newest`, just saved, has been read back whole.

    Args:
        keep: how many to leave, `newest` among them.
        newest: name of the checkpoint to count from.

    Raises:
        CheckpointError: if `newest` is damaged; then nothing is deleted.
    """
    load(folder / newest)
    have = names(folder)
    older = [name for name in have if name < newest]
    doomed = older[: max(0, len(older) + 1 - keep)] + [name for name in have if name > newest]
    for name in doomed:
        aside = folder / f".{name}.old"
        (folder / name).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
