"""The anchor to a teacher's ODE, its pool, and `transfer`: ours, beyond the paper."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_unidad import pictures, reached, run_phase

from unidad.methods.pool import REFRESH
from unidad.rollout import ddim_states


def test_the_anchor_is_the_students_own_denoising_loss_at_its_last_step():
    method = tiny.unidad(anchor_weight=2.0, gan_weight=0.0, denoising="v")
    student = tiny.phase(method, "student")
    assert student.needs_data
    losses = run_phase(method, student)
    assert reached(method) == {"student"}
    assert losses["total"].item() == pytest.approx((losses["dmd"] + 2 * losses["anchor"]).item())

    y = pictures()
    method.generator.manual_seed(3)
    anchor = method.anchor(y)
    eps = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    t = torch.full((2,), method.student_steps[-1])
    alpha, sigma = method.student.schedule.alpha_sigma(t, 4)
    xhat = method.student.x0(alpha * y + sigma * eps, t)
    assert anchor.item() == pytest.approx((((alpha / sigma) ** 2 + 1) * (xhat - y) ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("a", "teacher", "other"), [(0.75, "target_teacher", "source_teacher"), (0.0, "source_teacher", "target_teacher")]
)
def test_the_anchor_to_a_teacher_asks_for_the_end_of_its_ddim(a, teacher, other):
    """The target teacher's if it has a weight: from noise, and from where the student itself stands at its last step, noised anew."""
    method = tiny.unidad(a=a, anchor_weight=2.0, anchor="teacher", anchor_steps=2, anchor_pool=8, gan_weight=0.0, denoising="v")
    state = method.generator.get_state()
    pool = method.trajectories(3)
    assert pool.shape == (3, 2, 2, *tiny.SHAPE)
    method.generator.set_state(state)
    noise, first, second = (torch.randn((3, *tiny.SHAPE), generator=method.generator) for _ in range(3))
    network, student = method.networks[teacher], method.student
    assert torch.equal(pool[:, 0, 0], noise)
    *_, end = ddim_states(network, noise, [999, 749, 499, 125], order=2)
    assert torch.equal(pool[:, 0, 1], end[1])
    with torch.no_grad():
        one = student.x0(first, torch.full((3,), 999))
    own = student.schedule.add_noise(one, second, torch.full((3,), 499))
    assert torch.equal(pool[:, 1, 0], own)
    *_, end = ddim_states(network, own, [499, 125], order=2)
    assert torch.equal(pool[:, 1, 1], end[1])

    student = tiny.phase(method, "student")
    assert not student.needs_data
    losses = run_phase(method, student)
    assert reached(method) == {"student"}
    assert losses["total"].item() == pytest.approx((losses["dmd"] + 2 * losses["anchor"]).item())
    method.networks[other].load_state_dict(tiny.backbone(11).state_dict())
    method.generator.set_state(state)
    assert torch.equal(method.trajectories(3), pool), "the other teacher has no say"


def test_the_anchor_to_a_teacher_is_zero_for_a_student_that_ends_where_the_teacher_does():
    """The exact denoiser of a point (std 0) is its own ODE's end, at every timestep."""
    method = tiny.unidad(anchor_weight=1.0, anchor="teacher", anchor_pool=8, gan_weight=0.0)
    method.student = method.target_teacher = tiny.GaussianBackbone(0.25, 0.0)
    assert method.anchor(torch.empty(0)).item() == pytest.approx(0.0, abs=1e-6)
    method.student = tiny.GaussianBackbone(0.5, 0.0)
    assert method.anchor(torch.empty(0)).item() > 1e-6


def test_the_anchor_by_size():
    """`anchor_huber` reaches the loss: the same errors, by the square and by their size."""
    square, huber = (
        tiny.unidad(anchor_weight=1.0, anchor="teacher", anchor_pool=8, denoising="v", anchor_huber=c) for c in (0.0, 1e-6)
    )
    assert torch.equal(square.trajectories(8), huber.trajectories(8))
    for method in (square, huber):
        method._pool.use()
        method.generator.manual_seed(5)
    x_t, t, clean = square._from_pool(2)
    _, sigma = square.student.schedule.alpha_sigma(t, 4)
    error = ((square.student.x0(x_t, t) - clean) / sigma).detach()
    for method, value in ((square, error.square().mean()), (huber, error.abs().mean())):
        method.generator.manual_seed(5)
        assert method.anchor(torch.empty(0)).item() == pytest.approx(value.item(), rel=1e-3)


def test_the_pool_of_the_anchor_is_renewed_an_eighth_at_a_time():
    method = tiny.unidad(anchor_weight=1.0, anchor="teacher", anchor_pool=16, anchor_steps=1)
    first = method._pool.use().clone()
    for _ in range(REFRESH - 1):
        assert torch.equal(method._pool.use(), first)
    second = method._pool.use()
    assert torch.equal(second[:14], first[2:])
    assert not torch.equal(second[14:], first[:2])


def test_the_pool_of_the_anchor_is_carried_over():
    method = tiny.unidad(anchor_weight=1.0, anchor="teacher", anchor_pool=8, anchor_steps=1)
    method.student_loss(torch.empty(0, *tiny.SHAPE))
    carried = method.carried()
    other = tiny.unidad(anchor_weight=1.0, anchor="teacher", anchor_pool=8, anchor_steps=1)
    other.restore(carried)
    assert other._pool.age == 1
    assert len(other._fresh) == 1
    assert [torch.equal(x, y) for x, y in zip(carried, other.carried(), strict=True)] == [True] * 3
    for left in ([], [*carried[:-2], carried[-2][:, 0], carried[-1]]):  # none, and one of an earlier form: [size, K + 1, C, H, W]
        other.restore(left)
        assert other._pool.kept is None
    assert len(other._fresh) == 1


def test_without_an_anchor_the_student_looks_at_no_picture():
    assert not tiny.phase(tiny.unidad(), "student").needs_data


# -- what the target teacher has learnt, handed to the student --------------------------------------------------------


def test_transfer_adds_the_change_of_weights_once():
    """student + share * (target - origin), weight by weight; a second call, as after resuming there, changes nothing more."""
    method = tiny.unidad(warmup=3, target_cycles=3, transfer=0.5)
    before, target, origin = tiny.backbone(1).state_dict(), method.target_teacher.state_dict(), tiny.backbone(6).state_dict()
    assert method.start_cycle(0) == method.start_cycle(2) == ()
    assert all(torch.equal(value, before[key]) for key, value in method.student.state_dict().items())
    for _ in range(2):
        assert method.start_cycle(3) == ("student", "fake_teacher")
        for key, value in method.student.state_dict().items():
            torch.testing.assert_close(value, before[key] + 0.5 * (target[key] - origin[key]))
    assert all(torch.equal(value, target[key]) for key, value in method.fake_teacher.state_dict().items())
    assert method.start_cycle(4) == ()


def test_transfer_of_everything_to_the_source_itself_is_the_target_teacher():
    method = tiny.unidad(warmup=1, transfer=1.0)
    method.student.load_state_dict(tiny.backbone(6).state_dict())
    method.start_cycle(1)
    target = method.target_teacher.state_dict()
    for key, value in method.student.state_dict().items():
        torch.testing.assert_close(value, target[key], atol=1e-6, rtol=1e-5)
