"""A run folder: whose it is (lock), what made it (run.json), and where its parts lie."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from unidad.errors import CheckpointError

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
# Settings that may change between a run and its continuation without making it another run.
FREE_ON_RESUME = frozenset(
    {"device", "cycles", "max_minutes", "log_every", "sample_every", "save_every", "keep", "tracker", "non_finite", "shard"}
)
OWN_FILES = frozenset({LOCK_FILE, f".{RUN_FILE}.part"})


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
            facts = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise CheckpointError(f"'{self.path}' is not a run folder: it has no readable {RUN_FILE}.") from None
        parts = {"kind": str, "settings": dict, "hashes": dict, "data": dict}
        if not isinstance(facts, dict) or not all(isinstance(facts.get(part, kind()), kind) for part, kind in parts.items()):
            raise CheckpointError(f"'{self.path / RUN_FILE}' does not describe a run.")
        if "kind" not in facts or "settings" not in facts:
            raise CheckpointError(f"'{self.path / RUN_FILE}' does not say what kind of run it is, or its settings.")
        return facts

    def write(self, facts: dict[str, Any]) -> None:
        """Write run.json in one step."""
        with replacing(self.path / RUN_FILE) as part:
            part.write_text(json.dumps(facts, indent=1), encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to: it takes the place of `path`, synced, when the block ends well, and is gone when it does not."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("r+b") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    except Exception:
        part.unlink(missing_ok=True)
        raise


def check_folder(path: str | Path, facts: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that must not be written to; touches nothing.

    Args:
        facts: "kind", "settings", "hashes" and "device" decide whether it is the same run.
        resume: whether the caller wants to go on with a run that is there.

    Raises:
        CheckpointError: as `refuse_taken`, or the folder holds another run.
    """
    refuse_taken(path, resume)
    run = RunFolder(Path(path))
    if (run.path / RUN_FILE).exists():
        _refuse_difference(run, facts)


def refuse_taken(path: str | Path, resume: bool) -> None:
    """Raise CheckpointError if this is a file, or a folder of a run and `resume` is off, or of other files. Needs nothing of the new run,
    so that it can be told before minutes go into pictures.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"'{folder}' is a file. Give another --out.")
    if (folder / RUN_FILE).exists():
        if not resume:
            raise CheckpointError(f"'{folder}' already holds a run. Continue it with --resume, or give another --out.")
    elif folder.exists() and any(p.name not in OWN_FILES for p in folder.iterdir()):
        raise CheckpointError(f"'{folder}' is not empty. Give another --out; nothing there was touched.")


@contextmanager
def open_run(path: str | Path, facts: dict[str, Any], resume: bool) -> Iterator[RunFolder]:
    """Hold a run folder for this process and write run.json in it; new, or with `resume` one that is the same run.

    Raises:
        CheckpointError: as `check_folder`, or another process holds it, or it cannot be written.
    """
    run = RunFolder(Path(path))
    refuse_holder(run.path)
    check_folder(path, facts, resume)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(run.path)
        with lock:
            check_folder(path, facts, resume)
            run.write(facts)
            yield run
    except OSError as error:
        raise CheckpointError(
            f"'{run.path}' cannot be written: {error.strerror or error}. Give another --out, or free space if the disk is full."
        ) from error


def _refuse_difference(run: RunFolder, facts: dict[str, Any]) -> None:
    from unidad.config import PretrainSettings, TrainSettings, as_dict  # loads torch, which a folder in use must not wait for

    before = run.read()
    if before.get("kind") != facts["kind"]:
        raise CheckpointError(f"'{run.path}' holds a {before.get('kind')} run, not a {facts['kind']} run. Give another --out.")
    lines = []
    free = FREE_ON_RESUME - ({"cycles"} if facts["settings"].get("lr_decay") == "cosine" else set())
    if "precision" in before:  # what it was in, and not what it was asked for: `auto` is another format on another machine
        free |= {"precision"}
        if before["precision"] != facts.get("precision"):
            old = before["precision"]
            lines.append(f"precision: was {old}, now {facts.get('precision')} (go on with --set precision={old})")
    if before.get("device") != facts.get("device"):
        lines.append(f"device: was {before.get('device')}, now {facts.get('device')} (random states cannot move between them)")
    kind = PretrainSettings if facts["kind"] == "pretrain" else TrainSettings
    then = {key: value for key, value in as_dict(kind()).items() if key in facts["settings"]}  # of settings that did not exist yet
    before["settings"] = then | before["settings"]
    pairs = ((_settings_of_one(before), _settings_of_one(facts)), (before.get("hashes", {}), facts["hashes"]))
    for old, new in pairs:
        for key in sorted(old.keys() | new.keys()):
            if key not in free and old.get(key) != new.get(key):
                lines.append(f"{key}: was {_short(old.get(key))}, now {_short(new.get(key))}")
    if lines:
        raise CheckpointError(f"'{run.path}' was another run: {'; '.join(lines)}. Use the same settings, or another --out.")


def refuse_other_inputs(hashes: Mapping[str, str], expected: Mapping[str, str] | None) -> None:
    """Raise CheckpointError, with the difference, if models or pictures are not those that a run to be repeated had."""
    wanted = hashes if expected is None else expected
    lines = [
        f"{key}: was {_short(wanted.get(key))}, now {_short(hashes.get(key))}"
        for key in sorted({*hashes, *wanted})
        if hashes.get(key) != wanted.get(key)
    ]
    if lines:
        raise CheckpointError(f"The run was made from other files ({'; '.join(lines)}). Give those, or start a new run.")


def _settings_of_one(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the same run in one process: batches of all processes together."""
    settings, processes = dict(facts["settings"]), facts.get("processes", 1)
    return settings | {key: settings[key] * processes for key in ("batch_size", "anchor_batch") if key in settings}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


