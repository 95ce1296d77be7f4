from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from loop import make, record
from PIL import Image
from tiny import words

from unidad import ingredients, ingredients_text
from unidad.backbones.unet2d import UNet2DBackbone
from unidad.cli import main
from unidad.export import save_source
from unidad.train import Trainer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("UNIDAD_WEIGHTS", raising=False)


@pytest.fixture
def net_v() -> UNet2DBackbone:
    """Three levels, attention at 8x8 and in the middle, cosine schedule, v-prediction."""
    return tiny.backbone(0, "v_prediction", (16, 32, 32))


@pytest.fixture
def net_eps() -> UNet2DBackbone:
    """The same network on the linear schedule, epsilon-prediction."""
    return tiny.backbone(0, "epsilon", (16, 32, 32))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten different PNGs of 40x32 to 49x41."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + i, 32 + i), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source model's folder."""
    from test_export import V

    folder = tmp_path_factory.mktemp("source") / "model"
    save_source(tiny.backbone(1), V, folder, {})
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """The report of a run takes ten seconds and has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ingredients, ingredients_text):
            patch.setattr(module, "write_report", lambda *_, **__: None)
        yield


# Files with a `run` of another kind have it under the same name, which wins there.


@pytest.fixture(scope="module")
def run(no_report: None, source: Path, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two cycles."""
    out = tmp_path_factory.mktemp("runs") / "two"
    assert main(words(source, picture_folder, out)) == 0
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "student").rename(tmp_path / "student")  # so that the checkpoint is what is read
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, picture_folder) -> tuple[Trainer, list[tuple]]:
    trainer = make(tmp_path_factory.mktemp("whole"), picture_folder)
    seen = record(trainer)
    trainer.fit()
    return trainer, seen
