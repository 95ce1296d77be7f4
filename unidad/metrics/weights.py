"""Published weights files that scores need: their names, hashes and homes, where they are looked for, and what is said when one is missing.

Nothing is fetched unless the caller says so, and a file whose sha256 is another one is never used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unidad.errors import ModelError


@dataclass(frozen=True)
class WeightsFile:
    """A file known by its sha256 (hexadecimal), of `size` bytes, that its publisher offers under `url`."""

    name: str
    sha256: str
    size: int
    url: str


INCEPTION = WeightsFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    95_628_359,
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
VGG16 = WeightsFile(
    "vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    553_433_881,
    "https://download.pytorch.org/models/vgg16-397923af.pth",
)
ALEXNET = WeightsFile(
    "alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    244_408_911,
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
LPIPS_VGG = WeightsFile(
    "lpips-v0.1-vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    7_289,
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
)
LPIPS_ALEX = WeightsFile(
    "lpips-v0.1-alex.pth",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    6_009,
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
)


def cache_folder() -> Path:
    """Where this user's caches live: `unidad` in $XDG_CACHE_HOME if that is set, else in the place the system sets aside."""
    home = Path.home()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "unidad"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "unidad"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "unidad" / "Cache"
    return home / ".cache" / "unidad"


def weights_folder() -> Path:
    """$UNIDAD_WEIGHTS, or `weights` in the cache folder."""
    return Path(os.environ.get("UNIDAD_WEIGHTS") or cache_folder() / "weights")


def sha256_of(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def find_weights(needed: Sequence[WeightsFile], given: Sequence[str | Path] = (), download: bool = False) -> list[Path]:
    """A path for each needed file: of those given the one with its hash, else the one in the weights folder.

    Args:
        needed: what an extractor is made of.
        given: files under any name and in any order; the hash says which is which.
        download: fetch what is missing into the weights folder.

    Raises:
        ModelError: if a file is missing (the sentence says what it is and where to put it), or has another sha256.
    """
    for path in map(Path, given):
        if not path.is_file():
            raise ModelError(f"There is no weights file '{path}'. Give the path of {_names(needed)}.")
    digests = {sha256_of(Path(path)): Path(path) for path in given}
    strange = [digest for digest in digests if digest not in {file.sha256 for file in needed}]
    if strange:
        raise ModelError(
            f"'{digests[strange[0]]}' has sha256 {strange[0]}, which is that of none of the weights needed here: "
            f"{_names(needed)}. It is damaged or another file; get it anew."
        )
    missing = [file for file in needed if file.sha256 not in digests and not (weights_folder() / file.name).is_file()]
    if missing and not download:
        raise ModelError(_how_to_get(missing))
    return [digests.get(file.sha256) or _in_folder(file) for file in needed]


def _how_to_get(missing: Sequence[WeightsFile]) -> str:
    one = len(missing) == 1
    each = "; ".join(f"'{file.name}' (sha256 {file.sha256}, {file.size:,} bytes) from {file.url}" for file in missing)
    return (
        f"These scores need {'a weights file' if one else 'weights files'} that {'is' if one else 'are'} not here: {each}. "
        f"Put {'it' if one else 'them'} into '{weights_folder()}' under {'that name' if one else 'those names'} (the environment "
        "variable UNIDAD_WEIGHTS names another folder), give each with --weights FILE, or let --download fetch what is missing."
    )


def _names(files: Sequence[WeightsFile]) -> str:
    return ", ".join(f"'{file.name}' (sha256 {file.sha256})" for file in files)


def _in_folder(file: WeightsFile) -> Path:
    """Its path in the weights folder, fetched first where it is not there."""
    path = weights_folder() / file.name
    if not path.is_file():
        _fetch(file, path)
    found = sha256_of(path)
    if found != file.sha256:
        raise ModelError(
            f"'{path}' has sha256 {found}, not {file.sha256}: it is damaged or another file. Take it away and get it anew."
        )
    return path


def _fetch(file: WeightsFile, path: Path) -> None:
    """Download to a name of its own first, so that a broken download never stands under the file's name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(file.url) as source, unfinished.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        if sha256_of(unfinished) != file.sha256:
            raise ModelError(f"What {file.url} sent is not '{file.name}' (another sha256). Get the file by other means.")
        unfinished.replace(path)
    except OSError as error:
        raise ModelError(f"'{file.name}' cannot be fetched from {file.url}: {error}. Get it by other means.") from None
    finally:
        unfinished.unlink(missing_ok=True)
