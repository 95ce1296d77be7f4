"""`hflip` and `hflip_check`: pictures are mirrored at random, but not where they all look one way."""

from __future__ import annotations

import pytest
import torch

from unidad.backbones.load import bundled_names, bundled_path
from unidad.config import TrainSettings, build_settings
from unidad.data import load_folder, looks_one_way
from unidad.ingredients import gather


def pictures(name: str, side: int = 32) -> torch.Tensor:
    return load_folder(bundled_path(f"bundled:{name}", "targets"), side).pixels


def test_pictures_that_look_one_way_are_told_from_others():
    found = {name: looks_one_way(pictures(name)) for name in bundled_names("targets")}
    assert found == {"lorelei": True, "bottts": False, "sunglasses": False, "toonHead": False}
    lorelei = pictures("lorelei", 64)
    assert looks_one_way(lorelei)
    assert not looks_one_way(torch.cat([lorelei, lorelei.flip(-1)]))  # both ways
    assert not looks_one_way(lorelei[:1])  # unlike whom?
    assert not looks_one_way(torch.full((3, 3, 8, 8), 7, dtype=torch.uint8))


@pytest.mark.parametrize(("name", "hflip", "check", "mirrored"), [
    ("lorelei", True, True, False), ("lorelei", True, False, True), ("lorelei", False, False, False), ("bottts", True, True, True),
    ("bottts", False, True, False),
])  # fmt: skip
def test_pictures_are_mirrored_unless_they_look_one_way(name, hflip, check, mirrored):
    settings = build_settings(TrainSettings, {"student_init": "bundled:avatars-3step", "hflip": hflip, "hflip_check": check})
    parts = gather(settings, f"bundled:{name}")
    assert parts.stream(settings, torch.device("cpu")).hflip is mirrored
    told = [note for note in parts.pictures.notes if "one way" in note]
    assert bool(told) is (name == "lorelei" and hflip)
    assert not told or ("hflip_check=false" if check else "hflip=false") in told[0]
