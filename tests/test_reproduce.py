from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import words

from unidad import checkpoint, reproduce
from unidad.cli import main

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def pictures(picture_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(picture_folder, tmp_path / "pictures")
    return tmp_path / "pictures"


def test_a_run_is_reproduced_to_the_bit(source: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    """Also one that was stopped and resumed, that is not at its last cycle, and whose rate depends on how many there are."""
    run, again, third = tmp_path / "run", tmp_path / "again", tmp_path / "third"
    limits = ("--set", "lr_decay=cosine", "--set", "max_minutes=0.000001")
    assert main(words(source, pictures, run, *limits, cycles=4)) == 0
    assert main(words(source, pictures, run, *limits, "--resume", cycles=4)) == 0
    assert "Stopped by max_minutes=1e-06 in cycle 1 of 4." in capsys.readouterr().err
    assert main(["info", str(run)]) == 0
    assert "cycle 2 of 4, 0.0 minutes, ended early" in capsys.readouterr().out
    assert checkpoint.names(run / "checkpoints") == ["00000001", "00000002"]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["reproduce", str(run), "--out", str(again)]) == 0
    text = capsys.readouterr().out
    assert "Compared at cycle 2" in text
    assert "The same to the last bit" in text
    assert checkpoint.names(again / "checkpoints") == ["00000002"]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["reproduce", str(run), "--out", str(again)]) == 2
    assert "a repetition starts anew" in capsys.readouterr().err

    (pictures / "00.png").unlink()
    assert main(["reproduce", str(run), "--out", str(third)]) == 2
    assert "pictures: was " in capsys.readouterr().err
    shutil.rmtree(pictures)
    assert main(["reproduce", str(run), "--out", str(third)]) == 2
    assert "--target FOLDER" in capsys.readouterr().err
    assert not third.exists()


def test_another_result_is_told(source: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    """A run.json that does not tell how the run was made: the repetition ends elsewhere, and the command says where they part."""
    run = tmp_path / "run"
    assert main(words(source, pictures, run)) == 0
    facts = json.loads((run / "run.json").read_text())
    facts["settings"]["lr_fake"] = 1e-3
    facts["surroundings"]["versions"]["torch"] = "1.0"
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["reproduce", str(run), "--out", str(tmp_path / "again")]) == 1
    text = capsys.readouterr().out
    assert "network.fake_teacher: differs by" in text
    assert f"torch: was 1.0, now {torch.__version__}" in text
    assert text.strip().endswith("Not the same.")


def test_a_pretrained_model_is_reproduced(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("unidad.pretrain.Plain.draw", lambda *_: torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    settings = ["size=16", "widths=8,16", "cycles=2", "batch_size=2", "tracker=none", "sample_every=0"]
    sets = [word for setting in settings for word in ("--set", setting)]
    assert main(["pretrain", "--data", str(pictures), "--out", str(tmp_path / "p"), "--device", "cpu", *sets]) == 0
    assert main(["reproduce", str(tmp_path / "p"), "--out", str(tmp_path / "again")]) == 0


def test_the_record_is_complete(source: Path, pictures: Path, tmp_path: Path) -> None:
    assert main(words(source, pictures, tmp_path / "run", cycles=1)) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"source", "pictures"} <= facts["hashes"].keys()
    assert facts["settings"]["seed"] == 0
    assert facts["precision"] in ("fp32", "bf16")
    assert facts["device"] == "cpu"
    assert {"versions", "platform", "threads", "commit"} <= facts["surroundings"].keys()
    assert facts["surroundings"]["versions"]["torch"] == torch.__version__


def test_tolerance_by_hand() -> None:
    """|a - b| / |a| with a = (3, 4), b = (3, 4.04): 0.04 / 5 = 0.008, within 0.01 on a GPU and never on a CPU."""
    a, b = {"network.student": {"w": torch.tensor([3.0, 4.0])}}, {"network.student": {"w": torch.tensor([3.0, 4.04])}}
    differences = reproduce._compare(a, b)
    assert differences == {"network.student": pytest.approx(0.008, rel=1e-4)}
    assert reproduce._verdict(differences, "cuda", "", []).same
    assert not reproduce._verdict(differences, "cpu", "", []).same
    assert not reproduce._verdict({"network.student": 0.02}, "cuda", "", []).same
    assert reproduce._compare(a, {"network.student": {"v": torch.zeros(2)}}) == {"network.student": float("inf")}
