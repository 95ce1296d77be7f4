from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch

from unidad import checkpoint
from unidad.checkpoint import MANIFEST, Snapshot
from unidad.errors import CheckpointError


def snapshot(value: int = 0) -> Snapshot:
    tensors = {
        "network.student": {"w": torch.full((3, 2), float(value)), "b": torch.arange(4, dtype=torch.bfloat16)},
        "optimizer.student": {"0.step": torch.tensor(float(value)), "0.exp_avg": torch.randn(3, 2)},
        "random": {"generator": torch.Generator().manual_seed(value).get_state()},
        "carried": {},
    }
    return Snapshot(tensors, {"place": {"cycle": value, "seconds": 0.1 + 0.2, "updates": {"student": value}}, "drawn": 7})


def same(a: Snapshot, b: Snapshot) -> bool:
    return (
        a.counters == b.counters
        and a.tensors.keys() == b.tensors.keys()
        and all(ts.keys() == b.tensors[g].keys() for g, ts in a.tensors.items())
        and all(
            torch.equal(t, b.tensors[g][k]) and t.dtype == b.tensors[g][k].dtype
            for g, ts in a.tensors.items()
            for k, t in ts.items()
        )
    )


def litter(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_round_trip(tmp_path):
    s = snapshot(5)
    s.tensors["network.student"]["slice"] = torch.arange(12.0).view(3, 4)[:, 1]  # not contiguous
    path = checkpoint.save(tmp_path / "new" / "folder", "00000005", s)
    assert same(checkpoint.load(path), s)
    assert litter(path.parent) == []
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}  # nothing pickled


def test_latest_is_the_newest(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for i, name in enumerate(("00000001", "00000001-1-0002", "00000002", "00000010")):
        checkpoint.save(tmp_path, name, snapshot(i))
        assert checkpoint.latest(tmp_path)[0] == name
        assert checkpoint.latest(tmp_path)[1].counters["place"]["cycle"] == i


FILES = ["network.student.safetensors", "optimizer.student.safetensors", "random.safetensors", "carried.safetensors", MANIFEST]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink, lambda f: f.write_bytes(b"")], ids=["truncate", "flip", "delete", "empty"]
)
def test_damage_is_noticed_and_passed_over(name, damage, tmp_path):
    """RELIABILITY case 4."""
    good = snapshot(1)
    checkpoint.save(tmp_path, "00000001", good)
    damage(checkpoint.save(tmp_path, "00000002", snapshot(2)) / name)
    with pytest.raises(CheckpointError, match="00000002"):
        checkpoint.load(tmp_path / "00000002")
    with pytest.warns(UserWarning, match="00000002.*Going on from '00000001'"):
        found = checkpoint.latest(tmp_path)
    assert found[0] == "00000001"
    assert same(found[1], good)


def test_every_byte_counts(tmp_path):
    """One flipped bit anywhere is noticed, or (in the manifest) changes nothing that is read."""
    s = Snapshot({"a": {"x": torch.ones(1)}}, {"n": 3})
    path = checkpoint.save(tmp_path, "c", s)
    for file in (path / "a.safetensors", path / MANIFEST):
        content = file.read_bytes()
        for i in range(len(content)):
            file.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.load(path)
        file.write_bytes(content)
    assert same(checkpoint.load(path), s)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for i in (1, 2):
        truncate(checkpoint.save(tmp_path, f"0000000{i}", snapshot(i)) / "random.safetensors")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"manifest": 1, "sha256": ""}', '{"sha256": "x", "manifest": {"files": {}}}']
)
def test_manifests_that_are_none(text, tmp_path):
    path = checkpoint.save(tmp_path, "c", snapshot())
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


# -- crashes and full disks, RELIABILITY cases 3 and 5 ----------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the library may run."""


class Fuse:
    """Wraps the calls that touch the disk; the n-th one (counting all of them) fails before it does anything."""

    TARGETS = (
        (checkpoint, "save_file"),
        (checkpoint, "_sync"),
        (Path, "rename"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (Path, "write_text"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException):
        self.count, self.fail_at, self.error = 0, fail_at, error
        for owner, name in self.TARGETS:
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))

    def guard(self, original):
        def guarded(*args, **options):
            self.count += 1
            if self.count == self.fail_at:
                raise self.error
            return original(*args, **options)

        return guarded


