import math

import pytest
import tiny
import torch

from unidad.losses import (
    AGGREGATIONS,
    GAN_LOSSES,
    denoising_loss,
    dmd_gradient,
    dmd_loss,
    dual_domain_gradient,
    gan_discriminator_loss,
    gan_generator_loss,
    gradient_penalty,
)
from unidad.noise import from_x0


def gaussian(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# -- DMD, METHOD §4 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [20, 300, 700])
def test_gradient_of_gaussians_in_closed_form(t):
    """With exact denoisers, xhat_fk - xhat_d = sigma^2 / alpha (score_fk - score_d): Tweedie's formula, written out by scores."""
    m1, s1, m2, s2 = 0.7, 0.5, -0.4, 1.3
    schedule, x, eps = tiny.cosine(), 0.7 + 0.5 * gaussian(), gaussian(seed=1)
    steps = torch.full((5,), t)
    x_t = schedule.add_noise(x, eps, steps)
    fake = tiny.GaussianBackbone(m1, s1).x0(x_t, steps)
    teacher = tiny.GaussianBackbone(m2, s2).x0(x_t, steps)
    alpha, sigma = (v[0].item() for v in schedule.alpha_sigma(steps))
    score1 = -(x_t - alpha * m1) / (alpha**2 * s1**2 + sigma**2)
    score2 = -(x_t - alpha * m2) / (alpha**2 * s2**2 + sigma**2)
    xhat2 = (x_t + sigma**2 * score2) / alpha
    normaliser = (x - xhat2).abs().mean(dim=(1, 2, 3), keepdim=True)
    wanted = sigma**2 / alpha * (score1 - score2) / normaliser
    assert torch.allclose(dmd_gradient(x, fake, teacher), wanted, rtol=1e-3, atol=1e-4)


def test_gradient_of_equal_variances_is_a_constant_shift():
    """N(m1, 1) against N(m2, 1) under a variance-preserving schedule: xhat_fk - xhat_d = (m1 - m2) sigma^2 everywhere."""
    m1, m2, x = 0.5, -0.3, gaussian() + 0.5
    schedule, t = tiny.cosine(), torch.full((5,), 600)
    x_t = schedule.add_noise(x, gaussian(seed=1), t)
    _, sigma = schedule.alpha_sigma(t)
    teacher = tiny.GaussianBackbone(m2, 1.0).x0(x_t, t)
    g = dmd_gradient(x, tiny.GaussianBackbone(m1, 1.0).x0(x_t, t), teacher)
    wanted = (m1 - m2) * sigma**2 / (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(g, wanted.expand_as(g), rtol=1e-4)
    assert bool(((x - g).mean() - x.mean()) * (m2 - m1) > 0)  # going down the gradient leads towards the teacher


def test_autograd_gives_g_over_numel():
    x = gaussian().requires_grad_()
    g = gaussian(seed=3)
    dmd_loss(x, g).backward()
    assert torch.allclose(x.grad, g / x.numel(), atol=1e-8)


def test_loss_value_is_half_the_mean_square_of_g():
    g = gaussian(seed=3)
    assert dmd_loss(gaussian(), g).item() == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-5)


def test_zero_when_fake_equals_teacher():
    x, xhat = gaussian(), gaussian(seed=1)
    assert torch.equal(dmd_gradient(x, xhat, xhat), torch.zeros_like(x))
    assert dmd_loss(x, dmd_gradient(x, xhat, xhat)).item() == 0.0


def test_gradient_is_detached_and_float32():
    x = gaussian().bfloat16().requires_grad_()
    g = dmd_gradient(x, x * 2, x * 3)
    assert g.dtype == torch.float32
    assert not g.requires_grad


def test_normaliser_is_per_sample():
    x, fake, teacher = gaussian(6), gaussian(6, 1), gaussian(6, 2)
    scale = torch.tensor([1, 10, 100, 1, 2, 3.0]).view(-1, 1, 1, 1)
    x, fake, teacher = x * scale, fake * scale, teacher * scale
    whole = dmd_gradient(x, fake, teacher)
    parts = [dmd_gradient(x[i : i + 2], fake[i : i + 2], teacher[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.allclose(whole, dmd_gradient(x / scale, fake / scale, teacher / scale), rtol=1e-4)  # invariant to scale


def test_non_finite_predictions_give_zero():
    x, fake, teacher = gaussian(3), gaussian(3, 1), gaussian(3, 2)
    clean = dmd_gradient(x, fake, teacher)
    fake[0, 0, 0, 0], teacher[1, 0, 0, 0] = math.nan, math.inf
    g = dmd_gradient(x, fake, teacher)
    assert g.isfinite().all()
    assert g[0, 0, 0, 0] == 0
    assert torch.equal(g[1], torch.zeros_like(g[1]))  # its normaliser is infinite or not a number
    assert torch.equal(g[2], clean[2])


def test_perfect_teacher_does_not_divide_by_zero():
    x = gaussian(1)
    g = dmd_gradient(x, x + 1, x.clone())
    assert torch.allclose(g, torch.full_like(g, 1e8), rtol=1e-5)


def test_dual_mixing_is_linear_in_a():
    x, fake, src, trg = (gaussian(seed=s) for s in range(4))
    ends = dual_domain_gradient(x, fake, src, None, 0.0), dual_domain_gradient(x, fake, None, trg, 1.0)
    assert torch.equal(ends[0], dmd_gradient(x, fake, src))
    assert torch.equal(ends[1], dmd_gradient(x, fake, trg))
    for a in (0.25, 0.5, 0.75):
        mixed = dual_domain_gradient(x, fake, src, trg, a)
        assert torch.allclose(mixed, (1 - a) * ends[0] + a * ends[1], atol=1e-6)


@pytest.mark.parametrize("a", [-0.01, 1.01, 2.0, math.nan])
def test_a_outside_its_range(a):
    x = gaussian(1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        dual_domain_gradient(x, x, x, x, a)


@pytest.mark.parametrize(("source", "target", "missing"), [(True, False, "target"), (False, True, "source")])
def test_a_teacher_with_a_weight_is_needed(source, target, missing):
    x = gaussian(1)
    with pytest.raises(ValueError, match=missing):
        dual_domain_gradient(x, x, x if source else None, x if target else None, 0.5)


# -- denoising, METHOD §6 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "output"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_denoising_is_the_mse_of_the_output(kind, output):
    schedule, x, eps = tiny.cosine(), gaussian(), gaussian(seed=1)
    t = torch.tensor([50, 200, 400, 600, 900])
    alpha, sigma = schedule.alpha_sigma(t)
    x_t, xhat = schedule.add_noise(x, eps, t), x + 0.3 * gaussian(seed=2)
    truth = eps if kind == "epsilon" else alpha * eps - sigma * x
    by_hand = ((from_x0(xhat, x_t, alpha, sigma, output) - truth) ** 2).mean()
    assert denoising_loss(x, xhat, alpha, sigma, kind).item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_edm_weighting():
    x, alpha, sigma = torch.zeros(1, 1, 1, 1), torch.tensor(0.6), torch.tensor(0.8)
    # s = 4/3: 9/16 + 1/0.5^2 = 4.5625, times a squared error of 4
    assert denoising_loss(x, x + 2, alpha, sigma, "edm").item() == pytest.approx(4 * 4.5625, rel=1e-6)
    assert denoising_loss(x, x + 2, alpha, sigma, "edm", sigma_data=1.0).item() == pytest.approx(4 * 1.5625, rel=1e-6)


def test_huber_counts_large_errors_by_their_size_and_small_ones_by_their_square():
    """sqrt(e + c^2) - c of the v-error: slope e / sqrt(e^2 + c^2) in v, e^2 / 2c for small e; the median, not the mean, is its minimum."""
    clean, alpha, sigma = torch.zeros(1, 1, 1, 2), torch.tensor(0.6), torch.tensor(0.8)
    xhat = torch.tensor([[[[4.0, 0.001]]]], requires_grad=True)
    loss = denoising_loss(clean, xhat, alpha, sigma, "v", huber=0.1)
    v = xhat.detach() / 0.8  # (alpha / sigma)^2 + 1 = 1 / sigma^2
    assert loss.item() == pytest.approx((((v**2 + 0.01).sqrt() - 0.1).mean()).item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(xhat.grad, v / (v**2 + 0.01).sqrt() / 0.8 / 2)
    guess = torch.tensor(0.7, requires_grad=True)
    for kind, best in ((0.0, 1 / 3), (0.01, 0.0)):  # of 0, 0 and 1
        xs = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1, 1)
        optimizer = torch.optim.Adam([guess], lr=0.01)
        for _ in range(400):
            optimizer.zero_grad()
            denoising_loss(xs, guess.expand_as(xs), alpha, sigma, "v", huber=kind).backward()
            optimizer.step()
        assert guess.item() == pytest.approx(best, abs=0.03)


def test_unknown_losses_are_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="denoising"):
        denoising_loss(x, x, x + 1, x + 1, "eps")
    for call in (lambda: gan_generator_loss(x[0, 0], "bc"), lambda: gan_discriminator_loss(x[0, 0], x[0, 0], "bc")):
        with pytest.raises(ValueError, match="GAN loss"):
            call()
    with pytest.raises(ValueError, match="aggregation"):
        gan_generator_loss(x[0, 0], "bce", "sum")


# -- GAN, METHOD §5 ---------------------------------------------------------------------------------------------------

REAL, FAKE = [[0.5, -1.0, 2.0], [0.0, 3.0, -0.5]], [[-0.5, 0.25, 1.5], [2.0, -2.0, 0.0]]


def by_hand(kind: str, aggregation: str) -> tuple[float, float]:
    """(generator loss, discriminator loss) from Python floats alone."""
    rows = {}
    for name, logits in (("real", REAL), ("fake", FAKE)):
        rows[name] = [z for row in logits for z in row] if aggregation == "per_head" else [sum(row) / 3 for row in logits]
    terms = {
        "bce": (lambda f: -math.log(sigmoid(f)), lambda r: -math.log(sigmoid(r)), lambda f: -math.log(1 - sigmoid(f))),
        "hinge": (lambda f: -f, lambda r: max(0, 1 - r), lambda f: max(0, 1 + f)),
        "lsgan": (lambda f: (f - 1) ** 2, lambda r: (r - 1) ** 2, lambda f: f**2),
        "wgan-gp": (lambda f: -f, lambda r: -r, lambda f: f),
    }
    g, d_real, d_fake = terms[kind]
    mean = {
        name: sum(map(f, rows[side])) / len(rows[side])
        for name, f, side in (("g", g, "fake"), ("dr", d_real, "real"), ("df", d_fake, "fake"))
    }
    return mean["g"], mean["dr"] + mean["df"]


@pytest.mark.parametrize("kind", GAN_LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gan_losses_at_hand_computed_values(kind, aggregation):
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    g, d = by_hand(kind, aggregation)
    assert gan_generator_loss(fake, kind, aggregation).item() == pytest.approx(g, rel=1e-5)
    assert gan_discriminator_loss(real, fake, kind, aggregation).item() == pytest.approx(d, rel=1e-5)


def test_a_blind_discriminator_costs_two_log_two():
    zero = torch.zeros(4, 3)
    assert gan_discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert gan_generator_loss(zero).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_number_of_heads_does_not_change_the_scale(aggregation):
    one = torch.tensor([[0.3], [-0.8]])
    assert gan_generator_loss(one.repeat(1, 7), "bce", aggregation).item() == pytest.approx(
        gan_generator_loss(one).item(), rel=1e-6
    )


@pytest.mark.parametrize("kind", GAN_LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_signs(kind, aggregation):
    """The generator pushes logits of its samples up; the discriminator pushes real ones up and fake ones down."""
    real, fake = torch.full((2, 3), 0.2).requires_grad_(), torch.full((2, 3), 0.1).requires_grad_()
    gan_discriminator_loss(real, fake, kind, aggregation).backward()
    assert bool((real.grad < 0).all())
    assert bool((fake.grad > 0).all())
    fake.grad = None
    gan_generator_loss(fake, kind, aggregation).backward()
    assert bool((fake.grad < 0).all())


def test_bce_is_stable_for_large_logits():
    far = torch.tensor([[-200.0, 200.0]])
    assert gan_generator_loss(far).item() == pytest.approx(100.0)
    assert gan_discriminator_loss(far, far).item() == pytest.approx(200.0)


def test_gradient_penalty_of_a_linear_critic():
    """logit_b = <w_b, x>: the penalty is mean_b (||w_b|| - 1)^2, whatever x is; here (5 - 1)^2 and (0.5 - 1)^2."""
    w = torch.zeros(2, 1, 2, 2)
    w[0, 0, 0, 0], w[0, 0, 1, 1], w[1, 0, 0, 1] = 3.0, 4.0, 0.5
    w.requires_grad_()
    x = torch.randn(5, 1, 2, 2).requires_grad_()
    penalty = gradient_penalty(torch.einsum("bchw,kchw->bk", x, w), x)
    assert penalty.item() == pytest.approx((16 + 0.25) / 2, rel=1e-5)
    penalty.backward()  # d/dw_b = 2 (||w_b|| - 1) w_b / ||w_b|| / heads
    assert torch.allclose(w.grad[0], 4.0 * w[0].detach() / 5.0)
    assert torch.allclose(w.grad[1], -0.5 * w[1].detach() / 0.5)
