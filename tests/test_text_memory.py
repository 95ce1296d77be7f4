"""Gradient checkpointing on text-to-image sources: less is kept, and losses and gradients stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import sd
import torch
from test_sdp import settings, tensors
from test_sdxl import write_sdxl

from unidad.adapt import build_method, train
from unidad.backbones.lora import LoraRole, _layers
from unidad.ingredients_text import gather_text
from unidad.methods.base import only_training
from unidad.plan import plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param) / "model"
    return sd.write_pipeline(place) if request.param == "sd" else write_sdxl(place)


@pytest.fixture(params=[0, 2], ids=["whole", "lora"])
def rank(request: pytest.FixtureRequest) -> int:
    return request.param


def losses_and_gradients(parts, s) -> dict[str, torch.Tensor]:
    """Of one cycle of a method whose networks differ from each other; what the graph keeps, in bytes, under "kept"."""
    torch.manual_seed(0)  # of fresh adapters
    method, found = build_method(s, parts, CPU, torch.Generator().manual_seed(1)), {}
    shaken = torch.Generator().manual_seed(2)
    for name in method.trained():
        for p in method.networks[name].parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=shaken)
    weights = {
        p.untyped_storage()._cdata for n in method.networks.values() for p in [*n.parameters(), *getattr(n, "unet", n).parameters()]
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    for phase in method.phases:
        pictures, labels, _ = parts.stream(s, CPU).batch(2)
        with only_training(method.networks, phase.trains):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                losses = phase.loss(pictures, labels)
            losses["total"].backward()
        found |= {f"{phase.name}.{name}": value.detach() for name, value in losses.items()}
        found |= {
            f"{phase.name}.{n}.{key}": p.grad.clone()
            for n in phase.trains
            for key, p in method.networks[n].named_parameters()
            if p.grad is not None
        }
        for network in method.networks.values():
            assert not any(p.grad is not None for p in network.parameters()) or network in [
                method.networks[n] for n in phase.trains
            ]
            network.zero_grad(set_to_none=True)
    student = method.networks["student"]
    if isinstance(student, LoraRole):
        assert all(layer._active_adapter == [] for layer in _layers(student.unet))
    return found | {"kept": torch.tensor(sum(storage.nbytes() for storage in kept.values()))}


def test_losses_and_gradients_are_equal_with_and_without(folder: Path, rank: int, picture_folder: Path):
    s = settings(folder, lora_rank=rank, batch_size=2, steps=2, fake_updates=1, gan_weight=1.0)
    parts = gather_text(s, picture_folder)
    plain = losses_and_gradients(parts, s)
    again = losses_and_gradients(parts, settings(folder, **(vars(s) | {"gradient_checkpointing": True})))
    assert again.pop("kept") < 0.8 * plain.pop("kept")
    assert plain.keys() == again.keys()
    for role in ("student", "fake_teacher", "target_teacher"):
        mine = [value.abs().max() for key, value in plain.items() if key.startswith(f"{role}.{role}.")]
        assert mine, role
        assert max(mine) > 1e-4, role
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, atol=1e-6, rtol=1e-5, msg=key)


def test_the_plan_counts_less(folder: Path, rank: int):
    if rank and (folder / "text_encoder_2").exists():
        pytest.skip("ten seconds for what the three others show")
    values = {"lora_rank": rank, "batch_size": 2, "fake_updates": 1}
    plain = plan(settings(folder, **values))
    again = plan(settings(folder, **values, gradient_checkpointing=True))
    assert (again.weights, again.optimizer, again.gradients) == (plain.weights, plain.optimizer, plain.gradients)
    for phase in plain.activations:
        assert again.activations[phase] < 0.9 * plain.activations[phase], phase


def test_a_run_with_it_is_stopped_and_gone_on_with_to_the_same_bits(
    folder: Path, rank: int, picture_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("unidad.adapt.finish", lambda *_: None)  # the checkpoints are compared
    values = {"lora_rank": rank, "fake_updates": 1, "gradient_checkpointing": True}
    whole = tensors(train(picture_folder, tmp_path / "whole", settings(folder, **values)))
    train(picture_folder, tmp_path / "again", settings(folder, **values, cycles=1))
    resumed = tensors(train(picture_folder, tmp_path / "again", settings(folder, **values), resume=True))
    for group, found in whole.items():
        for key, value in found.items():
            assert torch.equal(value, resumed[group][key]), (group, key)
