"""Sheets of pictures with words at their rows and columns: prompts x seeds."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unidad.data import picture_grid

FONT_SIZE = 12
LINE = FONT_SIZE + 4
MARGIN = 180  # pixels of the column of row labels
PAD = 4
GAP = 2


def labelled_grid(rows: Sequence[Tensor], labels: Sequence[str], columns: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """A row of pictures for each label, which stands on its left in as many lines as fit, shortened where it is longer.

    Args:
        rows: [n, 3, S, S] uint8 each; n may differ.
        labels: of the rows.
        columns: of the pictures in a row, above the first row; none are shown where this is empty.
        scale: each picture is enlarged so many times.
    """
    side, most = rows[0].shape[-1] * scale, max(len(row) for row in rows)
    top = LINE if columns else 0
    sheet = Image.new("RGB", (MARGIN + most * (side + GAP) - GAP, top + len(rows) * (side + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)

    def write(text: str, left: int, upper: int, width: int, lines: int) -> None:
        for i, line in enumerate(fitted(text, width - 2 * PAD, lines, font)):
            pen.text((left + PAD, upper + 1 + i * LINE), line, fill="black", font=font)

    for i, text in enumerate(columns):
        write(text, MARGIN + i * (side + GAP), 0, side, 1)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        upper = top + i * (side + GAP)
        write(label, 0, upper, MARGIN, max(1, side // LINE))
        if len(row):
            sheet.paste(picture_grid(row, columns=len(row), scale=scale, gap=GAP), (MARGIN, upper))
    return sheet


def fitted(text: str, width: float, lines: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in at most so many lines of at most `width` pixels; what was left out ends in "...", and words too long are cut.

    Letters that not every build of Pillow has in its own font become "?".
    """
    words = text.encode("latin-1", "replace").decode("latin-1").split()
    found: list[str] = []
    while words and len(found) < lines:
        line = ""
        while words and font.getlength(f"{line} {words[0]}".strip()) <= width:
            line = f"{line} {words.pop(0)}".strip()
        found.append(line or words.pop(0))
    if words and found:
        found[-1] += " ..."
    return [_cut(line, width, font) for line in found]


def _cut(line: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" ...")
    while kept and font.getlength(f"{kept}...") > width:
        kept = kept[:-1].rstrip()
    return f"{kept}..."
