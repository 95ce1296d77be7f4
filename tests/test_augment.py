from __future__ import annotations

import pytest
import tiny
import torch

from unidad.adapt import build_method
from unidad.augment import AUGMENTATIONS, HOLE, PICTURES, REACH, Augmentation, CutMix, augment, parse_kinds
from unidad.config import TrainSettings, build_settings
from unidad.data import to_signed
from unidad.errors import SettingsError
from unidad.ingredients import gather

ALL = tuple(AUGMENTATIONS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def ramp(n: int = 64, side: int = 16) -> torch.Tensor:
    """Pictures whose pixel values say where they came from."""
    place = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side) / (side * side)
    return place.expand(n, 3, side, side).clone()


@pytest.mark.parametrize("kind", ALL)
def test_shape_stays_pictures_differ_and_the_generator_decides(kind):
    x = ramp()
    once, again = augment(x, (kind,), generator()), augment(x, (kind,), generator())
    assert once.shape == x.shape
    assert torch.equal(once, again)
    assert len({tuple(p.flatten().tolist()) for p in once}) > 1


def test_none_changes_nothing():
    x = ramp()
    assert augment(x, parse_kinds("none"), generator()) is x


def test_flip_mirrors_some():
    x = ramp()
    out = augment(x, ("flip",), generator())
    mirrored = (out == x.flip(-1)).flatten(1).all(dim=1)
    kept = (out == x).flatten(1).all(dim=1)
    assert bool((mirrored ^ kept).all())
    assert 16 < int(mirrored.sum()) < 48


