"""Signals, RELIABILITY case 6."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
from loop import make

from unidad import checkpoint
from unidad.signals import Stopped


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_after_the_update_under_way(signum, code, tmp_path, picture_folder, request):
    if signal.getsignal(signum) == signal.SIG_IGN:  # under nohup, which the loop respects
        request.addfinalizer(lambda: signal.signal(signum, signal.SIG_IGN))
        signal.signal(signum, signal.SIG_DFL)
    trainer = make(tmp_path, picture_folder)
    handler, phase = signal.getsignal(signum), trainer.method.phases[1]

    def loss(pictures, labels):
        os.kill(os.getpid(), signum)
        return phase.loss(pictures, labels)

    trainer.method.phases[1] = dataclasses.replace(phase, loss=loss)
    with pytest.raises(Stopped, match=signal.Signals(signum).name) as stopped:
        trainer.fit()
    assert stopped.value.code == code
    assert stopped.value.place.startswith("in cycle 0 of 3")
    assert checkpoint.names(tmp_path / "checkpoints") == ["00000000-1-0000000001"]
    assert signal.getsignal(signum) == handler


def test_a_second_signal_ends_at_once():
    code = """import os, signal
from unidad.signals import passing_on
with passing_on(print):
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), signum)
        print("alive", flush=True)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.split() == ["15", "alive"]


def test_what_is_ignored_stays_ignored():
    """`nohup` ignores SIGHUP for the program it starts."""
    code = """import os, signal
from unidad.signals import passing_on
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with passing_on(print):
    os.kill(os.getpid(), signal.SIGHUP)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
