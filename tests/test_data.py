from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, TiffImagePlugin

from unidad.data import (
    MAX_PIXELS,
    PictureStream,
    list_pictures,
    load_folder,
    open_picture,
    picture_grid,
    smallest_side,
    to_signed,
    to_uint8,
)
from unidad.errors import DataError
from unidad.info import describe_path


def gradient(w: int = 40, h: int = 36) -> np.ndarray:
    """A smooth RGB picture, [h, w, 3] uint8."""
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 255 / (w - 1), y * 255 / (h - 1), (x + y) * 255 / (w + h - 2)], axis=2).round().astype(np.uint8)


def rgb(path: Path) -> np.ndarray:
    return np.asarray(open_picture(path)[0]).astype(int)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def golden(path: Path, wanted: np.ndarray, levels: int = 2) -> None:
    got = rgb(path)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted.astype(int)).max() <= levels


# -- refused by name, RELIABILITY case 12 -----------------------------------------------------------------------------


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / ("broken.jpg" if kind == "truncated jpeg" else "broken.png")
    image, stream = Image.fromarray(gradient(200, 200)), io.BytesIO()
    if kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "eps":
        image.save(path, format="EPS")
    elif kind == "svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>')
    else:
        image.save(stream, format="JPEG" if "jpeg" in kind else "PNG")
        path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    return path


def test_all_files_that_cannot_be_used_are_named_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png' is not a picture.*Nor can b\.png be used"):
        load_folder(tmp_path, 8)
    assert "2 of them cannot be used" in describe_path(str(tmp_path))


@pytest.mark.parametrize("kind", ["truncated png", "truncated jpeg", "text", "empty", "eps", "svg"])
def test_broken_files_are_refused_by_name(kind, tmp_path):
    path = broken(tmp_path, kind)
    for call in (lambda: open_picture(path), lambda: load_folder(tmp_path, 16)):
        with pytest.raises(DataError, match=path.name):
            call()


def encodings() -> dict[str, bytes]:
    image, result = Image.fromarray(gradient(24, 24)), {}
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        stream = io.BytesIO()
        image.save(stream, format=kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        result[kind] = stream.getvalue()
    return result


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_data_error(kind, tmp_path):
    """No other exception may come out of a stranger's file."""
    content, rng, path = encodings()[kind], random.Random(0), tmp_path / f"x.{kind.lower()}"
    for trial in range(150):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 10])):
            damaged[rng.randrange(min(len(damaged), 80) if trial % 2 else len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(damaged))] if trial % 5 == 0 else damaged)
        try:
            image, _ = open_picture(path)
        except DataError:
            continue
        assert image.mode == "RGB"


# -- unusual but good, RELIABILITY case 13 ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tiff", "x.webp"])
def test_plain_rgb_is_exact(name, tmp_path):
    Image.fromarray(gradient()).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    golden(tmp_path / name, gradient(), 0)


def test_cmyk(tmp_path):
    flat = np.full((40, 40, 3), (200, 120, 40), np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "x.tiff")
    golden(tmp_path / "x.jpg", flat)
    golden(tmp_path / "x.tiff", flat)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("top", [65535, 30000, 200])
def test_sixteen_bits(suffix, top, tmp_path):
    """Neither clipped to white nor, where it is dark, brightened: 200 of 65535 is black."""
    grey = np.linspace(0, top, 40 * 36).round().astype(np.uint16).reshape(36, 40)
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}")
    wanted = (grey / 257).round()
    golden(tmp_path / f"x.{suffix}", np.repeat(wanted[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["rgb", "rgba", "grey with alpha"])
def test_sixteen_bits_of_several_channels(kind, tmp_path):
    """Made by hand: Pillow reads such PNGs and does not write them."""
    colour, channels = {"rgb": (2, 3), "rgba": (6, 4), "grey with alpha": (4, 2)}[kind]
    h, w = 36, 40
    deep = np.linspace(0, 65535, h * w * channels).round().astype(np.uint16).reshape(h, w, channels)
    if kind != "rgb":
        deep[..., -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0))
    body = head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    wanted = (deep / 257).round()
    golden(tmp_path / "x.png", np.repeat(wanted[..., :1], 3, axis=2) if channels == 2 else wanted[..., :3])


def test_animated_gif_gives_its_first_frame_and_a_note(tmp_path):
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    golden(tmp_path / "x.gif", np.full((40, 40, 3), (255, 0, 0)))
    notes = load_folder(tmp_path, 16).notes
    assert any("'x.gif' is animated" in note and "first frame" in note for note in notes)


def test_palette_with_alpha_lies_on_white(tmp_path):
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:20] = (255, 0, 0, 255)  # opaque red above, clear below
    Image.fromarray(rgba).convert("P").info.clear()
    image = Image.fromarray(rgba).quantize(8)
    image.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as saved:
        assert saved.mode == "P"
    wanted = np.full((40, 40, 3), 255)
    wanted[:20] = (255, 0, 0)
    golden(tmp_path / "x.png", wanted)


