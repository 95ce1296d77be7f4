from __future__ import annotations

import pytest
import tiny
import torch

from unidad.heads import MultiHead, SingleHead, build_heads
from unidad.losses import GAN_LOSSES, denoising_loss, gan_discriminator_loss
from unidad.methods.base import only_training
from unidad.methods.objective import Objective
from unidad.methods.unidad import UniDAD


def pictures(n: int = 2) -> torch.Tensor:
    return torch.rand(n, *tiny.SHAPE, generator=torch.Generator().manual_seed(9)) * 2 - 1


def run_phase(method: UniDAD, phase) -> dict[str, torch.Tensor]:
    with only_training(method.networks, phase.trains):
        losses = phase.loss(pictures())
        losses["total"].backward()
    return losses


def reached(method: UniDAD) -> set[str]:
    """Networks in which any gradient has arrived."""
    return {
        name
        for name, network in method.networks.items()
        if any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in network.parameters())
    }


def count_forwards(network: torch.nn.Module, monkeypatch) -> list[str]:
    """Record which of x0 / features / x0_and_features is called."""
    calls: list[str] = []
    for name in ("x0", "features", "x0_and_features"):
        original = getattr(network, name)

        def wrapped(*args, _original=original, _name=name, **options):
            calls.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(network, name, wrapped)
    return calls


def cycle(method: UniDAD) -> dict[str, torch.Tensor]:
    losses: dict[str, torch.Tensor] = {}
    for phase in method.cycle_phases(0):
        for _ in range(phase.repeats):
            losses |= run_phase(method, phase)
    return losses


# -- who learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", ["all", "last", "random"])
def test_gradients_reach_only_who_learns(grad):
    method = tiny.unidad(gan_weight=0.5, disc_weight=0.5, rollout_grad=grad)
    wanted = [("student", {"student"}), ("fake_teacher", {"fake_teacher", "heads"}), ("target_teacher", {"target_teacher"})]
    assert [(p.name, set(p.trains)) for p in method.cycle_phases(0)] == wanted
    for phase, (_, networks) in zip(method.cycle_phases(0), wanted, strict=True):
        run_phase(method, phase)
        assert reached(method) == networks
        for network in method.networks.values():
            network.zero_grad(set_to_none=True)


def test_every_parameter_of_a_learner_is_reached():
    method = tiny.unidad()
    for phase in method.cycle_phases(0):
        run_phase(method, phase)
    for name in method.trained():
        assert [n for n, p in method.networks[name].named_parameters() if p.grad is None] == []
    assert method.trained() == ["student", "fake_teacher", "target_teacher", "heads"]


def test_flags_are_restored():
    method = tiny.unidad()
    method.student.train()
    method.source_teacher.requires_grad_(False)
    bias = method.fake_teacher.unet.conv_in.bias
    bias.requires_grad = False

    def flags():
        return [(n.training, [p.requires_grad for p in n.parameters()]) for n in method.networks.values()]

    before = flags()
    with only_training(method.networks, ("fake_teacher", "heads")):
        assert [n for n, net in method.networks.items() if net.training] == ["fake_teacher", "heads"]
        assert bias.requires_grad
        assert not any(p.requires_grad for p in method.student.parameters())
    assert flags() == before
    with pytest.raises(ZeroDivisionError), only_training(method.networks, ()):
        raise ZeroDivisionError
    assert flags() == before


# -- the cycle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reuse", "rollouts"), [(True, 3), (False, 4)])
def test_every_fake_teacher_update_has_new_samples(reuse, rollouts, monkeypatch):
    """k = 3: the student runs K = 2 forwards for its own update and for each of the k, less one batch where it is reused."""
    method = tiny.unidad(fake_updates=3, reuse_batch=reuse, steps=2)
    calls = count_forwards(method.student, monkeypatch)
    seen = []
    original = UniDAD._samples_for_fake_teacher

    def spy(self):
        samples, labels = original(self)
        seen.append(samples)
        return samples, labels

    monkeypatch.setattr(UniDAD, "_samples_for_fake_teacher", spy)
    cycle(method)
    assert calls == ["x0"] * (2 * rollouts)
    assert len(seen) == 3
    assert not any(x.requires_grad for x in seen)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert method.carried() == []


