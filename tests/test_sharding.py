"""`shard=true`: networks, moments and averages shared out over processes learn what whole ones learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import ANCHORED, assert_close, source, state, together
from tiny import words

from unidad import checkpoint
from unidad.cli import main
from unidad.config import TrainSettings, build_settings
from unidad.errors import SettingsError
from unidad.sharding import in_full, is_shared_out, share_like, whole_state

__all__ = ["source"]  # the fixture
pytestmark = pytest.mark.usefixtures("no_report")
SHARD = ("--set", "shard=true")
# What is held at the end of training goes to a file of each process.
HELD = """
import json, os, pathlib
from unidad import train
fit = train.Trainer.fit
def noting(self, until=None):
    fit(self, until)
    def held(tensors):
        return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)
    found = {name: held(net.parameters()) for name, net in self.method.networks.items()} | {"ema": held(self.ema.module.parameters())}
    for name, optimizer in self.optimizers.items():
        found["moments." + name] = held(slot["exp_avg"] for slot in optimizer.state.values())
    pathlib.Path(__file__).with_name("held" + os.environ["RANK"]).write_text(json.dumps(found))
train.Trainer.fit = noting
"""
# The second process alone finds its third loss to be nan.
SPOILT = """
import os
from unidad import train
seen, find = [], train.not_finite
def spoilt(losses):
    seen.append(losses)
    return "total" if len(seen) == 3 and os.environ["RANK"] == "1" else find(losses)
train.not_finite = spoilt
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (*ANCHORED, "--set", "clip=0.5"),
        ("--set", "lr=1e-4", "--set", "target_warmup=2", "--set", "transfer=0.5", "--set", "sample_every=2"),
        ("--set", "lr=1e-4", "--set", "gradient_checkpointing=true", "--set", "accumulation=2", "--set", "ema=0"),
    ],
    ids=["anchored, clipped", "handed over, sampled", "recomputed, accumulated"],
)
def test_shared_out_learns_what_whole_learns(more, source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """4 cycles of two processes against one with the double batch; then each run goes on as the other, from its checkpoint."""
    two, one, whole = tmp_path / "two", tmp_path / "one", ("--set", "batch_size=4")
    out = together(tmp_path, 2, words(source, picture_folder, two, *more, *SHARD, cycles=4))
    assert out.split() == [str(two / "report.html")], "only one process speaks"
    assert main(words(source, picture_folder, one, *more, *whole, cycles=4)) == 0
    a, b = state(one, 4), state(two, 4)
    assert_close(a, b)
    for group in (g for g in a if g.startswith("optimizer.")):
        assert {k: t.shape for k, t in a[group].items()} == {k: t.shape for k, t in b[group].items()}
    drawn = [load_file(next((run / "student" / "unet").glob("*.safetensors"))) for run in (one, two)]
    assert_close({"network.student": drawn[0]}, {"network.student": drawn[1]})
    assert sorted(p.name for p in (one / "samples").iterdir()) == sorted(p.name for p in (two / "samples").iterdir())

    assert main(words(source, picture_folder, two, *more, *whole, "--resume", cycles=6)) == 0, "shared out no longer"
    together(tmp_path, 2, words(source, picture_folder, one, *more, *SHARD, "--resume", cycles=6))
    assert_close(state(one, 6), state(two, 6))


@pytest.mark.slow
def test_each_holds_half_and_all_leave_out_what_one_must(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    together(tmp_path, 2, words(source, picture_folder, out, *SHARD, "--set", "non_finite=skip", cycles=2), HELD + SPOILT)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] == 1
    assert rows[-1]["updates"] == {"student": 2, "fake_teacher": 2, "heads": 2, "target_teacher": 1}
    first, second = (json.loads((tmp_path / f"held{rank}").read_text()) for rank in range(2))
    found = checkpoint.load(out / "checkpoints" / "00000002").tensors
    size = {name: sum(t.numel() for t in found[f"network.{name}"].values()) for name in ("student", "fake_teacher", "heads")}
    for name in ("student", "source_teacher", "fake_teacher", "target_teacher", "ema"):
        assert first[name] + second[name] == size["student"]
        assert first[name] < 0.55 * size["student"]
    assert first["moments.student"] < 0.55 * size["student"]
    assert first["heads"] == second["heads"] == size["heads"], "which stay whole"


@pytest.mark.parametrize(
    "values", [{"lora_rank": 4}, {"compile": True}, {"channels_last": True}, {"gan_loss": "wgan-gp"}], ids=lambda v: next(iter(v))
)
def test_what_does_not_go_together(values: dict) -> None:
    with pytest.raises(SettingsError, match=f"'shard' does not go together with {next(iter(values))}"):
        build_settings(TrainSettings, {"shard": True, **values})


def test_one_process_has_nothing_to_share_out(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """The same run as without, so that a run of several can go on in one."""
    assert main(words(source, picture_folder, tmp_path / "a", *SHARD, cycles=1)) == 0
    assert main(words(source, picture_folder, tmp_path / "b", cycles=1)) == 0
    a, b = (state(tmp_path / run, 1) for run in "ab")
    assert all(torch.equal(a[group][name], tensor) for group in b for name, tensor in b[group].items())


def test_whole_tensors_are_themselves() -> None:
    x = torch.arange(3.0)
    assert in_full(x) is x
    assert share_like(x, torch.zeros(3)) is x
    assert whole_state({"x": x}, keep=False)["x"] is x
    assert not is_shared_out(torch.nn.Linear(2, 2))