def fail_at_every_point(folder: Path, action, error: BaseException, kind: type[BaseException]):
    """Run `action` in a copy of `folder`, failing at its 1st, 2nd, ... disk call, until it passes; yields each copy."""
    n = 0
    while True:
        n += 1
        copy = folder.parent / f"copy{n}"
        shutil.copytree(folder, copy)
        with pytest.MonkeyPatch.context() as patch:
            fuse = Fuse(patch, n, error)
            with contextlib.suppress(kind):
                action(copy)
        yield copy
        if fuse.count < n:
            assert n > 4
            return


def test_crash_while_saving_leaves_the_previous(tmp_path):
    old, new = snapshot(1), snapshot(2)
    checkpoint.save(tmp_path / "run", "00000001", old)
    for copy in fail_at_every_point(tmp_path / "run", lambda f: checkpoint.save(f, "00000002", new), Killed(), Killed):
        name, found = checkpoint.latest(copy)
        assert same(found, {"00000001": old, "00000002": new}[name])
        checkpoint.save(copy, "00000002", new)  # what a crash left lying does not disturb the next save
        assert same(checkpoint.load(copy / "00000002"), new)
        assert litter(copy) == []


def test_saving_again_under_the_same_name(tmp_path):
    """As on resuming a finished run: a whole checkpoint is left as it is, a damaged one is replaced."""
    s = snapshot(1)
    checkpoint.save(tmp_path, "00000001", s)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "00000001").iterdir()}
    checkpoint.save(tmp_path, "00000001", s)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "00000001").iterdir()}
    flip(tmp_path / "00000001" / "network.student.safetensors")
    checkpoint.save(tmp_path, "00000001", s)
    assert same(checkpoint.load(tmp_path / "00000001"), s)


def test_pruning_removes_damaged_ones_after_the_newest(tmp_path):
    """After falling back from a damaged checkpoint the run saves before it; the damaged one must not stop it."""
    for name in ("1", "2", "3"):
        checkpoint.save(tmp_path, name, snapshot(int(name)))
    flip(tmp_path / "3" / "network.student.safetensors")
    checkpoint.prune(tmp_path, 1, "2")
    assert checkpoint.names(tmp_path) == ["2"]


def test_full_disk_while_saving(tmp_path):
    old = snapshot(1)
    checkpoint.save(tmp_path / "run", "00000001", old)
    full = OSError(28, "No space left on device")
    for copy in fail_at_every_point(tmp_path / "run", lambda f: checkpoint.save(f, "00000002", snapshot(2)), full, CheckpointError):
        assert same(checkpoint.load(copy / "00000001"), old)
        assert litter(copy) == []


def test_full_disk_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(CheckpointError, match=r"00000002.*No space left.*needs [\d,]+ bytes; [\d,]+ are free"):
        checkpoint.save(tmp_path, "00000002", snapshot(2))


def test_crash_while_pruning_keeps_a_valid_one(tmp_path):
    newest = snapshot(4)
    for i in (1, 2, 3):
        checkpoint.save(tmp_path / "run", f"0000000{i}", snapshot(i))
    checkpoint.save(tmp_path / "run", "00000004", newest)
    for copy in fail_at_every_point(tmp_path / "run", lambda f: checkpoint.prune(f, 1, "00000004"), Killed(), Killed):
        name, found = checkpoint.latest(copy)
        assert name == "00000004"
        assert same(found, newest)


@pytest.mark.parametrize(("keep", "left"), [(1, ["3"]), (2, ["2", "3"]), (3, ["1", "2", "3"]), (9, ["1", "2", "3"])])
def test_prune_keeps_the_newest(keep, left, tmp_path):
    for name in ("1", "2", "3"):
        checkpoint.save(tmp_path, name, snapshot(int(name)))
    checkpoint.prune(tmp_path, keep, "3")
    assert checkpoint.names(tmp_path) == left
    assert litter(tmp_path) == []


def test_prune_deletes_nothing_while_the_newest_is_damaged(tmp_path):
    for name in ("1", "2"):
        checkpoint.save(tmp_path, name, snapshot(int(name)))
    flip(tmp_path / "2" / "network.student.safetensors")
    with pytest.raises(CheckpointError):
        checkpoint.prune(tmp_path, 1, "2")
    assert checkpoint.names(tmp_path) == ["1", "2"]


def test_litter_of_a_crash_goes_with_the_next_save(tmp_path):
    """A kill in mid save or mid prune leaves a hidden folder of a checkpoint's size; it must not stay for ever."""
    checkpoint.save(tmp_path, "1", snapshot(1))
    shutil.copytree(tmp_path / "1", tmp_path / ".0.partial")
    shutil.copytree(tmp_path / "1", tmp_path / ".0.old")
    checkpoint.save(tmp_path, "2", snapshot(2))
    checkpoint.prune(tmp_path, 1, "2")
    assert litter(tmp_path) == []
