"""What `--plan` foresees against what a real cycle keeps; gradient checkpointing changes memory and nothing else."""

from __future__ import annotations

import shutil

import adm_reference
import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from test_export import V
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unidad import plan as planning
from unidad.adapt import build_method
from unidad.backbones.load import WEIGHTS, load_model
from unidad.cli import main
from unidad.config import TrainSettings, build_settings
from unidad.convert.layout import infer, to_unet
from unidad.data import PictureSet
from unidad.errors import SettingsError
from unidad.export import save_converted, save_source
from unidad.ingredients import Ingredients
from unidad.methods.base import only_training

SMALL = {"device": "cpu", "precision": "fp32", "batch_size": 2, "fake_updates": 2, "a": 0.5, "features": "layer"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_source(tiny.backbone(1), V, folder / "tiny", {})
    weights = adm_reference.random_weights((32, 64), (False, True))
    save_converted(to_unet(weights, infer(weights, 16, 32), "legacy"), DDPMScheduler(), folder / "adm", {})
    return folder


def settings(sources, kind, **values):
    return build_settings(TrainSettings, SMALL, {"source": str(sources / kind)}, values)


def real_method(s):
    source = load_model(s.source)
    pictures = PictureSet(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["x"], "x")
    steps = source.backbone.schedule.student_steps(s.steps, s.grid)
    return build_method(s, Ingredients(source, pictures, None, None, steps), torch.device("cpu"), torch.Generator().manual_seed(0))


def saved_bytes(method, phase, s) -> int:
    """Of every storage that the graph of this phase's loss saves, but for the weights."""
    weights = {p.untyped_storage()._cdata for network in method.networks.values() for p in network.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with (
        only_training(method.networks, phase.trains),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        losses = phase.loss(torch.zeros(s.batch_size, 3, 16, 16))
    assert losses["total"].requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("kind", ["tiny", "adm"])
def test_the_plan_against_a_real_cycle(sources, kind):
    s = settings(sources, kind)
    found, method = planning.plan(s), real_method(s)
    for phase in method.phases:
        assert found.activations[phase.name] == pytest.approx(saved_bytes(method, phase, s), rel=0.15), phase.name
    count = {name: 4 * sum(p.numel() for p in network.parameters()) for name, network in method.networks.items()}
    assert {name: n for name, n in found.weights.items() if name != "source as read"} == count
    trained = count["student"] + count["fake_teacher"] + count["heads"] + count["target_teacher"]
    assert (found.optimizer, found.average) == (2 * trained, count["student"])
    assert found.gradients == count["fake_teacher"] + count["heads"]


def test_what_lowers_memory_lowers_the_plan(sources):
    plain = planning.plan(settings(sources, "adm")).activations["student"]
    last = planning.plan(settings(sources, "adm", rollout_grad="last")).activations["student"]
    again = planning.plan(settings(sources, "adm", gradient_checkpointing=True)).activations["student"]
    assert last < 0.7 * plain
    assert again < 0.7 * plain


def test_a_gpu_keeps_more_under_bf16_than_a_cpu_for_it_normalises_in_float32(sources, monkeypatch):
    s = settings(sources, "adm", precision="bf16")
    on_cpu = planning.plan(s).activations["student"]
    monkeypatch.setattr(planning, "pick_device", lambda name: torch.device("cuda"))
    assert 1.2 * on_cpu < planning.plan(s).activations["student"] < 2 * on_cpu
    x = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    with planning.norms_in_float32():
        assert functional.group_norm(x, 2).dtype == torch.float32
    assert functional.group_norm(x, 2).dtype == torch.bfloat16


def test_a_plan_reads_no_weights_and_refuses_what_does_not_fit(sources, tmp_path, monkeypatch, capsys):
    shutil.copytree(sources / "tiny", tmp_path / "model")
    (tmp_path / "model" / "unet" / WEIGHTS).write_bytes(b"nothing to read")
    words = ["train", "--source", str(tmp_path / "model"), "--plan", "--device", "cpu"]
    small = [word for text in ("batch_size=2", "fake_updates=1", "steps=1") for word in ("--set", text)]
    assert main(words + small) == 0
    said = capsys.readouterr().out
    assert "activations, student" in said
    assert "GFLOP a cycle" in said
    monkeypatch.setattr(planning, "room", lambda device: 1000)
    assert main(words + small) == 2
    said = capsys.readouterr()
    assert "gradient_checkpointing=true" in said.err
    assert "GFLOP a cycle" not in said.out


def test_a_grid_and_what_lies_aside_are_counted(sources):
    on_gpu = planning.Plan({"student": 10}, 10, 20, 10, {"student": 7}, drawing=30)
    assert (on_gpu.passing, on_gpu.total) == (30, 70)
    on_cpu = planning.Plan({"student": 10}, 10, 20, 10, {"student": 30}, drawing=30, aside=8)
    assert (on_cpu.passing, on_cpu.total) == (40, 88)
    found = planning.plan(settings(sources, "tiny"))
    assert found.aside == pytest.approx(5e7 + 0.1 * found.passing, abs=1)


def test_the_most_that_was_alive():
    known = torch.zeros(1000)
    with planning._Alive({known.untyped_storage()._cdata}, watch=True) as alive:
        a = known + torch.ones(1000)  # two vectors of 4000 bytes
        b = a + 1
        del a
        c = b[:500]  # the same storage
        del b
    assert (alive.most, alive.bytes, len(c)) == (8000, 4000, 500)


def test_what_a_grid_takes_lies_between_its_skips_and_all_it_computes(sources):
    """32 pictures of 16 pixels through 32 and 64 channels: four outputs of the encoder wait for the decoder."""
    found = planning.plan(settings(sources, "adm")).drawing
    skips = 32 * 4 * (2 * 32 * 16**2 + 32 * 8**2 + 64 * 8**2)
    assert skips < found < 6 * skips


def test_what_just_fits_is_not_refused(sources):
    found = planning.Plan({"student": 10, "teacher": 10}, 10, 20, 10, {"student": 7, "teacher": 5})
    assert found.total == 67
    planning.refuse_too_large(found, settings(sources, "tiny"), 67)
    with pytest.raises(SettingsError, match="rollout_grad=last"):
        planning.refuse_too_large(found, settings(sources, "tiny"), 66)


def test_networks_shared_out_over_processes(sources):
    """Each holds a quarter of all networks but the heads, of their moments and of the average, and two networks whole as passes go on."""
    whole, each = (planning.plan(settings(sources, "adm", shard=True), n) for n in (1, 4))
    network, heads = whole.weights["student"], whole.weights["heads"]
    assert {n for name, n in each.weights.items() if name.endswith(("student", "teacher"))} == {-(-network // 4)}
    assert each.weights["heads"] == heads
    assert each.weights["put together"] == 2 * network
    assert each.optimizer == pytest.approx((whole.optimizer - 2 * heads) / 4 + 2 * heads, abs=12)
    assert each.average == -(-whole.average // 4)
    assert (each.gradients, each.activations) == (whole.gradients, whole.activations)
    assert "put together" not in whole.weights


def test_the_plan_says_for_how_many_processes_it_is(sources, capsys):
    words = [
        "train",
        "--source",
        str(sources / "tiny"),
        "--plan",
        "--device",
        "cpu",
        "--set",
        "shard=true",
        "--set",
        "batch_size=2",
    ]
    assert main([*words, "--set", "fake_updates=1", "--set", "steps=1"]) == 0
    said = capsys.readouterr().out
    assert "in each of 2 processes" in said
    assert "weights, put together" in said


def test_counted_flops_are_those_of_bench(sources):
    """A source-only run without the GAN: the student's rollout with its backward pass, and two predictions, of two pictures."""
    s = settings(sources, "tiny", steps=1, a=0.0, target_teacher="off", gan_weight=0.0, disc_weight=0.0, fake_updates=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        load_model(s.source).backbone.x0(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))
    forward = counter.get_total_flops()
    assert 4.8 < planning.phase_costs(s)["student"].flops / forward < 5


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 4), (2, 2 * 4 + 1 + 4)])
def test_a_phase_counts_in_its_own_cycles_and_the_anchors_trajectories_apart(sources, steps, evaluations):
    """Of 60 cycles the target teacher has the first 20 and the student the others; the pool of 16 is renewed by 2 every 16 of its uses.

    Four evaluations after each step; with two steps, also the student's first and four after what it gave was noised.
    """
    first = {"cycles": 60, "target_warmup": 20, "target_cycles": 20, "cutmix_above": 0.5}
    alone = {"a": 1.0, "gan_weight": 0.0, "disc_weight": 0.0, "fake_updates": 1, "steps": steps}
    anchored = {"anchor": "teacher", "anchor_weight": 1.0, "anchor_pool": 16, "anchor_steps": 4}
    s = settings(sources, "tiny", **first, **alone, **anchored)
    costs = planning.phase_costs(s)
    cycles = {"student": 40, "fake_teacher": 40, "target_teacher": 20, "trajectories": 40}
    assert {name: cost.cycles for name, cost in costs.items()} == cycles
    drawn = 16 + 2 + 2  # the whole pool, and at the 17th and the 33rd use
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        load_model(s.source).backbone.x0(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long))
    assert costs["trajectories"].flops * 40 == pytest.approx(drawn * evaluations * counter.get_total_flops(), rel=0.01)


def gradients(s):
    method, found = real_method(s), {}
    for phase in method.phases:
        with only_training(method.networks, phase.trains):
            phase.loss(torch.zeros(s.batch_size, 3, 16, 16))["total"].backward()
        for name in phase.trains:
            found |= {f"{name}.{key}": p.grad for key, p in method.networks[name].named_parameters() if p.grad is not None}
            for p in method.networks[name].parameters():
                p.grad = None
    return found


@pytest.mark.parametrize("way", ["gradient_checkpointing", "channels_last", pytest.param("compile", marks=pytest.mark.slow)])
def test_another_way_of_computing_changes_no_gradient(way, sources):
    plain = gradients(settings(sources, "adm"))
    again = gradients(settings(sources, "adm", **{way: True}))
    assert plain.keys() == again.keys()
    assert max(float(g.abs().max()) for g in plain.values()) > 1e-3
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, atol=1e-5, rtol=1e-4)