def test_translate_moves_whole_pixels_within_reach():
    side = 16
    reach = int(side * REACH)
    out = augment(ramp(side=side), ("translate",), generator()) * side * side
    rows, columns = (out[:, 0] // side).long(), (out[:, 0] % side).long()
    middle = side // 2
    down, right = rows[:, middle, middle] - middle, columns[:, middle, middle] - middle
    assert set(down.tolist()) == set(right.tolist()) == set(range(-reach, reach + 1))
    grid = torch.arange(side)
    assert torch.equal(rows[:, :, 0], (grid + down[:, None]).clamp(0, side - 1))
    assert torch.equal(columns[:, 0, :], (grid + right[:, None]).clamp(0, side - 1))


def test_cutout_blanks_one_square():
    side = 16
    out = augment(torch.ones(64, 3, side, side), ("cutout",), generator())
    hole = (out == 0).all(dim=1)
    assert torch.equal(hole, (out == 0).any(dim=1))
    whole = int(side * HOLE)
    assert int(hole.flatten(1).sum(1).max()) == whole * whole
    assert bool((hole.any(dim=1).sum(dim=1) * hole.any(dim=2).sum(dim=1) == hole.flatten(1).sum(1)).all())


def test_colour_is_brightness_saturation_and_contrast_of_each_picture():
    x = torch.zeros(200, 3, 4, 4)
    level = augment(x, ("colour",), generator())
    assert torch.equal(level, level[:, :1, :1, :1].expand_as(level))  # a grey, flat picture has brightness alone
    assert -0.5 <= float(level.min()) < -0.45
    assert 0.45 < float(level.max()) <= 0.5


def test_gradients_reach_the_pictures():
    x = ramp(8).requires_grad_()
    augment(x, ALL, generator()).sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_parsing():
    assert parse_kinds("flip, cutout") == ("flip", "cutout")
    assert parse_kinds("none") == parse_kinds("") == ()
    with pytest.raises(SettingsError, match=r"'augment' must be none or some of flip, .* not 'fliip'\. Did you mean 'flip'\?"):
        build_settings(TrainSettings, {"augment": "translate,fliip"})


def test_heads_see_augmented_pictures_of_both_kinds_and_the_denoising_losses_see_none(monkeypatch):
    seen: list[torch.Tensor] = []
    monkeypatch.setitem(AUGMENTATIONS, "flip", lambda x, _g: seen.append(x) or x)
    method = tiny.unidad(augment="flip", gan_weight=0.1, disc_weight=0.1)
    real = torch.zeros(2, *tiny.SHAPE)
    student = tiny.phase(method, "student").loss(real)
    assert len(seen) == 1
    assert seen[0].requires_grad
    fresh = method.carried()[0]
    tiny.phase(method, "fake_teacher").loss(real)
    assert torch.equal(seen[1], fresh)
    assert torch.equal(seen[2], real)
    tiny.phase(method, "target_teacher").loss(real)
    assert len(seen) == 3
    assert student["gan"].requires_grad


# -- adaptive ---------------------------------------------------------------------------------------------------------


def test_the_share_of_augmented_pictures_rises_where_the_heads_are_surer_than_the_target_and_falls_where_they_are_not():
    augmentation, n = Augmentation("flip", 0.6), torch.tensor(PICTURES / 10)
    assert augmentation.adapt(0.7 * n, n) == 0, "p as it was"
    assert augmentation.p == pytest.approx(0.1)
    augmentation.adapt(n, n)
    assert augmentation.p == pytest.approx(0.2)
    for _ in range(3):
        augmentation.adapt(0.5 * n, n)
    assert augmentation.p == 0, "not below"


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_that_share_of_the_pictures_is_changed(p):
    augmentation, x = Augmentation("cutout", 0.6), torch.ones(2000, 1, 8, 8)
    augmentation.p = torch.tensor(p)
    changed = (augmentation(x, generator()) != x).flatten(1).any(dim=1).float().mean()
    assert changed == pytest.approx(p, abs=0.03 if 0 < p < 1 else 0)


def test_the_share_is_learnt_from_the_heads_shown_and_carried_to_a_resumed_run(monkeypatch):
    def after_one_update(bias: float):
        method = tiny.unidad(augment="flip", augment_target=0.6, gan_weight=0.1, disc_weight=0.1)
        assert method.heads is not None
        monkeypatch.setattr(method, "_logits", lambda x_t, *_: torch.full((len(x_t), 3), bias))
        losses = tiny.phase(method, "fake_teacher").loss(torch.zeros(2, *tiny.SHAPE))
        assert losses["augment_p"] == 0
        return method

    sure, unsure = after_one_update(1.0), after_one_update(-1.0)
    assert unsure.carried()[-1] == 0
    assert sure.carried()[-1] == pytest.approx(2 / PICTURES)
    unsure.restore(sure.carried())
    assert torch.equal(unsure.carried()[-1], sure.carried()[-1])


def test_a_target_without_augmentation_is_refused():
    with pytest.raises(SettingsError, match="'augment_target' says how often pictures are augmented, and 'augment' is none"):
        build_settings(TrainSettings, {"augment_target": 0.6})


def _numbered(n: int = 5, side: int = 16) -> torch.Tensor:
    """Pictures of one value each, so that a pixel tells which picture it comes from."""
    return torch.arange(n, dtype=torch.uint8).mul(50).view(n, 1, 1, 1).expand(n, 3, side, side).contiguous()


def test_cutmix_takes_whole_parts_of_other_pictures_at_high_noise_only() -> None:
    pixels, generator = _numbered(), torch.Generator().manual_seed(0)
    x = to_signed(pixels[torch.zeros(2000, dtype=torch.long)])
    t = torch.arange(2000) % 400 * 2  # 0 .. 798
    mixed = CutMix(pixels, 400.0)(x, t, generator)
    assert torch.equal(mixed[t < 400], x[t < 400])
    assert set(mixed.unique().tolist()) == set(to_signed(pixels).unique().tolist()), "every pixel is a picture's own"
    changed = (mixed != x).flatten(1).float().mean(dim=1)[t >= 400]
    assert 0.48 < (changed > 0).float().mean() < 0.58, "2/3 4/5 = 0.53"
    assert changed.max() < 1


def test_cutmix_parts_are_bands_to_the_bottom_or_boxes() -> None:
    pixels, generator = _numbered(2, 20), torch.Generator().manual_seed(1)
    other = CutMix(pixels[1:], 0.0)
    t = torch.zeros(300, dtype=torch.long)
    taken = (other(to_signed(pixels[:1]).expand(300, 3, 20, 20), t, generator) == to_signed(pixels[1:])).all(dim=1)
    whole_rows = taken.all(dim=2).sum(dim=1)
    assert 0.25 < (whole_rows > 0).float().mean() < 0.41, "a band in one picture of three"
    assert 0.25 < (taken.flatten(1).any(dim=1) & (whole_rows == 0)).float().mean() < 0.41, "a box in as many"
    assert whole_rows.max() <= 15, "the upper quarter stays"
    assert (taken[whole_rows > 0][:, -1]).all(), "bands reach the bottom"


def test_cutmix_is_off_unless_asked_for_and_reaches_every_teacher(source, picture_folder) -> None:
    """At the timestep law's own t: what the target teacher is asked for differs from the pictures above the limit alone."""
    for method in ("uni-dad", "finetune", "adapt-then-distill"):
        for above, network in ((1.0, False), (0.4, True)):
            values = {"source": str(source), "method": method, "cutmix_above": above, "target_warmup": 1, "cycles": 4}
            values |= {"a": 1.0} if method != "finetune" else {}
            s = build_settings(TrainSettings, values)
            parts = gather(s, str(picture_folder))
            made = build_method(s, parts, torch.device("cpu"), torch.Generator().manual_seed(0))
            mix = made._options["mix"] if method == "finetune" else made._mix
            assert (mix is not None) == network
            assert mix is None or (mix.above, len(mix.pixels)) == (400.0, 10)
