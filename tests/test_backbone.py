import pytest
import tiny
import torch
from diffusers import UNet2DModel

from unidad.backbones.base import GRANULARITIES
from unidad.backbones.unet2d import UNet2DBackbone, random_unet
from unidad.noise import to_x0

T = torch.tensor([3, 500])


@pytest.fixture
def x_t() -> torch.Tensor:
    return torch.randn(2, *tiny.SHAPE, generator=torch.Generator().manual_seed(0))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_alone_gives_the_features_of_a_full_forward(granularity, layers, x_t):
    net = tiny.backbone(0, widths=(16, 32, 32), layers_per_block=layers)
    alone = net.features(x_t, T, granularity=granularity)
    _, full = net.x0_and_features(x_t, T, granularity=granularity)
    assert same(alone, full)
    assert [f.shape[1] for f in alone] == net.feature_channels(granularity)
    assert len(alone) == (4 if granularity == "stage" else 1 + 3 * layers + 2 + 1)


def test_features_are_what_the_blocks_return(net_v, x_t):
    """Independent of the hooks: the encoder written out with diffusers' own parts."""
    unet = net_v.unet
    emb = unet.time_embedding(unet.time_proj(T))
    sample = unet.conv_in(x_t)
    stages, layers = [], [sample]
    for block in unet.down_blocks:
        sample, outputs = block(sample, emb)
        stages.append(sample)
        layers += outputs
    mid = unet.mid_block(sample, emb)
    assert same(net_v.features(x_t, T, granularity="stage"), [*stages, mid])
    assert same(net_v.features(x_t, T, granularity="layer"), [*layers, mid])


def test_decoder_is_not_run_for_features(net_v, x_t):
    counts = {"up": 0, "down": 0, "out": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for block in net_v.unet.up_blocks:
        block.register_forward_pre_hook(count("up"))
    net_v.unet.conv_out.register_forward_pre_hook(count("out"))
    net_v.unet.conv_norm_out.register_forward_pre_hook(count("out"))
    net_v.unet.down_blocks[0].register_forward_pre_hook(count("down"))
    net_v.features(x_t, T)
    assert counts == {"up": 0, "down": 1, "out": 0}
    net_v.x0_and_features(x_t, T)
    assert counts == {"up": 3, "down": 2, "out": 2}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_hooks_are_left_behind(net_v, x_t, granularity):
    net_v.features(x_t, T, granularity=granularity)
    net_v.x0_and_features(x_t, T, granularity=granularity)
    with pytest.raises(RuntimeError):
        net_v.features(x_t[:, :2], T, granularity=granularity)  # an error inside must not leave hooks either
    assert all(not m._forward_hooks for m in net_v.modules())
    assert len(net_v.features(x_t, T)) == 4


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_x0_is_the_same_from_either_call(net_v, net_eps, x_t, granularity):
    for net in (net_v, net_eps):
        assert torch.equal(net.x0(x_t, T), net.x0_and_features(x_t, T, granularity=granularity)[0])


def test_x0_translates_the_raw_output(net_v, net_eps, x_t):
    for net, kind in ((net_v, "v_prediction"), (net_eps, "epsilon")):
        alpha, sigma = net.schedule.alpha_sigma(T)
        raw = net.unet(x_t, T).sample
        assert torch.equal(net.x0(x_t, T), to_x0(raw, x_t, alpha, sigma, kind))


def test_gradients_reach_input_and_encoder_but_not_the_decoder(net_v, x_t):
    x_t.requires_grad_()
    sum(f.square().mean() for f in net_v.features(x_t, T)).backward()
    assert float(x_t.grad.abs().sum()) > 0
    assert net_v.unet.conv_in.weight.grad is not None
    assert all(p.grad is None for p in net_v.unet.up_blocks.parameters())


def test_class_conditional(x_t):
    net = tiny.backbone(0, num_class_embeds=5)
    zero, one = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    assert net.num_classes == 5
    assert not torch.equal(net.x0(x_t, T, zero), net.x0(x_t, T, one))
    assert same(net.features(x_t, T, one), net.x0_and_features(x_t, T, one)[1])
    assert not same(net.features(x_t, T, one), net.features(x_t, T, zero))
    assert tiny.backbone(0).num_classes is None


def test_learned_sigma_is_sliced_off(x_t):
    unet = random_unet(tiny.SHAPE, (8, 16), 0)
    wide = UNet2DModel.from_config({**unet.config, "out_channels": 6}).eval()
    net = UNet2DBackbone(wide, tiny.linear(), "epsilon")
    alpha, sigma = net.schedule.alpha_sigma(T)
    xhat = net.x0(x_t, T)
    assert net.shape == tiny.SHAPE
    assert xhat.shape == x_t.shape
    assert torch.equal(xhat, to_x0(wide(x_t, T).sample[:, :3], x_t, alpha, sigma, "epsilon"))
    assert torch.equal(xhat, net.x0_and_features(x_t, T)[0])


def test_random_unet_depends_on_its_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = random_unet(tiny.SHAPE, (8, 16), 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())  # and leaves the global generator alone
    torch.manual_seed(2)
    b, c = random_unet(tiny.SHAPE, (8, 16), 3).state_dict(), random_unet(tiny.SHAPE, (8, 16), 4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv_in.weight"], c["conv_in.weight"])


def test_prediction_does_not_depend_on_the_rest_of_the_batch(net_v, x_t):
    both, first = net_v.x0(x_t, T), net_v.x0(x_t[:1], T[:1])
    assert torch.allclose(both[:1], first, atol=1e-5)
