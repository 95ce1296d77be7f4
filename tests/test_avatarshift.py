"""The benchmark's own pieces; its cells are runs of the command line, which has tests of its own."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from unidad.config import TrainSettings, build_settings
from unidad.presets import PRESETS


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parent.parent / "benchmarks" / "avatarshift.py"
    spec = importlib.util.spec_from_file_location("avatarshift", path)
    sys.modules["avatarshift"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_is_a_run_that_can_be_set_up(bench):
    for name, row in bench.METHODS.items():
        if row.run:
            settings = build_settings(TrainSettings, PRESETS[row.preset], row.settings)
            assert settings.source == "bundled:avatars", name


def test_every_method_sees_the_same_pictures(bench):
    trained = [PRESETS[row.preset] for row in bench.METHODS.values() if row.run]
    assert {(preset["source"], preset["hflip_check"], preset["batch_size"]) for preset in trained} == {("bundled:avatars", True, 8)}
    rates = {"avatars": "lr_target", "avatars-adapt-then-distill": "lr_target", "avatars-finetune": "lr"}
    for short in (False, True):  # what adapts to them first learns at one rate, for as many updates
        told = {(PRESETS[preset] | (bench.SHORT[preset] if short else {}))[rate] for preset, rate in rates.items()}
        assert len(told) == 1, told


def test_short_runs_are_as_the_demo_but_for_its_time_limit(bench):
    short = build_settings(TrainSettings, PRESETS["avatars"], bench.SHORT["avatars"])
    assert short == replace(build_settings(TrainSettings, PRESETS["avatars-demo"]), max_minutes=0.0)


def test_rows_that_share_a_run_share_its_settings(bench):
    seen = {}
    for row in bench.METHODS.values():
        assert seen.setdefault(row.run, (row.preset, row.settings)) == (row.preset, row.settings)


def test_the_table_has_means_over_seeds_and_their_spread(bench):
    base = dict.fromkeys(bench.SCORES, 0.5) | {"target": "t", "nfe": 3, "minutes": 2.0, "peak_gb": 1.0, "updates": {"student": 7}}
    results = [base | {"method": "m", "frechet_distance": value, "seed": seed} for seed, value in enumerate((100.0, 110.0))]
    results.append(base | {"method": "alone", "frechet_distance": 120.0, "seed": 0, "recall": None})
    lines = bench.table(results).splitlines()
    assert lines[2].startswith("| t | m | 3 | 7 | 105 ± 7.1 | 0.5 ± 0 |")
    assert lines[3].startswith("| t | alone | 3 | 7 | 120 | 0.5 | 0.5 |  |")
    assert len({line.count("|") for line in lines}) == 1


def test_fewer_shots_are_the_first_pictures(bench, picture_folder, tmp_path):
    target = bench.Target("t", picture_folder, picture_folder)
    assert bench.few(target, 10, tmp_path) == picture_folder
    folder = bench.few(target, 3, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["00.png", "01.png", "02.png"]
    assert Image.open(folder / "02.png").tobytes() == Image.open(picture_folder / "02.png").tobytes()


def test_a_folder_of_ones_own_is_a_target(bench, tmp_path):
    for part in ("train", "heldout"):
        with pytest.raises(SystemExit, match=f"no folder '.*{part}'. A target is one of bottts, "):
            bench.find_target(str(tmp_path / "mine"), tmp_path)
        (tmp_path / "mine" / part).mkdir(parents=True)
    for part in ("train", "heldout"):
        (tmp_path / "toonHead" / part).mkdir(parents=True)
    with pytest.raises(SystemExit, match="name of a bundled target"):
        bench.find_target(str(tmp_path / "toonHead"), tmp_path)
    target = bench.find_target(str(tmp_path / "mine"), tmp_path)
    assert (target.name, target.train, target.heldout) == ("mine", tmp_path / "mine" / "train", tmp_path / "mine" / "heldout")


def test_results_are_added_to_those_of_before(bench, tmp_path):
    """In the place of the same cell, but not of one with other settings or another seed."""
    row = {"target": "t", "method": "m", "seed": 0, "n": 9, "short": False, "frechet_distance": 1.0}
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"results": [row]}))
    bench.keep([row | {"set": ["a=1"]}, row | {"set": [], "seed": 1}], path, "f")
    assert [r["frechet_distance"] for r in json.loads(path.read_text())["results"]] == [1.0, 1.0, 1.0]
    bench.keep([row | {"set": [], "frechet_distance": 2.0}], path, "f")
    kept = json.loads(path.read_text())
    assert sorted(r["frechet_distance"] for r in kept["results"]) == [1.0, 1.0, 2.0]
    assert kept["features"] == "f"


def test_a_cell_measured_with_other_settings_is_not_taken_for_this_one(bench, picture_folder, tmp_path):
    args = SimpleNamespace(runs=tmp_path, n=9, set=["a=1"], short=False)
    target = bench.Target("t", picture_folder, picture_folder)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "ft-50-seed0-n9.json").write_text(json.dumps({"set": []}))
    with pytest.raises(SystemExit, match="measured with set"):
        bench.cell(target, "ft-50", 0, args, None)
    same = SimpleNamespace(**(vars(args) | {"set": []}))
    with pytest.raises(SystemExit, match="with models None"):  # it does not say which
        bench.cell(target, "ft-50", 0, same, None)
    kept = {"set": [], "models": bench.bundled_models()}
    (tmp_path / "t" / "ft-25-seed0-n9.json").write_text(json.dumps(kept))
    assert bench.cell(target, "ft-25", 0, same, None) == kept


def test_a_run_is_known_by_the_values_of_its_preset(bench, picture_folder, monkeypatch):
    args, row = SimpleNamespace(short=False, set=[]), bench.METHODS["uni-dad"]
    asked = bench.asked_of(row, picture_folder, args)
    monkeypatch.setitem(bench.PRESETS, "avatars", bench.PRESETS["avatars"] | {"lr": 0.5})
    other = bench.asked_of(row, picture_folder, args)
    assert [key for key in asked if asked[key] != other[key]] == ["settings"]


def test_asked_to_stop_it_passes_that_on_and_waits(bench, tmp_path):
    saves = "import os, signal, sys; from pathlib import Path\n"
    saves += "signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1]).write_text('saved'), sys.exit(3)))\n"
    saves += "os.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    status, _ = bench.run_to_its_end([sys.executable, "-c", saves, str(tmp_path / "saved")])
    assert os.waitstatus_to_exitcode(status) == 3
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_run_of_other_pictures_length_or_settings_is_not_taken_for_this_one(bench, tmp_path):
    asked = {"short": False, "set": ["a=1"], "pictures": "abc"}
    assert bench.read_cost(tmp_path, asked) is None
    done = tmp_path / "cost.json"
    done.write_text(json.dumps(asked | {"minutes": 2}))
    assert bench.read_cost(tmp_path, asked) == {"minutes": 2}
    for other in ({"short": True}, {"set": []}, {"pictures": "def"}):
        with pytest.raises(SystemExit, match=f"trained with {next(iter(other))} .* Give another --runs"):
            bench.read_cost(tmp_path, asked | other)
    done.write_text(json.dumps({"minutes": 2}))
    with pytest.raises(SystemExit, match="trained with short others"):  # older runs do not say
        bench.read_cost(tmp_path, asked)
