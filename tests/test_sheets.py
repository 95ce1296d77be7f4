"""Words beside pictures: where they stand, that pictures are not touched, and that long ones are shortened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageFont

from unidad.sheets import FONT_SIZE, GAP, LINE, MARGIN, PAD, fitted, labelled_grid

FONT = ImageFont.load_default(FONT_SIZE)


def ink(sheet: np.ndarray, upper: int, lower: int, left: int, right: int) -> int:
    """Pixels in a part of a sheet that are not white."""
    return int((sheet[upper:lower, left:right] < 255).any(-1).sum())


def test_pictures_stay_as_they_are_and_words_stay_beside_them():
    rows = [torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (3, 2)]
    sheet = np.asarray(labelled_grid(rows, ["a cat", "a dog " * 50], ["seed 5", "seed 6", "seed 7"], scale=2))
    assert sheet.shape == (LINE + 2 * 64 + GAP, MARGIN + 3 * 64 + 2 * GAP, 3)
    places = [(r, c) for r, row in enumerate(rows) for c in range(len(row))]
    for r, c in places:
        upper, left = LINE + r * (64 + GAP), MARGIN + c * (64 + GAP)
        drawn = rows[r][c].permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
        assert (sheet[upper : upper + 64, left : left + 64] == drawn).all(), (r, c)
    short, long = ink(sheet, LINE, LINE + 64, 0, MARGIN), ink(sheet, LINE + 66, LINE + 130, 0, MARGIN)
    assert 0 < short < long
    assert all(ink(sheet, 0, LINE, MARGIN + i * 66, MARGIN + i * 66 + 64) for i in range(3))
    assert not ink(sheet, 0, LINE, 0, MARGIN)
    assert not ink(sheet, LINE + 66, LINE + 130, MARGIN + 2 * 66, MARGIN + 3 * 66), "the second row has no third picture"
    assert not ink(sheet, 0, len(sheet), MARGIN - PAD, MARGIN), "words end before the pictures"


@pytest.mark.parametrize(
    "text",
    [
        "a prt cat",
        "a prt cat on the beach with a red hat and a blue scarf " * 3,
        "x" * 200,
        "a " + "x" * 200 + " b",
        "\u732b \u0142",
    ],
)
@pytest.mark.parametrize("lines", [1, 3])
def test_words_fit_and_say_what_was_left_out(text: str, lines: int):
    found = fitted(text, 100, lines, FONT)
    assert 1 <= len(found) <= lines
    assert all(FONT.getlength(line) <= 100 for line in found)
    whole = " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
    assert " ".join(found) == whole or any(line.endswith("...") for line in found)
    assert found[0].split(" ")[0].removesuffix("...") in whole


def test_without_columns_nothing_stands_above():
    assert labelled_grid([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], ["a"]).size == (MARGIN + 16, 16)
