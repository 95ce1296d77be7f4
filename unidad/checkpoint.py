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

from safetensors.torch import load_file, save_file
from torch import Tensor

from unidad.errors import CheckpointError

MANIFEST = "manifest.json"
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def save(folder: Path, name: str, snapshot: Snapshot) -> Path:
    """Write `folder/name`, whole or not at all.

    Raises:
        CheckpointError: if the disk refuses; what was there before is untouched and nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, staged = folder / name, folder / f".{name}.partial"
    for litter in folder.glob(".*"):  # of a process that was killed; the run's lock keeps others out
        shutil.rmtree(litter, ignore_errors=True)
    needed = sum(t.numel() * t.element_size() for group in snapshot.tensors.values() for t in group.values())
    try:
        staged.mkdir()
        files = {}
        for group, tensors in snapshot.tensors.items():
            path = staged / f"{group}.safetensors"
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
            files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
            _sync(path)
        manifest = {"format": FORMAT, "files": files, "counters": snapshot.counters}
        text = json.dumps(manifest, indent=1)
        (staged / MANIFEST).write_text(
            json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest}, indent=1)
        )
        _sync(staged / MANIFEST)
        _sync(staged)
        if final.exists():  # only a damaged one, or one of an earlier try at the same place
            old = folder / f".{name}.old"
            final.rename(old)
            staged.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staged.rename(final)
        _sync(folder)
    except Exception as error:  # safetensors raises its own type for a full disk
        shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"The checkpoint '{final}' could not be written ({error}). It needs {needed / 1e6:.0f} MB; "
            f"{free / 1e6:.0f} MB are free there. Earlier checkpoints are untouched."
        ) from error
    return final


def load(path: Path) -> Snapshot:
    """Read a checkpoint, checking every file against the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or altered.
    """
    try:
        wrapped = json.loads((path / MANIFEST).read_text())
        manifest = wrapped["manifest"]
        intact = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest() == wrapped["sha256"]
        expected = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"The checkpoint '{path}' has no readable {MANIFEST}.") from None
    if not intact or manifest.get("format") != FORMAT:
        raise CheckpointError(f"'{path / MANIFEST}' was altered or is of another version.")
    snapshot = Snapshot(counters=manifest["counters"])
    for name, fact in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != fact["bytes"] or _sha256(file) != fact["sha256"]:
            raise CheckpointError(f"'{file}' is missing or damaged.")
        snapshot.tensors[name.removesuffix(".safetensors")] = load_file(file)
    return snapshot


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


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; the newest is read back first, and nothing is deleted if it is damaged."""
    have = names(folder)
    if len(have) > keep:
        load(folder / have[-1])
        for name in have[:-keep]:
            doomed = folder / f".{name}.old"
            (folder / name).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