@pytest.mark.parametrize(("alpha", "wanted"), [(255, (0, 0, 200)), (0, (255, 255, 255)), (128, (127, 127, 227))])
def test_alpha_lies_on_white(alpha, wanted, tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 200, alpha)).save(tmp_path / "x.png")
    golden(tmp_path / "x.png", np.full((40, 40, 3), wanted))


def test_grey_with_alpha_and_colour_key(tmp_path):
    Image.new("LA", (40, 40), (10, 0)).save(tmp_path / "la.png")
    golden(tmp_path / "la.png", np.full((40, 40, 3), 255))
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    golden(tmp_path / "key.png", np.full((40, 40, 3), 255))


@pytest.mark.parametrize(
    ("orientation", "turn"), [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)]
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation(orientation, turn, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a, more = gradient(), {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(a).save(tmp_path / f"plain.{suffix}", **more)
    Image.fromarray(a).save(tmp_path / f"x.{suffix}", exif=exif, **more)
    golden(tmp_path / f"x.{suffix}", turn(np.asarray(Image.open(tmp_path / f"plain.{suffix}"))))  # JPEG itself costs some levels


def test_greyscale_and_bilevel(tmp_path):
    grey = gradient()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    golden(tmp_path / "l.png", np.repeat(grey[:, :, None], 3, axis=2), 0)
    Image.fromarray(grey > 127).save(tmp_path / "one.png")
    golden(tmp_path / "one.png", np.repeat((grey > 127)[:, :, None] * 255, 3, axis=2), 0)


def test_too_small_is_refused_by_name(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (100, 15)).save(tmp_path / "flat.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    with pytest.raises(DataError, match=r"smaller than the model's 16x16: dot\.png \(1x1\), flat\.png \(100x15\)\.") as refused:
        load_folder(tmp_path, 16)
    assert "good.png" not in str(refused.value)


def test_centre_crop_and_size(tmp_path):
    a = np.zeros((32, 96, 3), np.uint8)
    a[:, 26:70] = 255  # the middle third and as much around it as the resizing filter sees is white
    Image.fromarray(a).save(tmp_path / "wide.png")
    Image.fromarray(a.transpose(1, 0, 2)).save(tmp_path / "high.png")
    pictures = load_folder(tmp_path, 16)
    assert pictures.pixels.shape == (2, 3, 16, 16)
    assert pictures.size == 16
    assert pictures.pixels.dtype == torch.uint8
    assert bool((pictures.pixels == 255).all())


# -- bombs, RELIABILITY case 14 ---------------------------------------------------------------------------------------


def png_header(side: int) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 9_500, 13_000, 20_000, 2**31 - 1])
def test_bombs_are_refused_from_their_header(side, tmp_path, monkeypatch):
    assert side**2 > MAX_PIXELS

    def decode(*_):
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    (tmp_path / "bomb.png").write_bytes(png_header(side))
    with pytest.raises(DataError, match=r"bomb\.png.*million pixels"):
        open_picture(tmp_path / "bomb.png")


# -- folders, RELIABILITY case 15 -------------------------------------------------------------------------------------


def test_empty_missing_and_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        load_folder(tmp_path, 16)
    with pytest.raises(DataError, match="There is no folder"):
        load_folder(tmp_path / "nowhere", 16)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        load_folder(tmp_path / "notes.txt", 16)
    with pytest.raises(DataError, match="holds no pictures"):
        load_folder(tmp_path, 16)
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="'dogs': give that folder"):
        load_folder(tmp_path, 16)


