"""Hostile files: RELIABILITY cases 14, 16, 17 and 18."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_reliability import at_most
from tiny import words

from unidad import checkpoint
from unidad.backbones.load import WEIGHTS, load_model
from unidad.cli import main
from unidad.data import open_picture
from unidad.errors import CheckpointError, DataError, ModelError

pytestmark = pytest.mark.usefixtures("no_report")


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_opened(source: Path, copy: Path, picture_folder: Path, tmp_path: Path, capsys) -> None:
    """At every place where a file is read: models, students, checkpoints, pictures, settings, feature caches."""
    canary = tmp_path / "canary"
    plain, zipped = pickle.dumps(Canary(canary)), io.BytesIO()
    torch.save(Canary(canary), zipped)
    seen = 0
    for content in (plain, zipped.getvalue(), f"!!python/object/apply:builtins.open [{canary}, w]".encode()):
        for name in (
            WEIGHTS,
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.pt",
            "model.ckpt",
            "weights.npz",
            "config.json",
        ):
            model = tmp_path / f"model{seen}"
            shutil.copytree(source, model)
            (model / "unet" / name).write_bytes(content)
            if name.endswith("bin"):
                (model / "unet" / WEIGHTS).unlink()
            readable = name not in (WEIGHTS, "diffusion_pytorch_model.bin", "config.json")
            assert main(["info", str(model)]) == (0 if readable else 2)
            assert main(["sample", str(model), "-n", "1", "--steps", "1", "--out", str(tmp_path / f"s{seen}")]) == (
                0 if readable else 2
            )
            seen += 1
        for file in (copy / "checkpoints" / "00000002").iterdir():
            file.write_bytes(content)
        assert main(["export", str(copy), "--out", str(tmp_path / f"e{seen}")]) == 0, "from the checkpoint before"
        (tmp_path / "x.yaml").write_bytes(content)
        assert main(words(source, picture_folder, tmp_path / "out", "--config", str(tmp_path / "x.yaml"))) == 2
        (tmp_path / f"p{seen}").mkdir()
        (tmp_path / f"p{seen}" / "a.png").write_bytes(content)
        assert main(words(source, tmp_path / f"p{seen}", tmp_path / "out")) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not canary.exists()
    pickle.loads(plain).close()
    assert canary.exists(), "the canary itself works"


def test_statistics_and_metric_weights_are_never_unpickled(picture_folder: Path, tmp_path: Path, capsys) -> None:
    canary, seen = tmp_path / "canary", io.BytesIO()
    torch.save(Canary(canary), seen)
    objects = np.array([Canary(canary)], dtype=object)
    np.savez(tmp_path / "objects.npz", mu=objects, sigma=objects)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "weights.pth").write_bytes(seen.getvalue())
    for name in ("objects", "array", "plain"):
        assert main(["evaluate", str(picture_folder), "--reference", str(tmp_path / f"{name}.npz")]) == 2
    weights = ["--extractor", "inception-fid", "--weights", str(tmp_path / "weights.pth")]
    assert main(["evaluate", str(picture_folder), "--reference", str(picture_folder), *weights]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not canary.exists()


def malformed(good: bytes) -> dict[str, bytes]:
    def file(header: bytes | dict, body: bytes = b"") -> bytes:
        text = json.dumps(header).encode() if isinstance(header, dict) else header
        return struct.pack("<Q", len(text)) + text + body

    def entry(start: int, end: int, shape: list[int], kind: str = "F32") -> dict:
        return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}

    return {
        "no file at all": b"",
        "cut short": good[: len(good) // 2],
        "header of 2**60 bytes": struct.pack("<Q", 2**60) + good[8:],
        "header of 99 MB of blanks": struct.pack("<Q", 99 * 10**6) + b" " * 99 * 10**6,
        "no JSON": file(b"{" * 50),
        "deep JSON": file(b"[" * 10**6),
        "offsets beyond the end": file({"a": entry(0, 10**15, [250 * 10**12])}),
        "overlapping": file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
        "backwards": file({"a": entry(8, 0, [2])}, bytes(8)),
        "shape of another size": file({"a": entry(0, 8, [2**40])}, bytes(8)),
        "shape that overflows": file({"a": entry(0, 8, [2**32, 2**32, 2])}, bytes(8)),
    }


def test_malformed_weights_are_refused_in_little_memory(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    weights = model / "unet" / WEIGHTS
    for content in malformed(weights.read_bytes()).values():
        weights.write_bytes(content)
        with at_most(300), pytest.raises(ModelError, match="do not fit or are damaged"):
            load_model(model)


def forge(path: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint and into its manifest, so that all hashes agree."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": digest, "manifest": manifest}))


def test_checkpoints_made_by_a_stranger(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, "1", checkpoint.Snapshot({"a": {"x": torch.ones(2)}}))
    for content in malformed((good / "a.safetensors").read_bytes()).values():
        forge(good, "a.safetensors", content)
        with at_most(300), pytest.raises(CheckpointError, match=r"a\.safetensors"):
            checkpoint.load(good)
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    good = checkpoint.save(tmp_path, "2", checkpoint.Snapshot({"a": {"x": torch.ones(2)}}))
    forge(good, "../outside.safetensors", (tmp_path / "outside.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        checkpoint.load(good)


def test_run_and_student_notes_made_by_a_stranger(copy: Path, run: Path, tmp_path: Path, capsys) -> None:
    facts = json.loads((copy / "run.json").read_text())
    spoilt = [{}, facts | {"settings": []}, facts | {"settings": {}}, facts | {"product": "../../x"}, facts | {"data": 3}]
    spoilt += [facts | {"student_steps": steps} for steps in ("abc", [], [5000], [-1], [1, 2], [True], 3, [10**30])]
    texts = [json.dumps(content) for content in spoilt] + ["[" * 10**5, "\x00", "nan"]
    for i, text in enumerate(texts):
        (copy / "run.json").write_text(text)
        assert main(["info", str(copy)]) in (0, 2)
        assert main(["sample", str(copy), "-n", "1", "--out", str(tmp_path / f"s{i}")]) in (0, 2)
    shutil.copytree(run / "student", tmp_path / "model")
    for i, notes in enumerate(
        ({"student_steps": "abc"}, {"student_steps": [5000]}, {"student_steps": [3, 5]}, {"class_label": "x"}, [])
    ):
        (tmp_path / "model" / "unidad.json").write_text(json.dumps(notes))
        assert main(["sample", str(tmp_path / "model"), "-n", "1", "--out", str(tmp_path / f"m{i}")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "index", [{"_class_name": ["pipeline", "Mine"]}, {"unet": ["my_unet", "Mine"]}, {"extra": ["os", "system"]}]
)
def test_a_pipeline_with_code_of_its_own_is_refused(index: dict, source: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(source, tmp_path / "model")
    whole = json.loads((tmp_path / "model" / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(whole | index))
    for name in ("pipeline", "my_unet", "unet/my_unet"):
        (tmp_path / "model" / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert main(["info", str(tmp_path / "model")]) == 2
    assert "own code" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("side", [9_500, 13_000])
def test_whole_bombs_are_refused_in_little_memory(side: int, kind: str, tmp_path: Path) -> None:
    """A small file that unpacks to a huge picture: its header is all that may be read."""
    path, small = tmp_path / f"bomb.{kind.lower()}", Image.new("1" if kind in ("PNG", "TIFF", "BMP") else "P", (side, side))
    if kind == "WEBP":
        path.write_bytes(
            b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<IB3x", 10, 0) + (side - 1).to_bytes(3, "little") * 2
        )
    else:
        small.save(path, **({"compression": "tiff_deflate"} if kind == "TIFF" else {}))
    del small
    with at_most(200), pytest.raises(DataError, match="bomb"):
        open_picture(path)
