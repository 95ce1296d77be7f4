import math

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, LCMScheduler

from unidad.noise import PREDICTION_TYPES, NoiseSchedule, from_x0, to_x0

SCHEDULES = {"cosine": tiny.cosine, "linear": tiny.linear}


def sample(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 4, generator=g), torch.randn(n, 3, 4, 4, generator=g)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trip(kind, name):
    schedule = SCHEDULES[name]()
    x, eps = sample()
    t = torch.tensor([10, 100, 300, 500, 700, 900])
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = schedule.add_noise(x, eps, t)
    output = from_x0(x, x_t, alpha, sigma, kind)
    assert torch.allclose(to_x0(output, x_t, alpha, sigma, kind), x, atol=2e-3 if name == "linear" else 2e-4)
    other = torch.randn_like(x)  # also for a wrong prediction, and the other way round
    again = from_x0(to_x0(other, x_t, alpha, sigma, kind), x_t, alpha, sigma, kind)
    assert torch.allclose(again, other, atol=1e-3)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_outputs_by_definition(kind):
    x, eps = sample()
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    wanted = {"epsilon": eps, "v_prediction": 0.8 * eps - 0.6 * x, "sample": x, "flow": eps - x}[kind]
    assert torch.allclose(from_x0(x, alpha * x + sigma * eps, alpha, sigma, kind), wanted, atol=1e-5)


def test_flow_matching_path():
    """METHOD §2: on x_t = (1-t) x + t eps the x0-prediction is x_t - t u, also for a wrong u."""
    x, eps = sample()
    t, u = torch.tensor(0.3), torch.randn_like(x)
    x_t = (1 - t) * x + t * eps
    assert torch.allclose(to_x0(u, x_t, 1 - t, t, "flow"), x_t - t * u, atol=1e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_agrees_with_diffusers(beta_schedule):
    theirs = DDPMScheduler(beta_schedule=beta_schedule)
    ours = NoiseSchedule(theirs.alphas_cumprod)
    x, eps = sample()
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    assert torch.equal(ours.add_noise(x, eps, t), theirs.add_noise(x, eps, t))
    alpha, sigma = ours.alpha_sigma(t)
    v = from_x0(x, ours.add_noise(x, eps, t), alpha, sigma, "v_prediction")
    late = t >= 250  # at t = 0 the division by a tiny sigma costs digits
    assert torch.allclose(v[late], theirs.get_velocity(x, eps, t)[late], atol=1e-5)
    assert torch.allclose(NoiseSchedule.from_betas(theirs.betas).alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_preserving_and_monotone(name):
    schedule = SCHEDULES[name]()
    alpha, sigma = schedule.alpha_sigma(torch.arange(len(schedule)), ndim=1)
    assert len(schedule) == 1000
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000))
    assert bool((schedule.scales().diff() > 0).all())
    assert torch.equal(schedule.nearest_timestep(schedule.scales()), torch.arange(1000))


def test_alpha_sigma_shape():
    alpha, sigma = tiny.linear().alpha_sigma(torch.tensor([1, 2]), ndim=3)
    assert alpha.shape == sigma.shape == (2, 1, 1)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_lcm_grid_is_diffusers_own(k):
    stock = LCMScheduler(original_inference_steps=k)
    stock.set_timesteps(k)
    assert tiny.linear().student_steps(k) == stock.timesteps.tolist()


def test_grids_of_the_paper():
    schedule = tiny.linear()
    assert schedule.student_steps(1) == [999]
    assert schedule.student_steps(3, "lcm") == [998, 665, 332]
    assert schedule.student_steps(4, "lcm") == [999, 749, 499, 249]
    assert schedule.student_steps(3, "edm") == [930, 604, 144]
    assert schedule.student_steps(1, "edm") == [930]


def test_edm_grid_snaps_to_the_nearest_in_log():
    schedule = tiny.linear()
    for s, t in zip([80.0, math.sqrt(40.0), 0.5], schedule.student_steps(3, "edm"), strict=True):
        gaps = [abs(math.log(float(schedule.scales()[u])) - math.log(s)) for u in range(1000)]
        assert gaps.index(min(gaps)) == t