class Lock:
    """Holds a folder for as long as this process lives: a lock of the operating system's, which dies with its owner.

    Raises (on entering):
        CheckpointError: naming the process and machine that hold it.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_FILE
        self._handle: IO[str] | None = None

    def __enter__(self) -> Lock:
        self._handle = self._path.open("a+", encoding="utf-8")
        if not _try_lock(self._handle):
            self._handle.close()
            refuse_holder(self._path.parent, certain=True)
        self._handle.truncate(0)
        self._handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._handle.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.truncate(0)
            self._handle.close()


def _try_lock(handle: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(2**20)  # a byte nobody reads: on Windows a locked byte cannot be read by others
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def refuse_holder(folder: Path, certain: bool = False) -> None:
    """Raise CheckpointError naming who holds this folder now, if anybody does."""
    path = folder / LOCK_FILE
    if not certain:
        try:
            with path.open("r+", encoding="utf-8") as handle:
                if _try_lock(handle):
                    return
        except OSError:
            return  # nobody ever held it, or it is not ours to write to, which taking the lock will say
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        name = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        name = "another process"
    raise CheckpointError(f"'{folder}' is in use by {name}. Wait for it, or give another --out.")


def surroundings(device: str) -> dict[str, Any]:
    """Versions, machine and commit, written beside every result."""
    import torch  # here, so that a folder in use can be refused before torch is loaded

    return {
        "versions": {"python": platform.python_version()}
        | {p: package_version(p) for p in ("unidad", "torch", "diffusers", "accelerate", "numpy", "pillow", "safetensors")},
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def package_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's own repository, with "-dirty" where its files were changed; None for an installed one."""
    here = Path(__file__).resolve()
    tracked = ["git", "ls-files", "--error-unmatch", here.name]  # an installation may lie inside somebody else's repository
    named = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for words in (tracked, named):
            done = subprocess.run(words, cwd=here.parent, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def public_name(target: str | Path) -> str:
    """A folder's own name, or `bundled:NAME`: no path of this machine goes into what is given away."""
    text = str(target)
    return text if text.startswith("bundled:") else Path(text).resolve().name
