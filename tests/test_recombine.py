"""`recombine`: more pictures made of the colours and parts of a few flat drawings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unidad.adapt import build_method, train, within_epochs
from unidad.backbones.load import bundled_names, bundled_path, load_model
from unidad.config import TrainSettings, build_settings
from unidad.data import PictureSet, load_folder
from unidad.drawing import Drawing, nearest_weights
from unidad.ingredients import gather
from unidad.recombine import FEW, FINE, LOOSE, SEAM, Drawings, Region, connected, thinned, unlike, with_more

SIDE = 24
INKS = {"sky": ((200, 220, 250), (250, 210, 120), (100, 240, 190)), "disc": ((180, 40, 30), (40, 60, 160), (90, 30, 120))}


def from_the_middle() -> np.ndarray:
    """Distance of each pixel from a point near the middle, so near none that mixtures along a circle are all different: [H, W]."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return np.hypot(x - 0.13, y - 0.29)


def disc(sky: tuple, ink: tuple, radius: float = 6.5, ear: bool = False) -> np.ndarray:
    """A disc on a plain ground, its edge mixed linearly; with a square of the disc's colour in a corner where asked: [H, W, 3]."""
    share = np.clip(radius + 0.5 - from_the_middle(), 0, 1)
    if ear:
        share[2:5, 2:6] = 1
    return (1 - share[..., None]) * np.array(sky, float) + share[..., None] * np.array(ink, float)