def test_the_fine_grid_ends_at_little_noise():
    for schedule in (tiny.linear(), tiny.cosine()):
        *others, last = schedule.student_steps(3, "fine")
        assert others == [998, 665]
        assert float(schedule.scales()[last]) == pytest.approx(0.1, rel=0.02)
        assert schedule.student_steps(1, "fine") == [999]
        for k, first in ((4, [998, 665]), (5, [999, 749, 499])):
            steps = schedule.student_steps(k, "fine")
            assert steps[:-2] == first
            assert schedule.scales()[steps[-2:]].tolist() == pytest.approx([0.427, 0.0755], rel=0.05)
    assert tiny.cosine().student_steps(4, "fine") == [998, 665, 250, 40]
    with pytest.raises(ValueError, match=r"no timesteps with s = 0[.]1 below 1"):
        NoiseSchedule(torch.tensor([0.9999, 0.999, 0.995])).student_steps(3, "fine")
    with pytest.raises(ValueError, match=r"no timesteps with s = 0[.]427 and 0[.]0755 below 1"):
        NoiseSchedule(torch.tensor([0.9999, 0.999, 0.995, 0.99])).student_steps(4, "fine")


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_number_of_steps_is_checked(k):
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        tiny.linear().student_steps(k)


def test_unknown_names_are_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="student grid"):
        tiny.linear().student_steps(3, "ddim")
    with pytest.raises(ValueError, match="prediction type"):
        to_x0(x, x, x, x, "noise")
    with pytest.raises(ValueError, match="prediction type"):
        from_x0(x, x, x + 1, x + 1, "noise")


def test_a_schedule_too_coarse_for_edm_steps():
    coarse = NoiseSchedule(torch.tensor([0.9, 0.5, 0.1]))
    with pytest.raises(ValueError, match="no 3 different timesteps"):
        coarse.student_steps(3, "edm")


@pytest.mark.parametrize("bar", [[0.5, 0.9], [1.0, 0.5], [0.5, 0.0], [0.5], [[0.9, 0.5]], [0.9, float("nan")]])
def test_bad_schedules_are_refused(bar):
    with pytest.raises(ValueError, match="falling"):
        NoiseSchedule(torch.tensor(bar))


def test_uniform_law_covers_its_range_and_no_more(generator):
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 50))
    assert schedule.uniform(5000, generator).unique().tolist() == list(range(50))
    assert schedule.uniform(5000, generator, 0.02, 0.98).unique().tolist() == list(range(1, 50))
    t = tiny.linear().uniform(20000, generator, 0.02, 0.98)
    assert 20 <= int(t.min()) <= 25
    assert 974 <= int(t.max()) <= 980
    assert t.dtype == torch.int64


def test_laws_depend_on_the_generator_alone():
    schedule = tiny.linear()
    for law in (schedule.uniform, schedule.karras):
        draws = [law(64, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_karras_law(generator):
    schedule = tiny.linear()
    t = schedule.karras(20000, generator)
    assert 0 <= int(t.min()) <= 2
    assert int(t.max()) == schedule.student_steps(1, "edm")[0]  # s = 80
    # Half of the grid lies below s = ((80^(1/7) + 0.002^(1/7)) / 2)^7 = 2.51...
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    below = (schedule.scales()[t] < middle).float().mean()
    assert below == pytest.approx(0.5, abs=0.02)


def test_quadratic_timesteps_lie_where_the_law_says():
    """t / high = u^2: a quarter of the range holds half of the draws, and u's quartiles are the square roots of t's."""
    t = tiny.cosine().quadratic(20_000, torch.Generator().manual_seed(0)).double() / 980
    quarters = t.sqrt().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert torch.allclose(quarters, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), atol=0.02)
    assert 0 <= float(t.min()) < 0.001
    assert 0.99 < float(t.max()) < 1


def test_an_unknown_timestep_law_is_named():
    with pytest.raises(ValueError, match="one of uniform, karras, quadratic, not 'cubic'"):
        tiny.cosine().draw_timesteps("cubic", 2, torch.Generator())
