from __future__ import annotations

import json
from dataclasses import fields

import pytest

from unidad.config import (
    CHOICES,
    RANGES,
    PretrainSettings,
    TrainSettings,
    as_dict,
    build_settings,
    parse_overrides,
    read_config,
)
from unidad.errors import SettingsError, did_you_mean


def train(**values: object) -> TrainSettings:
    return build_settings(TrainSettings, values)


def test_later_layers_win():
    s = build_settings(TrainSettings, {"a": 0.5, "steps": 2}, {"steps": 4})
    assert (s.a, s.steps, s.batch_size) == (0.5, 4, TrainSettings().batch_size)


@pytest.mark.parametrize(("wrong", "right"), [("gan_wieght", "gan_weight"), ("batchsize", "batch_size"), ("step", "steps")])
def test_unknown_settings_get_a_suggestion(wrong, right):
    with pytest.raises(SettingsError, match=rf"no setting '{wrong}'\. Did you mean '{right}'\?"):
        train(**{wrong: 1})


def test_no_suggestion_where_nothing_is_near():
    with pytest.raises(SettingsError, match=r"^There is no setting 'qqqqqq'\.$"):
        train(qqqqqq=1)
    assert did_you_mean("x", []) == ""


def test_a_wrong_choice_gets_a_suggestion():
    with pytest.raises(SettingsError, match=r"bce, hinge, lsgan, wgan-gp, not 'hing'\. Did you mean 'hinge'\?"):
        train(gan_loss="hing")


@pytest.mark.parametrize(
    ("key", "value"),
    [("a", 2), ("a", -0.1), ("a", "nan"), ("steps", 0), ("batch_size", 0), ("fake_updates", 0), ("ema", 1), ("clip", 0), ("lr", "inf"),
     ("seed", -1), ("cycles", 0), ("accumulation", 0), ("keep", 0), ("beta2", 1)],
)  # fmt: skip
def test_values_out_of_range(key, value):
    with pytest.raises(SettingsError, match=f"'{key}' must lie between"):
        train(**{key: value})


@pytest.mark.parametrize("key", sorted(RANGES.keys() & {f.name for f in fields(TrainSettings)}))
def test_both_ends_of_every_range_are_allowed(key):
    relaxed = {"dmd_weight": 1.0, "gan_weight": 0.0 if key == "disc_weight" else 0.1, "disc_weight": 1.0, "cycles": 10**9}
    if key == "transfer":
        relaxed["target_teacher"] = "a folder"
    if key == "augment_target":
        relaxed["augment"] = "flip"
    for end in RANGES[key]:
        assert getattr(train(**(relaxed | {key: end})), key) == end


def test_a_warm_up_must_leave_cycles_for_the_student():
    assert train(cycles=5, target_warmup=4).target_warmup == 4
    with pytest.raises(SettingsError, match="'target_warmup' is 5 of 5 cycles: no student would learn"):
        train(cycles=5, target_warmup=5)


def test_the_target_teacher_learns_at_least_while_it_is_warmed_up():
    assert train(cycles=5, target_warmup=3, target_cycles=3).target_cycles == 3
    assert train(cycles=5, target_warmup=3, target_cycles=0).target_cycles == 0
    assert train(cycles=5, target_warmup=3, transfer=1).transfer == 1
    assert train(target_teacher="runs/ft/model", transfer=1).transfer == 1
    with pytest.raises(SettingsError, match="learnt before the student begins"):
        train(transfer=1)
    with pytest.raises(SettingsError, match="there is none"):
        train(cycles=5, target_warmup=3, transfer=1, a=0)
    with pytest.raises(SettingsError, match="'target_cycles' is 2, fewer than the 3 of 'target_warmup'"):
        train(cycles=5, target_warmup=3, target_cycles=2)


def test_every_range_and_choice_belongs_to_a_setting():
    known = {f.name for kind in (TrainSettings, PretrainSettings) for f in fields(kind)}
    assert RANGES.keys() | CHOICES.keys() <= known


