"""Photos that are learnt under captions of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sd
import torch
from test_sdp import CPU, settings

from unidad.adapt import build_method
from unidad.backbones import load_text
from unidad.captions import read_captions
from unidad.errors import DataError
from unidad.ingredients_text import gather_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write_pipeline(tmp_path_factory.mktemp("sd") / "model")


def photos(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        (to / name).symlink_to(folder / name)
    return to


def test_each_photo_is_learnt_under_its_own_caption(folder: Path, picture_folder: Path, tmp_path: Path):
    place = photos(picture_folder, tmp_path / "photos")
    for name, text in (("00", "a prt cat on the dog"), ("01", "a prt cat"), ("02", "the prt cat\n")):
        (place / f"{name}.txt").write_text(text)
    s = settings(folder, batch_size=3)
    parts = gather_text(s, place)
    assert parts.captions.tolist() == [1, 0, 2]
    assert parts.contexts == 1
    expected = ["a prt cat", "a prt cat on the dog", "the prt cat", ""]
    assert torch.allclose(parts.told["student"], load_text.encode_prompts(folder, expected))

    method = build_method(s, parts, CPU, torch.Generator().manual_seed(0))
    pictures, labels, _ = parts.stream(s, CPU).batch(3)
    assert labels is not None
    for picture, label in zip(pictures, labels, strict=True):
        assert torch.equal(picture, parts.latents[parts.captions.tolist().index(int(label))])
    seen: dict[str, list[list[int]]] = {"fake_teacher": [], "target_teacher": []}
    for name, calls in seen.items():
        net = method.networks[name]
        net._condition = lambda rows, calls=calls, asked=net._condition: calls.append(rows.tolist()) or asked(rows)
    by_name = {phase.name: phase for phase in method.phases}
    by_name["fake_teacher"].loss(pictures, labels)
    by_name["target_teacher"].loss(pictures, labels)
    assert seen == {"fake_teacher": [[0, 0, 0], [0, 0, 0]], "target_teacher": [labels.tolist()]}


def test_captions_from_metadata_and_bad_ones(picture_folder: Path, tmp_path: Path):
    place, names = photos(picture_folder, tmp_path / "photos"), ["00.png", "01.png"]
    assert read_captions(place, names) is None
    lines = [{"file_name": "01.png", "text": "one"}, {"file_name": "00.png", "text": " two  words "}]
    (place / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_captions(place, names) == ["two words", "one"]
    with pytest.raises(DataError, match=r"no caption or an empty one: 02\.png"):
        read_captions(place, [*names, "02.png"])
    for row, words in (
        ('{"file_name": "../00.png", "text": "x"}', "in this very folder"),
        ('{"file_name": "..\\\\00.png", "text": "x"}', "in this very folder"),
        ('{"file_name": "00.png", "text": 3}', "Line 1"),
        ('{"file_name": "00.png"}', "must look like"),
        ("nonsense", "must look like"),
        ('{"file_name": "00.png", "text": "x"}\n{"file_name": "00.png", "text": "y"}', "second caption"),
        ('{"file_name": "00.png", "text": ""}', "no caption"),
    ):
        (place / "metadata.jsonl").write_text(row)
        with pytest.raises(DataError, match=words):
            read_captions(place, names)
