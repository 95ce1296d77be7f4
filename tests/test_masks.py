"""Masks beside photos: read and cropped with them, and what they do to the losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from unidad.adapt import build_method, train
from unidad.config import TrainSettings, build_settings
from unidad.data import list_pictures, load_folder, open_picture
from unidad.errors import DataError
from unidad.ingredients import gather
from unidad.losses import DENOISING_LOSSES, denoising_loss
from unidad.masks import with_masks
from unidad.methods.finetune import denoise
from unidad.methods.unidad import UniDAD

CPU = torch.device("cpu")


def photo(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int] | None = None, mode: str = "L") -> None:
    """Black with a white box (left, top, right, bottom)."""
    image = Image.new("L", size)
    if box:
        image.paste(255, box)
    image.convert(mode).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of 40x32 to 32x40; the first two with masks, one of them half as large as its photo."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(40, 32), (32, 40), (32, 32)]):
        photo(folder / f"{i}.png", size, i)
    mask(folder / "0_mask.png", (40, 32), (4, 0, 20, 32))
    mask(folder / "1_mask.bmp", (16, 20), (0, 2, 16, 10), "RGB")
    return folder


def read(folder: Path, size: int = 16):
    return with_masks(load_folder(folder, size), folder)


def test_a_mask_is_no_photo_and_is_cropped_as_its_photo(photos: Path):
    assert [p.name for p in list_pictures(photos)] == ["0.png", "1.png", "2.png"]
    found = read(photos)
    assert found.names == ["0.png", "1.png", "2.png"]
    assert found.masks is not None
    # The square of 0.png begins at column 4, that of 1.png at row 4: each box is the left or upper half of its square.
    left, upper = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :8], upper[:, :8] = 1, 1
    assert torch.equal(found.masks, torch.stack([left, upper, torch.ones(1, 16, 16)]))
    assert found.notes[-1] == "These have no mask and count as a whole: 2.png."


def test_photo_and_mask_are_turned_upright_together(tmp_path: Path):
    whole = Image.new("RGB", (40, 32))
    whole.paste((255, 255, 255), (4, 0, 20, 16))
    turned = Image.Exif()
    turned[0x0112] = 6
    whole.save(tmp_path / "a.png", exif=turned)
    whole.convert("L").save(tmp_path / "a_mask.png", exif=turned)
    assert open_picture(tmp_path / "a.png")[0].size == (32, 40)
    found = read(tmp_path, 8)
    assert found.masks is not None
    where = found.pixels[:, :1] > 127
    assert where.any()
    assert torch.equal(found.masks > 0.5, where)


def test_other_masks_are_another_set_of_pictures(photos: Path):
    first, plain = read(photos), load_folder(photos, 16)
    assert torch.equal(first.pixels, plain.pixels)
    mask(photos / "0_mask.png", (40, 32), (4, 0, 22, 32))
    assert len({first.digest, read(photos).digest, plain.digest}) == 3
    for path in photos.glob("*_mask.*"):
        path.unlink()
    again = read(photos)
    assert (again.masks, again.digest, again.notes) == (None, plain.digest, plain.notes), "without masks nothing changes"


@pytest.mark.parametrize(
    ("name", "size", "box", "mode", "words"),
    [
        ("gone_mask.png", (32, 32), (0, 0, 9, 9), "L", r"no photo 'gone'"),
        ("2_mask.png", (32, 40), (0, 0, 9, 9), "L", r"32x40, which is not the shape of its photo '2\.png' \(32x32\)"),
        ("2_mask.png", (32, 32), None, "L", "black in all that is used"),
        ("0_mask.png", (40, 32), (0, 0, 4, 32), "L", "black in all that is used"),  # only where the photo is cropped
        ("2_mask.png", (32, 32), None, "RGBA", "transparent"),
        ("1_mask.png", (32, 40), (0, 0, 32, 40), "L", "two masks"),
    ],
)
def test_bad_masks_are_named(photos: Path, name, size, box, mode, words):
    mask(photos / name, size, box, mode)
    if mode == "RGBA":
        Image.new("RGBA", size).save(photos / name)
    with pytest.raises(DataError, match=words):
        read(photos)


def test_a_folder_of_masks_is_pointed_out(picture_folder: Path, tmp_path: Path):
    assert read(picture_folder).masks is None
    (tmp_path / "masks").mkdir()
    photo(tmp_path / "a.png", (32, 32))
    assert any("is not read" in note for note in read(tmp_path).notes)


# -- what they do -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENOISING_LOSSES)
def test_the_loss_is_that_of_the_masked_places_alone(kind: str):
    generator = torch.Generator().manual_seed(0)
    x, xhat = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    alpha, sigma = torch.tensor([0.8, 0.3]).view(2, 1, 1, 1), torch.tensor([0.6, 0.9]).view(2, 1, 1, 1)
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, :, 1, 2], masks[1, :, :2] = 1, 1

    def plain(i: int, *where: slice) -> torch.Tensor:
        return denoising_loss(x[i : i + 1, :, *where], xhat[i : i + 1, :, *where], alpha[i], sigma[i], kind)

    expected = (plain(0, slice(1, 2), slice(2, 3)) + plain(1, slice(0, 2), slice(0, 4))) / 2
    assert torch.allclose(denoising_loss(x, xhat, alpha, sigma, kind, mask=masks), expected)
    assert torch.allclose(
        denoising_loss(x, xhat, alpha, sigma, kind, mask=0.1 * torch.ones_like(masks)), denoising_loss(x, xhat, alpha, sigma, kind)
    ), "an even mask is none"


def test_nothing_outside_of_the_mask_teaches_the_target_teacher():
    """The error outside of the mask has no gradient: what the network says there does not matter."""
    net = tiny.GaussianBackbone(0.0, 1.0)
    masks = torch.zeros(2, 1, 3, 3)
    masks[:, :, 0, 0] = 1
    generator = torch.Generator().manual_seed(0)
    said = []
    net.x0 = lambda x_t, t, labels=None: said.append(torch.zeros_like(x_t).requires_grad_()) or said[-1]
    denoise(net, torch.ones(2, *net.shape), generator, "v", mask=masks).backward()
    gradient = said[0].grad
    assert (gradient[:, :, 0, 0] != 0).all()
    gradient[:, :, 0, 0] = 0
    assert not gradient.any()


def test_the_phases_that_learn_from_pictures_are_masked_and_the_heads_are_not():
    method = tiny.unidad(anchor_weight=1.0, gan_weight=0.01)
    pictures = torch.randn(2, *tiny.SHAPE, generator=torch.Generator().manual_seed(0))
    half, even = torch.zeros(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    half[..., :8] = 1

    def losses(phase: str, masks: torch.Tensor | None) -> dict[str, float]:
        method.generator.manual_seed(3)
        method._fresh.clear()
        return {name: value.item() for name, value in tiny.phase(method, phase).loss(pictures, None, masks).items()}

    for phase, masked in (("student", {"anchor", "total"}), ("fake_teacher", set()), ("target_teacher", {"target", "total"})):
        plain = losses(phase, None)
        changed = {name for name, value in losses(phase, half).items() if value != plain[name]}
        assert changed == masked, phase
        assert losses(phase, even) == pytest.approx(plain, rel=1e-5)


def test_the_stream_mirrors_masks_with_pictures(photos: Path, source: Path):
    for path in photos.glob("[12]*"):
        path.unlink()
    settings = build_settings(TrainSettings, {"source": str(source), "steps": 1})
    parts = gather(settings, photos)
    pictures, labels, masks = parts.stream(settings, CPU).batch(12)
    assert labels is None
    assert masks is not None
    first = pictures[0]
    for picture, found in zip(pictures, masks, strict=True):
        turned = not torch.equal(picture, first)
        assert torch.equal(found, masks[0].flip(-1) if turned else masks[0])
    assert len(masks.unique(dim=0)) == 2


def test_masked_photos_are_not_pieced_together(photos: Path, source: Path):
    s = build_settings(TrainSettings, {"source": str(source), "cutmix_above": 0.5})
    parts = gather(s, photos)
    assert "cutmix_above" in parts.pictures.notes[-1]
    method = build_method(s, parts, CPU, torch.Generator().manual_seed(0))
    assert isinstance(method, UniDAD)
    assert method._mix is None


@pytest.mark.usefixtures("no_report")
def test_a_run_with_other_masks_is_not_gone_on_with(photos: Path, source: Path, tmp_path: Path):
    from unidad.errors import UserError

    values = {"source": str(source), "cycles": 1, "steps": 1, "fake_updates": 1, "batch_size": 2, "sample_every": 0}
    settings = build_settings(TrainSettings, values, {"device": "cpu", "precision": "fp32", "tracker": "none"})
    train(photos, tmp_path / "run", settings)
    mask(photos / "0_mask.png", (40, 32), (4, 0, 22, 32))
    with pytest.raises(UserError, match="pictures"):
        train(photos, tmp_path / "run", settings, resume=True)


def test_on_latents_a_mask_is_the_share_of_each_latent_place(photos: Path, tmp_path: Path):
    sd, text = pytest.importorskip("sd"), pytest.importorskip("unidad.ingredients_text")
    mask(photos / "0_mask.png", (40, 32), (4, 0, 22, 32))  # 9 of 16 columns
    values = {"source": str(sd.write_pipeline(tmp_path / "sd")), "prompt": "a prt cat", "class_prompt": "a cat", "device": "cpu"}
    settings = build_settings(TrainSettings, values, {"steps": 1, "hflip": False, "batch_size": 3})
    parts = text.gather_text(settings, photos)
    latents, labels, masks = parts.stream(settings, CPU).batch(3)
    assert labels is not None
    assert masks is not None
    assert masks.shape == (3, 1, 8, 8)
    first = next(i for i in range(3) if torch.equal(latents[i], parts.latents[0]))
    assert torch.equal(masks[first, 0], torch.tensor([1, 1, 1, 1, 0.5, 0, 0, 0]).expand(8, 8))
    plain = parts.hashes()
    (photos / "0_mask.png").unlink()
    again = text.gather_text(settings, photos)
    assert torch.equal(again.latents, parts.latents)
    assert {key for key, value in again.hashes().items() if value != plain[key]} == {"pictures"}