@pytest.mark.parametrize("kind", [TrainSettings, PretrainSettings])
def test_defaults_are_allowed(kind):
    assert build_settings(kind, as_dict(kind())) == kind()


def test_types_from_strings():
    s = train(a="0.75", steps="2", hflip="false", reuse_batch="Yes", lr="1e-4", batch_size="8.0", grid="edm")
    assert (s.a, s.steps, s.hflip, s.reuse_batch, s.lr, s.batch_size, s.grid) == (0.75, 2, False, True, 1e-4, 8, "edm")
    assert type(s.batch_size) is int
    assert build_settings(PretrainSettings, {"widths": "16, 32"}).widths == (16, 32)
    assert build_settings(PretrainSettings, {"widths": [16, 32]}).widths == (16, 32)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("steps", "three", "a whole number"), ("steps", 2.5, "a whole number"), ("steps", True, "a whole number"), ("a", None, "a number"),
     ("a", [1], "a number"), ("hflip", "maybe", "true or false"), ("hflip", 1, "true or false"), ("batch_size", "1e999", "a whole number")],
)  # fmt: skip
def test_wrong_types(key, value, words):
    with pytest.raises(SettingsError, match=f"'{key}' must be {words}"):
        train(**{key: value})


@pytest.mark.parametrize("value", ["a,b", "", 7])
def test_wrong_lists(value):
    with pytest.raises(SettingsError, match="'widths' must be a list of whole numbers"):
        build_settings(PretrainSettings, {"widths": value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dmd_weight": 0, "gan_weight": 0}, "learn nothing"),
        ({"gan_weight": 0.1, "disc_weight": 0}, "heads would never learn"),
        ({"target_teacher": "off", "a": 0.25}, "Set a=0"),
    ],
)
def test_settings_that_contradict_each_other(values, words):
    with pytest.raises(SettingsError, match=words):
        train(**values)


def test_the_legal_neighbours_of_contradictions():
    assert train(target_teacher="off", a=0).a == 0
    assert train(target_teacher="off", a=0.5, dmd_weight=0).dmd_weight == 0
    assert train(gan_weight=0, disc_weight=0).gan_weight == 0


def test_read_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: 0.75\nsteps: 2 # two\nlr: 1e-4\n")
    s = train(**read_config(path))
    assert (s.a, s.steps, s.lr) == (0.75, 2, 1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b", "must hold lines"),
        ("", "must hold lines"),
        ("1: 2", "must hold lines"),
        ("just words", "must hold lines"),
    ],
)
def test_files_that_are_no_settings(text, words, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_config(tmp_path / "x.yaml")


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(SettingsError, match="cannot be read"):
            read_config(path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(SettingsError, match="is not YAML"):
        read_config(tmp_path / "bytes.yaml")


def test_yaml_runs_no_code(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "x.yaml").write_text(
        f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]"
    )
    with pytest.raises(SettingsError, match="is not YAML"):
        read_config(tmp_path / "x.yaml")
    assert not canary.exists()


def test_overrides():
    assert parse_overrides(["a=0.5", " source = x=y "]) == {"a": "0.5", "source": "x=y"}
    for bad in ("a", "=1", ""):
        with pytest.raises(SettingsError, match="key=value"):
            parse_overrides([bad])


def test_as_dict_is_json():
    s = build_settings(PretrainSettings, {"widths": "16,32"})
    assert build_settings(PretrainSettings, json.loads(json.dumps(as_dict(s)))) == s


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dmd_weight": 0, "anchor": "teacher", "anchor_weight": 1}, "'anchor' is a teacher, and with dmd_weight=0 there is none"),
        ({"method": "adapt-then-distill", "target_warmup": 2, "target_teacher": "runs/ft"}, "adapts a target teacher of its own"),
        ({"method": "adapt-then-distill", "target_warmup": 2, "dmd_weight": 0}, "'dmd_weight' is 0"),
    ],
)
def test_a_teacher_that_is_not_there_is_not_asked(values, words):
    with pytest.raises(SettingsError, match=words):
        train(**values)