def as_set(pictures: list[np.ndarray]) -> PictureSet:
    pixels = torch.from_numpy(np.stack(pictures).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
    return PictureSet(pixels, [str(i) for i in range(len(pixels))], "digest")


def three() -> PictureSet:
    return as_set([disc(sky, ink, ear=i == 0) for i, (sky, ink) in enumerate(zip(INKS["sky"], INKS["disc"], strict=True))])


def test_the_nearest_weights():
    v = np.array([[0.2, 0.8], [3.0, 0.0], [0.5, 0.9], [-1.0, -1.0]])
    assert np.allclose(nearest_weights(v, np.zeros((4, 2))), [[0.2, 0.8], [1, 0], [0.3, 0.7], [0.5, 0.5]])
    assert np.allclose(nearest_weights(v, np.full((4, 2), [0, -0.1])), [[0.2, 0.8], [1.1, -0.1], [0.3, 0.7], [0.5, 0.5]])


def test_colours_are_the_flat_ones_and_edges_are_mixtures_of_them():
    sky, ink = INKS["sky"][0], INKS["disc"][0]
    drawing = Drawing(disc(sky, ink))
    assert drawing.colours.tolist() == [list(sky), list(ink)]
    assert drawing.parts == [0, 1]
    assert 0.8 < drawing.flat < 1
    weights = drawing.weights
    assert np.allclose(weights.sum(-1), 1)
    assert weights.min() >= -0.1
    share = np.clip(7.0 - from_the_middle(), 0, 1)
    assert np.abs(weights[..., 1] - share).max() < 0.02
    assert weights[..., 2:].max() < 0.02  # neither black nor white is needed


def test_a_recoloured_drawing_is_the_drawing_in_the_other_colour():
    drawing = Drawing(disc(INKS["sky"][0], INKS["disc"][0]))
    assert np.array_equal(drawing.recoloured({}), drawing.pixels)
    assert np.array_equal(drawing.recoloured({1: drawing.colours[1]}), drawing.pixels)
    other = np.array(INKS["disc"][1], float)
    assert np.abs(drawing.recoloured({1: other}) - disc(INKS["sky"][0], INKS["disc"][1])).max() < 3


def test_what_resizing_adds_at_an_edge_follows_too():
    sky, ink, other = (np.array(colour, float) for colour in (INKS["sky"][0], INKS["disc"][1], INKS["disc"][2]))

    def square(colour: np.ndarray) -> np.ndarray:
        picture = np.tile(sky, (SIDE, SIDE, 1))
        picture[6:18, 6:18] = 1.08 * colour - 0.08 * sky  # darker at its border, as beside light ground
        picture[7:17, 7:17] = colour
        return picture

    assert np.abs(Drawing(square(ink)).recoloured({1: other}) - square(other)).max() < 2


def test_an_eye_keeps_its_colour_and_a_shade_follows():
    picture = disc(INKS["sky"][0], (190, 140, 110), radius=9)
    picture[11:13, 9:11] = 0.2 * np.array((190, 140, 110.0))  # dark, surrounded by one colour
    picture[15, 12:16] = 0.8 * np.array((190, 140, 110.0))
    made = Drawing(picture).recoloured({1: np.array((240.0, 200, 160))})
    assert np.abs(made[11, 9] - picture[11, 9]).max() < 20  # nearly black as before
    assert np.abs(made[15, 13] - 0.8 * np.array((240.0, 200, 160))).max() < 8


def test_which_colours_play_the_same_part():
    drawings = Drawings(three().pixels)
    assert drawings.same == {(i, j, k): k for i in range(3) for j in range(3) if i != j for k in (0, 1)}
    assert drawings.fit


def test_new_pictures_have_the_colours_and_parts_of_the_old_ones():
    pictures = three()
    made = Drawings(pictures.pixels).draw(40, 0)
    assert made.shape == (40, 3, SIDE, SIDE)
    assert made.dtype == torch.uint8
    assert torch.equal(made, Drawings(pictures.pixels).draw(40, 0))
    assert not torch.equal(made, Drawings(pictures.pixels).draw(40, 1))
    grounds = {tuple(picture[:, -1, -1].tolist()) for picture in made}
    inks = {tuple(picture[:, SIDE // 2, SIDE // 2].tolist()) for picture in made}
    assert grounds == set(INKS["sky"])
    assert inks == set(INKS["disc"])
    ears = {tuple(picture[:, 3, 3].tolist()) for picture in made} - grounds
    assert ears == set(INKS["disc"])  # the ear of the first picture, in the colours of all
    assert all(
        tuple(p[:, 3, 3].tolist()) in ({tuple(p[:, -1, -1].tolist()), tuple(p[:, SIDE // 2, SIDE // 2].tolist())}) for p in made
    )


def test_a_colour_is_as_likely_however_many_pictures_have_it():
    inks = [INKS["disc"][0]] * 5 + [INKS["disc"][1]]
    skies = [INKS["sky"][i % 3] for i in range(6)]
    pictures = as_set([disc(sky, ink, radius=6 + i / 4) for i, (sky, ink) in enumerate(zip(skies, inks, strict=True))])
    made = Drawings(pictures.pixels).draw(300, 0)
    share = float((made[:, 0, SIDE // 2, SIDE // 2] == INKS["disc"][1][0]).double().mean())
    assert 0.4 < share < 0.6  # a sixth have it; a standard deviation is 0.03


def test_shades_follow_their_colour():
    skin, hair, brown = np.array((190.0, 140, 110)), np.array((60.0, 40, 200)), np.array((80.0, 30, 10))
    picture = disc(INKS["sky"][0], tuple(skin), radius=9)
    picture[15:18, 9:16] = 0.8 * skin
    picture[8:10, 9:16] = hair
    drawing = Drawing(picture.round())
    base, ink, shade = (next(k for k, c in enumerate(drawing.colours) if np.array_equal(c, of)) for of in (skin, hair, 0.8 * skin))
    assert drawing.shades == {shade: (base, pytest.approx(0.8))}
    assert base in drawing.parts
    assert shade not in drawing.parts
    made = drawing.recoloured({base: brown})
    assert np.allclose(made[16, 12], 0.8 * brown)
    assert np.allclose(made[12, 12], brown)
    assert np.array_equal(made[8, 12], drawing.colours[ink])


def test_connected_regions_and_their_mirror_images():
    mask = np.zeros((9, 12), bool)
    mask[2, 2], mask[3, 3] = True, True  # touching at a corner, and ...
    mask[2, 9] = True  # ... the mirror image of the first
    mask[7, 4:6] = True
    found = sorted(connected(mask), key=lambda m: int(m.sum()))
    assert [np.argwhere(m).tolist() for m in found] == [[[7, 4], [7, 5]], [[2, 2], [2, 9], [3, 3]]]
    assert connected(np.zeros((3, 3), bool)) == []


def test_a_thinned_list_keeps_its_order_and_spread():
    few, many = np.arange(256), np.arange(1000)
    assert np.array_equal(thinned(few), few)
    assert thinned(many).tolist() == list(range(0, 1000, 4))


def test_pictures_differ_where_their_shapes_do_whatever_their_colours():
    drawings = Drawings(three().pixels)
    differ = drawings._differ.reshape(SIDE, SIDE, 3, 3)
    assert np.array_equal(differ, differ.transpose(0, 1, 3, 2))
    assert differ[..., 1, 2].max() <= 3  # the same disc in other colours
    ear = np.zeros((SIDE, SIDE), bool)
    ear[2:5, 2:6] = True
    assert (differ[..., 0, 1][ear] > 100).all()
    assert (differ[..., 0, 1][~ear] <= 5).all()


def test_a_part_moves_whole_and_where_its_border_agrees():
    drawings = Drawings(three().pixels)
    (ear,) = drawings._regions
    assert set(range(2 * SIDE + 2, 2 * SIDE + 6)) < set(ear.inside.tolist())
    rng, start = np.random.default_rng(0), np.ones(SIDE * SIDE, int)  # all from the second picture, which has none
    ends = [drawings._exchanged(start, ear, rng) for _ in range(60)]
    assert {tuple(np.unique(end[ear.inside])) for end in ends} <= {(0,), (1,), (2,)}
    assert all((end[np.setdiff1d(np.arange(SIDE * SIDE), ear.inside)] == 1).all() for end in ends)
    assert any((end[ear.inside] == 0).all() for end in ends)
    across = Region(ear.inside, ear.inside, ear.sample, ear.alike)  # a border that runs through the ear
    assert all((drawings._exchanged(start, across, rng)[ear.inside] != 0).all() for _ in range(60))


def test_pictures_that_differ_everywhere_have_no_part_to_exchange():
    plain = disc(INKS["sky"][0], INKS["disc"][0])
    drawings = Drawings(as_set([plain, 255 - plain[::-1]]).pixels)
    drawings.__dict__["same"] = {}  # no colour of one plays a part in the other
    assert (drawings._differ[:, 0, 1] > 0).all()
    assert drawings._regions == []
    assert all(torch.equal(made, drawings.pictures[0]) or torch.equal(made, drawings.pictures[1]) for made in drawings.draw(6, 0))


def test_a_new_picture_is_no_near_copy_where_another_is_found(monkeypatch):
    skies = [INKS["sky"][0]] * 4
    inks = [INKS["disc"][i % 3] for i in range(4)]
    drawings = Drawings(as_set([disc(sky, ink, ear=i == 0) for i, (sky, ink) in enumerate(zip(skies, inks, strict=True))]).pixels)
    assert drawings._least == pytest.approx(0.5 * 12 / SIDE**2)  # the first and the last differ by the ear, of twelve pixels
    old = [drawing.pixels for drawing in drawings.drawings]
    tried = iter([old[2], old[0], old[1] + 100, old[1]])
    monkeypatch.setattr(Drawings, "_one", lambda self, rng: next(tried))
    assert np.array_equal(drawings._new(np.random.default_rng(0)), old[1] + 100)
    copies = iter([old[0], old[1], old[2]])
    monkeypatch.setattr(Drawings, "_one", lambda self, rng: next(copies))
    assert np.array_equal(drawings._new(np.random.default_rng(0)), old[2])  # nothing else is found


def test_how_unlike_two_pictures_are():
    one = np.zeros((4, 5, 3))
    other = one.copy()
    other[0, :2, 1] = 31
    other[1, 0] = 30  # not to be seen
    assert unlike(one, other) == unlike(other, one) == pytest.approx(2 / 20)


def test_a_rare_part_is_more_likely_than_its_share():
    inks = [INKS["disc"][i % 3] for i in range(6)]
    skies = [INKS["sky"][i % 3] for i in range(6)]
    pictures = as_set([disc(sky, ink, ear=i == 0) for i, (sky, ink) in enumerate(zip(skies, inks, strict=True))])
    made = Drawings(pictures.pixels).draw(200, 0)
    share = float((made[:, :, 3, 3] != made[:, :, -1, -1]).any(1).double().mean())
    assert share > 0.5  # one of six pictures has it


def test_larger_files_are_taken_apart_as_they_are(tmp_path):
    for i, (sky, ink) in enumerate(zip(INKS["sky"], INKS["disc"], strict=True)):
        picture = Image.new("RGB", (96, 96), sky)
        picture.paste(ink, (24, 24 - 8 * i, 72, 71))  # no edge at a multiple of three: mixed pixels at 32 a side
        picture.save(tmp_path / f"{i}.png")
    pictures = load_folder(tmp_path, 32)
    assert FINE >= 96
    found = with_more(pictures, 12, 1, tmp_path)
    assert found.more is not None
    assert found.more.shape == (12, 3, 32, 32)
    fine = Drawings(load_folder(tmp_path, 96).pixels).draw(12, 1, 32)
    assert torch.equal(found.more, fine)
    assert not torch.equal(found.more, with_more(pictures, 12, 1).more)


def test_pictures_that_cannot_be_recombined_are_left_alone_and_told():
    pictures = three()
    assert with_more(pictures, 0, 0) is pictures
    noise = replace(
        pictures, pixels=torch.randint(0, 256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    )
    cases = {
        "no flat drawings": noise,
        "have masks": replace(pictures, masks=torch.ones(3, 1, SIDE, SIDE)),
        f"more than {FEW}": replace(pictures, pixels=pictures.pixels[:1].repeat(FEW + 1, 1, 1, 1), names=["x"] * (FEW + 1)),
        "too few colours": as_set([disc(INKS["sky"][0], ink) for ink in INKS["disc"][:2]]),
        "parts in the same places": replace(pictures, pixels=pictures.pixels[:1], names=["x"]),
    }
    for words, these in cases.items():
        found = with_more(these, 12, 0)
        assert found.more is None
        assert torch.equal(found.learnt_from, these.pixels)
        assert words in found.notes[-1]


@pytest.mark.parametrize("name", bundled_names("targets"))
def test_the_bundled_targets_can_be_recombined(name):
    pictures = load_folder(bundled_path(f"bundled:{name}", "targets"), 32)
    found = with_more(pictures, 60, 0)
    assert found.more is not None
    assert (len(found), len(found.learnt_from)) == (10, 70)
    assert "60 more pictures" in found.notes[-1]
    distance = torch.cdist(found.more.float().flatten(1), pictures.pixels.float().flatten(1)).min(1).values
    assert (distance > 0).float().mean() > 0.6  # new ones


def test_a_run_learns_from_them():
    settings = build_settings(TrainSettings, {"student_init": "bundled:avatars-3step", "recombine": 6})
    parts = gather(settings, "bundled:toonHead")
    stream = parts.stream(settings, torch.device("cpu"))
    assert len(stream.pixels) == 16
    assert torch.equal(stream.pixels, parts.pictures.learnt_from)
    assert parts.hashes()["pictures"] == gather(replace(settings, recombine=0), "bundled:toonHead").hashes()["pictures"]


def test_recombined_pictures_are_not_pieced_together_as_well(monkeypatch):
    mixed: list[object] = []
    monkeypatch.setattr("unidad.adapt.CutMix", lambda *given: mixed.append(given))
    values = {"student_init": "bundled:avatars-3step", "cutmix_above": 0.5, "method": "finetune"}
    for count, times in ((0, 1), (6, 1)):  # the second makes none
        settings = build_settings(TrainSettings, values | {"recombine": count})
        build_method(settings, gather(settings, "bundled:toonHead"), torch.device("cpu"), torch.Generator().manual_seed(0))
        assert len(mixed) == times


def test_a_run_goes_on_to_the_same_bits_and_its_report_shows_them(source, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    size = load_model(str(source)).backbone.shape[-1]
    for i, (sky, ink) in enumerate(zip(INKS["sky"], INKS["disc"], strict=True)):
        picture = Image.new("RGB", (size, size), sky)
        picture.paste(ink, (size // 4, size // 4 - i % 2, 3 * size // 4, 3 * size // 4))
        picture.save(pictures / f"{i}.png")
    values = {
        "source": str(source),
        "method": "finetune",
        "recombine": 5,
        "seed": 1,
        "cycles": 4,
        "save_every": 2,
        "warmup": 1,
        "tracker": "none",
    }
    settings = build_settings(TrainSettings, values | {"batch_size": 2, "sample_every": 0, "device": "cpu"})
    whole = train(pictures, tmp_path / "whole", settings)
    train(pictures, tmp_path / "parted", settings, until=2)
    parted = train(pictures, tmp_path / "parted", settings, resume=True)
    one, other = (load_file(run.path / "model" / "unet" / "diffusion_pytorch_model.safetensors") for run in (whole, parted))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    page = (whole.path / "report.html").read_text(encoding="utf-8")
    assert "5 more" in page


def test_a_large_region_is_exchanged_in_pieces_too():
    """A beard and clothes that touch are one region in which two pictures differ, and two kinds of change."""
    sky, beard, shirt = (np.array(c, float) for c in ((200, 220, 250), (90, 30, 20), (30, 120, 60)))
    plain = np.tile(sky, (SIDE, SIDE, 1))
    both = plain.copy()
    both[4:12, 4:20], both[12:20, 4:20] = beard, shirt
    drawings = Drawings(as_set([plain, both]).pixels)
    whole, *pieces = sorted(drawings._regions, key=lambda region: -len(region.inside))
    assert (whole.seam, {piece.seam for piece in pieces}) == (SEAM, {LOOSE})
    rows = sorted((int(piece.inside.min()) // SIDE, int(piece.inside.max()) // SIDE) for piece in pieces)
    assert rows == [(4, 12), (11, 19)]  # each with the pixels that touch it and are not alike
    small = Drawings(as_set([plain, np.where(np.arange(SIDE)[:, None, None] < 8, both, plain)]).pixels)
    assert {region.seam for region in small._regions} == {SEAM}


@pytest.mark.parametrize(
    ("given", "pictures", "found"),
    [
        ({}, 10, (60, 60, 100)),
        ({"target_epochs": 40}, 10, (50, 50, 90)),  # 400 pictures, 8 an update; the student's 40 stay
        ({"target_epochs": 40}, 2010, (60, 60, 100)),
        ({"target_epochs": 1}, 2, (1, 1, 41)),
        ({"target_epochs": 40, "accumulation": 2}, 10, (25, 25, 65)),
        ({"target_epochs": 40, "target_warmup": 20}, 10, (20, 50, 100)),
        ({"target_epochs": 40, "target_warmup": 0, "target_cycles": 0}, 10, (0, 50, 100)),
        ({"target_epochs": 40, "target_teacher": "folder"}, 10, (60, 60, 100)),
        ({"target_epochs": 40, "a": 0.0, "target_warmup": 0, "target_cycles": 0}, 10, (0, 0, 100)),
        (
            {"target_epochs": 40, "method": "adapt-then-distill", "target_warmup": 40, "target_cycles": 0, "a": 1.0},
            10,
            (40, 0, 100),
        ),
        ({"target_epochs": 40, "method": "adapt-then-distill", "a": 1.0}, 10, (50, 50, 90)),
        ({"target_epochs": 40, "method": "finetune"}, 10, (60, 60, 50)),
        ({"target_epochs": 40, "method": "distill-then-adapt", "student_init": "bundled:avatars-3step"}, 10, (60, 60, 100)),
    ],
)
def test_few_pictures_are_not_learnt_from_for_long(given, pictures, found):
    usual = {"batch_size": 8, "target_warmup": 60, "target_cycles": 60, "cycles": 100}
    settings = within_epochs(build_settings(TrainSettings, usual | given), pictures)
    assert (settings.target_warmup, settings.target_cycles, settings.cycles) == found
    assert within_epochs(settings, pictures) == settings
