import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from unidad.backbones.load import load_model
from unidad.data import to_uint8
from unidad.rollout import batch_noise, ddim, ddim_states, ddim_trajectory, rollout, seeded_noise


def noises(n: int, k: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(n, *tiny.SHAPE, generator=g) for _ in range(k)]


def feed(tensors: list[torch.Tensor]):
    left = iter(tensors)
    return lambda: next(left)


def plain_loop(net, steps, eps, detach=False):
    x = eps[0]
    for i, tau in enumerate(steps):
        t = torch.full((len(x),), tau)
        xhat = net.x0(x, t)
        if i + 1 == len(steps):
            return xhat
        bar = net.schedule.alphas_cumprod[steps[i + 1]]
        x = bar.sqrt() * (xhat.detach() if detach else xhat) + (1 - bar).sqrt() * eps[i + 1]
    raise AssertionError


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@torch.no_grad()
def test_equals_a_plain_loop(net_v, k):
    steps, eps = net_v.schedule.student_steps(k), noises(2, k)
    assert torch.equal(rollout(net_v, feed(eps), steps), plain_loop(net_v, steps, eps))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_equals_stock_lcm_scheduler(k, kind):
    """DESIGN.md's recipe, stepped with the same per-picture generators: equal to the last bit."""
    net, seeds = tiny.backbone(0, kind), [11, 12, 13]
    teacher = DDPMScheduler(beta_schedule="linear" if kind == "epsilon" else "squaredcos_cap_v2", prediction_type=kind)
    stock = LCMScheduler.from_config(
        {key: teacher.config[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")},
        original_inference_steps=k,
        timestep_scaling=1e6,
        clip_sample=False,
        thresholding=False,
        steps_offset=1,
    )
    assert torch.equal(stock.alphas_cumprod, net.schedule.alphas_cumprod)
    stock.set_timesteps(k)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    x = torch.cat([torch.randn(1, *tiny.SHAPE, generator=g) for g in generators])
    for t in stock.timesteps:
        x = stock.step(net.unet(x, t).sample, t, x, generator=generators).prev_sample
    assert torch.equal(rollout(net, seeded_noise(seeds, tiny.SHAPE), net.schedule.student_steps(k)), x)


@torch.no_grad()
def test_stop_after_runs_the_first_steps_only(net_v):
    steps, eps = net_v.schedule.student_steps(3), noises(2, 3)
    for stop in (1, 2, 3):
        drawn = []

        def noise(drawn=drawn):
            drawn.append(1)
            return eps[len(drawn) - 1]

        assert torch.equal(rollout(net_v, noise, steps, stop_after=stop), plain_loop(net_v, steps[:stop], eps))
        assert len(drawn) == stop  # no number is drawn and thrown away


@pytest.mark.parametrize(("grad", "detach"), [("all", False), ("last", True)])
def test_which_steps_are_in_the_graph(grad, detach):
    net = tiny.backbone(0)
    steps, eps = net.schedule.student_steps(2), noises(2, 2)

    def gradients(x):
        net.zero_grad()
        x.square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    ours = gradients(rollout(net, feed(eps), steps, grad=grad))
    wanted = gradients(plain_loop(net, steps, eps, detach=detach))
    other = gradients(plain_loop(net, steps, eps, detach=not detach))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(ours, wanted, strict=True))
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-6) for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("grad", ["all", "last"])
def test_every_weight_has_a_gradient_in_bf16(net_v, grad):
    """torch 2.10 keeps the weights that a step without a graph cast, and gives the next step those."""
    net_v.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rollout(net_v, feed(noises(2, 3)), [998, 665, 332], grad=grad).float().square().mean().backward()
    assert [name for name, weight in net_v.named_parameters() if weight.grad is None] == []


def test_no_graph_where_gradients_are_off(net_v):
    with torch.no_grad():
        assert not rollout(net_v, feed(noises(1, 2)), [999, 499]).requires_grad


