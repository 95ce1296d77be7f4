"""A run folder: whose it is (lock), what made it (run.json), and where its parts lie."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from unidad.errors import CheckpointError

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
# Settings that may change between a run and its continuation without making it another run.
FREE_ON_RESUME = frozenset(
    {"device", "precision", "compile", "cycles", "max_minutes", "log_every", "sample_every", "save_every", "keep", "tracker"}
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of sample grids, one PNG per time."""
        return self.path / "samples"

    @property
    def log(self) -> Path:
        """One JSON object a line: cycle, seconds, losses."""
        return self.path / "log.jsonl"

    @property
    def student(self) -> Path:
        """The product as a stock diffusers folder."""
        return self.path / "student"

    def read(self) -> dict[str, Any]:
        """What run.json says.

        Raises:
            CheckpointError: if this is no run folder.
        """
        try:
            facts = json.loads((self.path / RUN_FILE).read_text())
        except (OSError, ValueError):
            raise CheckpointError(f"'{self.path}' is not a run folder: it has no readable {RUN_FILE}.") from None
        if not isinstance(facts, dict) or "settings" not in facts:
            raise CheckpointError(f"'{self.path / RUN_FILE}' does not describe a run.")
        return facts

    def write(self, facts: dict[str, Any]) -> None:
        """Write run.json in one step."""
        part = self.path / f"{RUN_FILE}.part"
        part.write_text(json.dumps(facts, indent=1))
        part.replace(self.path / RUN_FILE)


def open_run(path: str | Path, facts: dict[str, Any], resume: bool) -> RunFolder:
    """Make a new run folder, or check that an old one is the same run.

    Args:
        facts: "kind", "settings" and "hashes" decide whether it is the same run.

    Raises:
        CheckpointError: the folder holds another run or other files, or resume asks for what is not there.
    """
    run = RunFolder(Path(path))
    if run.path.exists() and not run.path.is_dir():
        raise CheckpointError(f"'{run.path}' is a file. Give another --out.")
    started = (run.path / RUN_FILE).exists()
    if resume and started:
        _refuse_difference(run, facts)
        return run
    if started:
        raise CheckpointError(f"'{run.path}' already holds a run. Continue it with --resume, or give another --out.")
    if run.path.exists() and any(p.name != LOCK_FILE for p in run.path.iterdir()):
        raise CheckpointError(f"'{run.path}' is not empty. Give another --out; nothing there was touched.")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.write(facts)
    except OSError as error:
        raise CheckpointError(f"'{run.path}' cannot be written: {error.strerror}. Give another --out.") from None
    return run


def _refuse_difference(run: RunFolder, facts: dict[str, Any]) -> None:
    before = run.read()
    if before.get("kind") != facts["kind"]:
        raise CheckpointError(f"'{run.path}' holds a {before.get('kind')} run, not a {facts['kind']} run. Give another --out.")
    lines = []
    for part in ("settings", "hashes"):
        old, new = before.get(part, {}), facts[part]
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE_ON_RESUME and old.get(key) != new.get(key):
                lines.append(f"{key}: was {_short(old.get(key))}, now {_short(new.get(key))}")
    if lines:
        raise CheckpointError(f"'{run.path}' was another run: {'; '.join(lines)}. Use the same settings, or another --out.")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


class Lock:
    """Holds a run folder for this process; a lock whose process is gone is taken over.

    Raises (on entering):
        CheckpointError: naming the process and machine that hold it.
    """

    def __init__(self, folder: Path):
        self._file = folder / LOCK_FILE

    def __enter__(self) -> Lock:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        for _ in range(2):
            try:
                with self._file.open("x") as handle:
                    handle.write(me)
                return self
            except FileExistsError:
                owner = self._owner()
                if owner and not _is_gone(owner):
                    raise CheckpointError(
                        f"'{self._file.parent}' is in use by process {owner['pid']} on {owner['host']}. Wait for it, or give another --out."
                    ) from None
                self._file.unlink(missing_ok=True)
        raise CheckpointError(f"'{self._file.parent}' is being opened by another process. Try again, or give another --out.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.unlink(missing_ok=True)

    def _owner(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self._file.read_text())
            return owner if {"pid", "host"} <= owner.keys() else None
        except (OSError, ValueError, AttributeError):
            return None


def _is_gone(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def surroundings(device: str) -> dict[str, Any]:
    """Versions, machine and commit, written beside every result."""
    return {
        "versions": {"python": platform.python_version()}
        | {p: _version(p) for p in ("unidad", "torch", "diffusers", "accelerate", "numpy")},
        "platform": platform.platform(),
        "device": device,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
