"""Whose folder it is, RELIABILITY cases 9 and 11."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext

import pytest

from unidad.errors import CheckpointError
from unidad.run import Lock, check_folder, open_run


def test_lock_refuses_a_second_holder_and_frees(tmp_path):
    with Lock(tmp_path):
        with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on {socket.gethostname()}"), Lock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # the refused one took nothing away
    with Lock(tmp_path):
        pass
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_refuses_another_process(tmp_path):
    code = "import sys; from pathlib import Path; from unidad.run import Lock\nwith Lock(Path(sys.argv[1])): pass"
    with Lock(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"in use by process {os.getpid()}" in done.stderr


def test_stale_lock_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    (tmp_path / ".lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_is_freed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Lock(tmp_path):
        raise ZeroDivisionError
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


FACTS = {"kind": "train", "settings": {"steps": 3, "a": 0.25, "cycles": 10}, "hashes": {"pictures": "abc"}}


def test_open_run(tmp_path):
    with open_run(tmp_path / "deep" / "run", FACTS, resume=False) as run:
        assert run.read() == FACTS
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"), open_run(run.path, FACTS, resume=True):
            pass
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume"), open_run(run.path, FACTS, resume=False):
        pass
    longer = FACTS | {"settings": FACTS["settings"] | {"cycles": 99}}
    with open_run(run.path, longer, resume=True) as again:  # a longer run is the same run
        assert again.read() == longer


def test_the_length_is_part_of_a_run_whose_rate_falls_towards_its_end(tmp_path):
    facts = FACTS | {"settings": FACTS["settings"] | {"lr_decay": "cosine"}}
    with open_run(tmp_path / "run", facts, resume=False):
        pass
    longer = facts | {"settings": facts["settings"] | {"cycles": 99}}
    with pytest.raises(CheckpointError, match="cycles: was 10, now 99"), open_run(tmp_path / "run", longer, resume=True):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"steps": 2, "a": 0.25, "cycles": 10}}, "steps: was 3, now 2"),
        ({"settings": {"steps": 3, "a": 0.25, "cycles": 10, "lr": 1}}, "lr: was .*, now 1"),
        ({"settings": {"a": 0.25, "cycles": 10}}, "steps: was 3, now None"),
        ({"hashes": {"pictures": "xyz"}}, "pictures: was abc, now xyz"),
        ({"kind": "pretrain"}, "holds a train run, not a pretrain run"),
    ],
)
def test_another_run_is_refused_with_the_difference(change, words, tmp_path):
    with open_run(tmp_path / "run", FACTS, resume=False):
        pass
    with pytest.raises(CheckpointError, match=words), open_run(tmp_path / "run", FACTS | change, resume=True):
        pass


def test_a_run_from_before_a_setting_existed_had_its_default(tmp_path):
    with open_run(tmp_path / "run", FACTS, resume=False):
        pass
    for value, fits in ((0.0, True), (1.0, False)):
        now = FACTS | {"settings": FACTS["settings"] | {"transfer": value}}
        with nullcontext() if fits else pytest.raises(CheckpointError, match=r"transfer: was 0\.0, now 1\.0"):
            check_folder(tmp_path / "run", now, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_folders_are_refused(resume, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not empty"), open_run(tmp_path, FACTS, resume):
        pass
    with pytest.raises(CheckpointError, match="is a file"), open_run(tmp_path / "letters.txt", FACTS, resume):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_damaged_run_json_is_refused(tmp_path):
    for text in ("{", "[]", '{"kind": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json"), open_run(tmp_path, FACTS, resume=True):
            pass


def test_going_on_in_another_number_format_is_refused(tmp_path):
    """`auto` is bf16 on one machine and float32 on another; it is the format that must stay, not the word."""
    was = FACTS | {"precision": "fp32", "settings": FACTS["settings"] | {"precision": "auto"}}
    with open_run(tmp_path / "run", was, resume=False):
        pass
    with pytest.raises(CheckpointError, match=r"precision: was fp32, now bf16 \(go on with --set precision=fp32\)"):
        check_folder(tmp_path / "run", was | {"precision": "bf16"}, resume=True)
    check_folder(tmp_path / "run", was | {"settings": was["settings"] | {"precision": "fp32"}}, resume=True)