def test_seeded_noise_does_not_depend_on_the_batch():
    shape = (2, 3, 3)
    whole, parts = seeded_noise([4, 5, 6], shape), [seeded_noise([4], shape), seeded_noise([5, 6], shape)]
    for _ in range(3):
        assert torch.equal(whole(), torch.cat([p() for p in parts]))
    again, first = seeded_noise([4], shape), torch.randn(shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(again()[0], first)
    assert not torch.equal(again()[0], first)  # fresh numbers at every call


def test_batch_noise_is_fresh_and_reproducible():
    a, b = (batch_noise((2, 1, 2, 2), torch.Generator().manual_seed(3)) for _ in range(2))
    one, two = a(), a()
    assert torch.equal(one, b())
    assert not torch.equal(one, two)


@torch.no_grad()
def test_ddim_of_a_gaussian_keeps_its_quantiles():
    """The probability-flow ODE of N(m, s) data maps z to m + s z; DDIM with many steps comes close to it."""
    net = tiny.GaussianBackbone(0.4, 0.3)
    z = torch.randn(4, *net.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ddim(net, z, 250, clip=False), 0.4 + 0.3 * z, atol=0.02)


@torch.no_grad()
def test_ddim_equals_diffusers(net_v):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler.from_config(
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").config,
        timestep_spacing="trailing",
        clip_sample=True,
    )
    stock.set_timesteps(5)
    x = z = noises(1, 1)[0]
    for t in stock.timesteps:
        x = stock.step(net_v.unet(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    assert torch.allclose(ddim(net_v, z, 5), x, atol=1e-2)


@torch.no_grad()
def test_the_bundled_student_draws_plain_backgrounds_at_the_steps_it_names():
    """A few-step student knows its own timesteps only: named eight steps away from where it was trained, this one left twice the grain."""
    model = load_model("bundled:avatars-3step")
    drawn = rollout(model.backbone.eval(), seeded_noise(range(8), model.backbone.shape), model.student_steps)
    corners = to_uint8(drawn)[:, :, :5, :5].float()
    assert float(corners.flatten(2).std(2).mean()) < 1.2, "levels of 255"
    assert float(corners.mean(dim=(2, 3)).std(0).mean()) > 10, "backgrounds of several colours"


def test_a_trajectory_is_kept_at_the_start_of_each_span_however_dense_it_is():
    """With more evaluations than there are timesteps some come twice."""
    model = tiny.backbone(1)
    noise = torch.randn(2, *tiny.SHAPE, generator=torch.Generator().manual_seed(0))
    dense = ddim_trajectory(model, noise, [999, 20, 10], [4, 32, 32])
    assert dense.shape == (2, 4, *tiny.SHAPE)
    assert torch.equal(dense[:, 0], noise)
    path = [999, 754, 510, 265, 20]
    assert torch.equal(dense[:, 1], [x for x, _ in ddim_states(model, noise, path, order=2)][-1])
    assert dense.isfinite().all()


@torch.no_grad()
def test_the_second_order_equals_stock_dpm_solver(net_v):
    """DPM-Solver++(2M) as diffusers has it, at the same timesteps."""
    stock = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    path = [998, 887, 776, 665, 400, 187, 55, 14]
    stock.set_timesteps(timesteps=path)
    x = noise = noises(2, 1)[0]
    for t in stock.timesteps:
        x = stock.step(net_v.unet(x, t).sample, t, x).prev_sample
    for _, xhat in ddim_states(net_v, noise, path, clip=False, order=2):
        end = xhat
    assert torch.allclose(end, x, atol=2e-5)
    assert not torch.allclose(end, list(ddim_states(net_v, noise, path, clip=False))[-1][1], atol=2e-3)


@torch.no_grad()
def test_the_second_order_is_nearer_to_the_ode():
    """Of normal data both the best prediction and the ODE are known: every quantile stays where it is."""
    mean, spread, schedule = 0.3, 0.2, tiny.cosine()

    class Normal:
        bounded = False

        def x0(self, x, t, labels=None):
            alpha, sigma = self.schedule.alpha_sigma(t, x.ndim)
            return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)

    model = Normal()
    model.schedule = schedule
    z = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    alpha, sigma = schedule.alpha_sigma(torch.full((9,), 998), 4)
    start = alpha * mean + (alpha**2 * spread**2 + sigma**2).sqrt() * z
    path = [998, 887, 776, 665, 512, 360, 207, 55, 30, 14, 3, 1]
    miss = {}
    for order in (1, 2):
        for _, xhat in ddim_states(model, start, path, order=order):
            end = xhat
        miss[order] = float((end - (mean + spread * z)).abs().max())
    assert miss[2] < miss[1] / 3