def test_one_picture_is_noted(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    pictures = load_folder(tmp_path, 16)
    assert len(pictures) == 1
    assert any("only one picture" in note for note in pictures.notes)


def test_duplicates_are_noted(tmp_path):
    for name in ("a.png", "c.png", "b.bmp"):
        Image.fromarray(gradient()).save(tmp_path / name)
    Image.fromarray(gradient()[::-1]).save(tmp_path / "d.png")
    assert load_folder(tmp_path, 16).notes == ["'b.bmp' is the same picture as 'a.png'.", "'c.png' is the same picture as 'a.png'."]


def test_unicode_names_and_endings(tmp_path):
    names = ["Ünïcødé \u732b.PNG", "\U0001f431.jpeg", "a b'c\".png"]
    for i, name in enumerate(names):
        Image.fromarray(np.roll(gradient(), i, axis=1)).save(tmp_path / name)
    assert sorted(load_folder(tmp_path, 16).names) == sorted(names)


def test_other_files_are_passed_over(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "._a.png").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves on foreign disks
    (tmp_path / "sub.png").mkdir()
    assert [p.name for p in list_pictures(tmp_path)] == ["a.png"]


def test_symlink_loops(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert load_folder(tmp_path, 16).names == ["a.png"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(DataError):
        load_folder(tmp_path / "circle", 16)


def test_order_limit_and_digest(picture_folder, tmp_path):
    pictures = load_folder(picture_folder, 16)
    assert pictures.names == [f"{i:02d}.png" for i in range(10)]
    assert load_folder(picture_folder, 16, limit=3).names == pictures.names[:3]
    assert load_folder(picture_folder, 16).digest == pictures.digest
    assert load_folder(picture_folder, 16, limit=9).digest != pictures.digest


def test_a_tiff_with_a_huge_tag_is_refused_or_read(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = "x" * 100_000
    Image.fromarray(gradient()).save(tmp_path / "x.tiff", tiffinfo=info)
    golden(tmp_path / "x.tiff", gradient(), 0)


# -- values -----------------------------------------------------------------------------------------------------------


def test_signed_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_signed(every)), every)
    assert to_signed(every)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]


def test_picture_grid():
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4) * 100
    sheet = np.asarray(picture_grid(pixels, columns=2, scale=2, gap=1))
    assert sheet.shape == (17, 17, 3)
    assert [int(sheet[y, x, 0]) for y, x in ((0, 0), (0, 9), (9, 0), (9, 9), (0, 8))] == [0, 100, 200, 255, 255]


# -- the stream -------------------------------------------------------------------------------------------------------


def numbered(n: int) -> torch.Tensor:
    """Picture i is i everywhere but in its left column, which is 255."""
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 4, 4)
    pixels[..., 0] = 255
    return pixels


def read(batch: torch.Tensor) -> list[int]:
    return to_uint8(batch)[:, 0, 0, 1].tolist()


def test_every_picture_once_per_round():
    stream = PictureStream(numbered(7), hflip=False, seed=0)
    drawn = [i for _ in range(14) for i in read(stream.next(3))]
    rounds = [drawn[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(r) == list(range(7)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


@pytest.mark.parametrize("hflip", [False, True])
def test_order_depends_on_seed_and_drawn_alone(hflip):
    def draw(batches: list[int], seed: int = 1, start: int = 0) -> torch.Tensor:
        stream = PictureStream(numbered(5), hflip=hflip, seed=seed)
        stream.drawn = start
        return torch.cat([stream.next(n) for n in batches])

    whole = draw([24])
    assert torch.equal(whole, draw([1] * 24))
    assert torch.equal(whole, draw([7, 2, 15]))
    assert torch.equal(whole[13:], draw([11], start=13))
    assert not torch.equal(whole, draw([24], seed=2))
    torch.manual_seed(123)
    assert torch.equal(whole, draw([24]))


def test_batch_larger_than_the_set():
    stream = PictureStream(numbered(3), hflip=False, seed=0)
    batch = read(stream.next(10))
    assert [batch.count(i) for i in range(3)] in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert stream.drawn == 10


def test_mirroring_is_for_about_half_and_only_if_asked():
    flipped = []
    for hflip in (True, False):
        x = to_uint8(PictureStream(numbered(10), hflip=hflip, seed=0).next(1000))
        mirrored = x[:, 0, 0, -1] == 255
        assert bool(((x[:, 0, 0, 0] == 255) ^ mirrored).all())
        flipped.append(int(mirrored.sum()))
    assert 430 < flipped[0] < 570
    assert flipped[1] == 0


def test_an_empty_batch():
    stream = PictureStream(numbered(3), hflip=True, seed=0)
    assert stream.next(0).shape == (0, 3, 4, 4)
    assert stream.drawn == 0


def test_the_smallest_side_of_a_folder(tmp_path):
    for i, size in enumerate(((40, 30), (25, 90))):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    assert smallest_side(tmp_path) == 25
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2\.png"):
        smallest_side(tmp_path)