def test_samples_left_over_by_an_update_that_was_left_out_are_not_for_the_next_cycle():
    method = tiny.unidad()
    method.student_loss(torch.zeros(2, *tiny.SHAPE))
    assert len(method.carried()) == 1
    method.start_cycle(1)
    assert method.carried() == []


def test_the_reused_batch_is_the_students_own(monkeypatch):
    method, made = tiny.unidad(), []
    original = method.generate
    monkeypatch.setattr(method, "generate", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    run_phase(method, tiny.phase(method, "student"))
    assert len(method.carried()) == 1
    assert torch.equal(method.carried()[0], made[0].detach())
    assert torch.equal(method._samples_for_fake_teacher()[0], made[0].detach())
    assert method.carried() == []


@pytest.mark.parametrize(("a", "unused"), [(0.0, "target_teacher"), (1.0, "source_teacher")])
def test_a_teacher_without_weight_is_never_run(a, unused, monkeypatch):
    method = tiny.unidad(a=a)
    calls = count_forwards(method.networks[unused], monkeypatch)
    run_phase(method, tiny.phase(method, "student"))
    assert calls == []
    assert tiny.unidad(a=a, drop=(unused,)).networks.keys() == method.networks.keys() - {unused}


def test_teachers_run_once_per_student_update(monkeypatch):
    method = tiny.unidad(a=0.5)
    calls = {n: count_forwards(method.networks[n], monkeypatch) for n in ("source_teacher", "target_teacher", "fake_teacher")}
    run_phase(method, tiny.phase(method, "student"))
    assert calls == {"source_teacher": ["x0"], "target_teacher": ["x0"], "fake_teacher": ["x0", "features"]}


def test_without_target_weight_there_is_no_target_phase():
    for drop in ((), ("target_teacher",)):
        method = tiny.unidad(a=0.0, drop=drop)
        assert [p.name for p in method.cycle_phases(0)] == ["student", "fake_teacher"]
        cycle(method)
        assert "target_teacher" not in method.trained()


def test_the_target_teacher_goes_first_where_it_is_warmed_up():
    def phases(cycle: int, **numbers: object) -> list[tuple[str, int]]:
        return [(p.name, p.repeats) for p in tiny.unidad(warmup=4, **numbers).cycle_phases(cycle)]

    plain = [("student", 1), ("fake_teacher", 2), ("target_teacher", 1)]
    assert [phases(c) for c in (0, 3, 4, 99)] == [plain[2:], plain[2:], plain, plain]
    assert phases(0, a=0.0) == plain[:2]  # nobody to warm up, nothing to wait for


def test_gan_alone_runs_no_teacher(monkeypatch):
    method = tiny.unidad(dmd_weight=0.0, drop=("source_teacher", "target_teacher"))
    losses = run_phase(method, tiny.phase(method, "student"))
    assert losses.keys() == {"gan", "total"}
    assert reached(method) == {"student"}


def test_without_gan_there_are_no_heads_and_no_pictures():
    method = tiny.unidad(gan_weight=0.0, disc_weight=0.0, drop=("heads",))
    assert [(p.name, p.trains, p.needs_data) for p in method.cycle_phases(0)[:2]] == [
        ("student", ("student",), False),
        ("fake_teacher", ("fake_teacher",), False),
    ]
    assert cycle(method).keys() == {"dmd", "dmd_gradient", "fake", "target", "total"}


@pytest.mark.parametrize(
    ("numbers", "drop", "named"),
    [
        ({"a": 0.5}, ("target_teacher",), "target teacher"),
        ({"a": 0.5}, ("source_teacher",), "source teacher"),
        ({"a": 1.0}, ("source_teacher", "target_teacher"), "target teacher"),
        ({}, ("heads",), "heads"),
    ],
)
def test_missing_networks_are_named(numbers, drop, named):
    with pytest.raises(ValueError, match=named):
        tiny.unidad(drop=drop, **numbers)


# -- the losses as wired ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["stage", "layer"])
def test_shared_forward_equals_separate_calls(features, monkeypatch):
    """The same seed gives the same noise and t; sharing the forward changes what is run, not what is computed."""
    results = {}
    for shared in (True, False):
        method = tiny.unidad(shared_forward=shared, features=features)
        calls = count_forwards(method.fake_teacher, monkeypatch)
        losses = run_phase(method, tiny.phase(method, "fake_teacher"))
        results[shared] = losses, [p.grad for n in ("fake_teacher", "heads") for p in method.networks[n].parameters()]
        assert calls == (["x0_and_features", "features"] if shared else ["x0", "features", "features"])
    for name, value in results[True][0].items():
        assert value.item() == pytest.approx(results[False][0][name].item(), rel=1e-6)
    for g, h in zip(results[True][1], results[False][1], strict=True):
        assert torch.allclose(g, h, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("augment", ["none", "flip,translate"])
def test_joint_batch_equals_two_calls(augment, monkeypatch):
    """Noise and t are drawn in the same order; only the heads' batch is another."""
    results = {}
    for joint in (True, False):
        method = tiny.unidad(joint_batch=joint, shared_forward=False, augment=augment, features="layer")
        calls = count_forwards(method.fake_teacher, monkeypatch)
        losses = run_phase(method, tiny.phase(method, "fake_teacher"))
        results[joint] = losses, [p.grad for n in ("fake_teacher", "heads") for p in method.networks[n].parameters()]
        assert calls == ["x0", "features"] + ["features"] * (not joint)
    for name, value in results[True][0].items():
        assert value.item() == pytest.approx(results[False][0][name].item(), rel=1e-6)
    for g, h in zip(results[True][1], results[False][1], strict=True):
        assert torch.allclose(g, h, rtol=1e-3, atol=1e-6)


def test_fake_teacher_loss_by_hand(monkeypatch):
    """L_fk + lambda_D L_D recomputed from the generator's own numbers: x0 before noise, t before eps, fakes before reals."""
    method = tiny.unidad(disc_weight=0.3)
    x, y, net = pictures(3)[:2] * 0.5, pictures(), method.fake_teacher
    method.restore([x])
    state = method.generator.get_state()
    losses = tiny.phase(method, "fake_teacher").loss(y)
    g = torch.Generator()
    g.set_state(state)
    noised = []
    for clean in (x, y):
        t = net.schedule.uniform(2, g)
        eps = torch.randn(clean.shape, generator=g)
        noised.append((net.schedule.add_noise(clean, eps, t), t))
    alpha, sigma = net.schedule.alpha_sigma(noised[0][1])
    fk = denoising_loss(x, net.x0(*noised[0]), alpha, sigma, "epsilon")
    fake, real = (method.heads(net.features(*pair)) for pair in noised)
    d = gan_discriminator_loss(real, fake)
    assert losses["fake"].item() == pytest.approx(fk.item(), rel=1e-5)
    assert losses["disc"].item() == pytest.approx(d.item(), rel=1e-5)
    assert losses["total"].item() == pytest.approx((fk + 0.3 * d).item(), rel=1e-5)


def gaussians(a: float, fake: float) -> UniDAD:
    nets = {"student": fake, "fake_teacher": fake, "source_teacher": -1.0, "target_teacher": 2.0}
    return UniDAD(
        **{name: tiny.GaussianBackbone(mean, 1.0) for name, mean in nets.items()},
        heads=None,
        objective=Objective(a=a, gan_weight=0, disc_weight=0),
        student_steps=[999],
        batch_size=4,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize(("a", "sign"), [(0.0, 1.0), (1.0, -1.0)])
def test_dmd_of_exact_gaussians_points_to_the_teacher(a, sign):
    """Fake N(0,1); source N(-1,1), target N(2,1): going down g moves x left for a = 0 and right for a = 1."""
    g = gaussians(a, 0.0).dmd_gradient(torch.randn(4, 2, 3, 3))
    assert bool((g * sign > 0).all())


@pytest.mark.parametrize(("a", "teacher"), [(0.0, -1.0), (1.0, 2.0)])
def test_dmd_vanishes_where_the_fake_teacher_equals_the_teacher(a, teacher):
    assert torch.equal(gaussians(a, teacher).dmd_gradient(torch.randn(4, 2, 3, 3)), torch.zeros(4, 2, 3, 3))


def test_wiring_of_a(monkeypatch):
    x = torch.randn(4, 2, 3, 3)
    ends = [gaussians(a, 0.0).dmd_gradient(x) for a in (0.0, 1.0, 0.25)]
    assert torch.allclose(ends[2], 0.75 * ends[0] + 0.25 * ends[1], atol=1e-6)


@pytest.mark.parametrize("law", ["uniform", "karras", "quadratic"])
def test_timestep_law_of_the_student(law, monkeypatch):
    method = tiny.unidad(timestep_law=law)
    seen = []
    original = method.source_teacher.x0
    monkeypatch.setattr(method.source_teacher, "x0", lambda x, t, labels=None: seen.append(t) or original(x, t, labels))
    for _ in range(20):
        method.dmd_gradient(pictures())
    low, high = int(torch.cat(seen).min()), int(torch.cat(seen).max())
    assert (low, high) >= ((20, 0) if law == "uniform" else (0, 0))
    assert high <= (979 if law == "uniform" else 999)


@pytest.mark.parametrize("kind", GAN_LOSSES)
@pytest.mark.parametrize("heads", ["multi", "single"])
def test_one_cycle_with_every_gan(kind, heads):
    method = tiny.unidad(gan_loss=kind, heads=heads, gan_weight=0.1, disc_weight=0.1)
    losses = cycle(method)
    assert losses.keys() == {"dmd", "dmd_gradient", "gan", "fake", "disc", "disc_accuracy", "target", "total"}
    assert all(torch.isfinite(v) and v.ndim == 0 for v in losses.values())
    assert 0 <= losses["disc_accuracy"] <= 1
    assert reached(method) >= {"heads"}


def test_gradient_penalty_is_in_the_loss():
    """The penalty is at least 0 and, with lambda 10, exactly 10 times that with lambda 1."""
    values = {}
    for weight in (0.0, 1.0, 10.0):
        method = tiny.unidad(gan_loss="wgan-gp", gradient_penalty_weight=weight)
        values[weight] = tiny.phase(method, "fake_teacher").loss(pictures())["disc"].item()
    assert values[1.0] > values[0.0]
    assert values[10.0] - values[0.0] == pytest.approx(10 * (values[1.0] - values[0.0]), rel=1e-3)


def test_same_seed_same_cycle():
    a, b = cycle(tiny.unidad()), cycle(tiny.unidad())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["dmd"], cycle(tiny.unidad(seed=8))["dmd"])


# -- heads ------------------------------------------------------------------------------------------------------------


def test_multi_head_is_a_mean_of_a_dot_product():
    heads = build_heads("multi", [2, 3], 0)
    f, g = torch.randn(4, 2, 5, 5), torch.randn(4, 3, 2, 2)
    logits = heads([f, g])
    assert isinstance(heads, MultiHead)
    assert logits.shape == (4, 2)
    w, b = heads.heads[1].weight[0, :, 0, 0], heads.heads[1].bias
    assert torch.allclose(logits[:, 1], g.mean(dim=(2, 3)) @ w + b, atol=1e-6)
    with pytest.raises(ValueError, match="zip"):
        heads([f])


def test_single_head_sees_the_bottleneck_alone():
    heads = build_heads("single", [2, 8], 0)
    f, g = torch.randn(4, 2, 8, 8), torch.randn(4, 8, 4, 4)
    assert isinstance(heads, SingleHead)
    assert heads([f, g]).shape == (4, 1)
    assert torch.equal(heads([f, g]), heads([f * 0, g]))


def test_heads_depend_on_their_seed_alone():
    a, b, c = (build_heads("multi", [4], s).state_dict()["heads.0.weight"] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
