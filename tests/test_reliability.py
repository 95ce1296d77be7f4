"""The promises of docs/reliability.md on the real command line: disks that refuse, memory that runs out, folders in use, hostile files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import V
from tiny import words

from unidad import checkpoint, ingredients
from unidad.backbones.load import WEIGHTS, load_model
from unidad.cli import main
from unidad.data import open_picture
from unidad.errors import CheckpointError, DataError, ModelError
from unidad.export import save_source
from unidad.metrics.extractors import load_extractor
from unidad.report import read_log, write_report
from unidad.run import Lock

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def run(no_report: None, source: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two cycles."""
    out = tmp_path_factory.mktemp("runs") / "two"
    assert main(words(source, picture_folder, out)) == 0
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "student").rename(tmp_path / "student")  # so that the checkpoint is what is read
    return tmp_path / "run"


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Inside, the system refuses more than `value` of a resource to this process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def at_most(megabytes: int) -> Iterator[None]:
    """Inside, this process may grow by so much."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return limit(resource.RLIMIT_AS, now + megabytes * 10**6)


# -- disks, memory, numbers: cases 3, 4, 7, 8 -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 150_000, 300_000], ids=["run.json", "network", "optimizer"])
def test_a_disk_that_refuses(size: int, copy: Path, source: Path, picture_folder: Path, capsys) -> None:
    """RLIMIT_FSIZE stands for the full disk: the first file larger than `size` cannot be written."""
    more = words(source, picture_folder, copy, "--resume", cycles=4)
    before = (copy / "run.json").read_bytes()
    with limit(resource.RLIMIT_FSIZE, size):
        assert main(more) == 2
    text = capsys.readouterr().err
    assert str(copy) in text
    assert "File too large" in text
    if size == 1_000:
        assert (copy / "run.json").read_bytes() == before
    else:
        assert "00000003" in text
        assert "bytes" in text
    assert checkpoint.names(copy / "checkpoints") == ["00000001", "00000002"]
    assert [p.name for p in copy.rglob("*") if p.name.endswith((".part", ".partial", ".old"))] == []
    assert checkpoint.latest(copy / "checkpoints")[0] == "00000002"
    assert main(more) == 0, "with room again it goes on"
    assert checkpoint.names(copy / "checkpoints") == ["00000003", "00000004"]


def test_a_disk_too_small_is_refused_before_training(
    source: Path, picture_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**7, 10**7 - 10**6, 10**6))
    assert main(words(source, picture_folder, tmp_path / "out")) == 2
    assert "keep=2) need" in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["network.student.safetensors", "random.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_told_and_passed_over(name: str, copy: Path, source: Path, picture_folder: Path, capsys) -> None:
    file = copy / "checkpoints" / "00000002" / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert main(words(source, picture_folder, copy, "--resume")) == 0
    text = capsys.readouterr().err
    assert str(file) in text or "no readable manifest.json" in text
    assert "Going on from '00000001' instead" in text
    assert "Going on from cycle 1 of 2" in text
    assert [name for name in checkpoint.names(copy / "checkpoints") if checkpoint.load(copy / "checkpoints" / name)] == [
        "00000001",
        "00000002",
    ]


def test_an_infinite_loss_is_named_and_nothing_is_saved(picture_folder: Path, tmp_path: Path, capsys) -> None:
    wild = tiny.backbone(1)
    with torch.no_grad():
        wild.unet.conv_out.weight.mul_(1e30)
    save_source(wild, V, tmp_path / "wild", {})
    assert main(words(tmp_path / "wild", picture_folder, tmp_path / "out")) == 1
    text = capsys.readouterr().err
    for part in ("phase 'student'", "became", "cycle 0", "no checkpoint yet", "non_finite=skip"):
        assert part in text
    assert checkpoint.names(tmp_path / "out" / "checkpoints") == []
    assert main(words(tmp_path / "wild", picture_folder, tmp_path / "skip", "--set", "non_finite=skip", cycles=9)) == 1, (
        "ten in a row"
    )


def test_memory_that_runs_out_in_the_forward_pass(source: Path, picture_folder: Path, tmp_path: Path, capsys) -> None:
    with at_most(1500):
        assert main(words(source, picture_folder, tmp_path / "out", "--set", "batch_size=30000")) == 1
    text = capsys.readouterr().err
    assert "you tried to allocate" in text
    assert "--set batch_size=1" in text
    assert len(text) < 1000


@pytest.mark.parametrize("where", ["backward", "save"])
def test_memory_that_runs_out_later(where: str, source: Path, picture_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise (
            MemoryError("tried to allocate 2.00 GiB")
            if where == "save"
            else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        )

    monkeypatch.setattr(*((checkpoint, "save_file", refuse) if where == "save" else (torch.Tensor, "backward", refuse)))
    assert main(words(source, picture_folder, tmp_path / "out")) == 1
    text = capsys.readouterr().err
    assert "ried to allocate 2.00 GiB" in text
    assert "--set batch_size=1" in text
    assert [p for p in (tmp_path / "out" / "checkpoints").glob("*") if p.is_dir()] == []


# -- whose folder, which run: cases 9, 11 -----------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_before_anything_is_loaded(source: Path, picture_folder: Path, tmp_path: Path) -> None:
    """Loading torch takes longer than the two seconds that are promised."""
    code = "import sys; from unidad.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    with Lock(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", code, *words(source, picture_folder, tmp_path, "--resume")], capture_output=True, text=True
        )
    assert done.returncode == 2
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in done.stderr
    assert done.stdout.strip() == "False"


def test_resuming_as_another_run_is_refused_with_the_difference(
    run: Path, source: Path, picture_folder: Path, tmp_path: Path, capsys
) -> None:
    save_source(tiny.backbone(1, widths=(8, 8)), V, tmp_path / "other", {})
    shutil.copytree(picture_folder, tmp_path / "fewer")
    (tmp_path / "fewer" / "00.png").unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for command, difference in (
        (words(tmp_path / "other", picture_folder, run, "--resume"), "source: was "),
        (words(source, tmp_path / "fewer", run, "--resume"), "pictures: was "),
        (words(source, picture_folder, run, "--resume", "--steps", "2"), "steps: was 3, now 2"),
    ):
        assert main(command) == 2
        assert difference in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_names_that_look_like_markup(source: Path, tmp_path: Path, capsys) -> None:
    for name in ("[bold]x.png", "[red].png"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / name)
    assert main(words(source, tmp_path / "pictures", tmp_path / "out", cycles=1)) == 0
    assert "Note: '[red].png' is the same picture as '[bold]x.png'." in capsys.readouterr().err


# -- hostile files: cases 14, 16, 17, 18 ------------------------------------------------------------------------------


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


# -- no network, no secrets: case 19 ----------------------------------------------------------------------------------

CALLS: list[tuple[str, str]] = []
_listening = False


def _listen(event: str, args: tuple) -> None:
    if _listening and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        CALLS.append((event, str(args[1:])))


def test_nothing_is_sent_and_no_secret_is_written(source: Path, picture_folder: Path, tmp_path: Path, monkeypatch) -> None:
    global _listening
    monkeypatch.setattr(ingredients, "write_report", write_report)
    load_extractor()
    sys.addaudithook(_listen)
    secrets = {name: f"secret-{name.lower()}-0123456789" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    out, drawn = tmp_path / "out", tmp_path / "drawn"
    _listening = True
    try:
        assert main(words(source, picture_folder, out, cycles=1)) == 0
        assert main(["sample", "bundled:avatars-3step", "-n", "2", "--out", str(drawn)]) == 0
        assert main(["evaluate", str(drawn), "--reference", str(picture_folder), "--json", str(tmp_path / "scores.json")]) == 0
        assert main(["export", str(out), "--out", str(tmp_path / "export")]) == 0
    finally:
        _listening = False
    assert CALLS == []
    for file in (p for p in tmp_path.rglob("*") if p.is_file()):
        content = file.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], file


def test_the_audit_hook_hears(tmp_path: Path) -> None:
    """The check above could not fail if the hook were deaf."""
    code = "import sys, socket; heard = []; sys.addaudithook(lambda e, a: heard.append(e)); "
    code += "s = socket.socket(); s.connect_ex(('127.0.0.1', 9)); print('socket.connect' in heard)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


# -- the size and cost of saving --------------------------------------------------------------------------------------


def test_saving_is_measured(run: Path) -> None:
    rows = [row for row in read_log(run / "log.jsonl") if "save_bytes" in row]
    assert len(rows) == 1, "the first cycle's save stands in the second cycle's row"
    files = (run / "checkpoints" / "00000001").glob("*.safetensors")
    held = sum(t.numel() * t.element_size() for file in files for t in load_file(file).values())
    assert rows[0]["save_bytes"] == held
    assert rows[0]["save_seconds"] >= 0
