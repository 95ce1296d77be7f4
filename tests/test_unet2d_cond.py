from __future__ import annotations

import pytest
import sd
import torch

from unidad.backbones.base import GRANULARITIES, Guided, guided
from unidad.noise import to_x0

T = torch.tensor([3, 500])
LABELS = torch.tensor([0, 1])
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_is_the_unets_output_under_the_prompts_of_the_rows(kind):
    net = sd.backbone(kind=kind)
    with torch.no_grad():
        raw = net.unet(X, T, encoder_hidden_states=net.prompts[[0, 1]]).sample
        assert torch.equal(net.x0(X, T, LABELS), to_x0(raw, X, *net.schedule.alpha_sigma(T), kind))
        assert not torch.equal(net.x0(X, T, LABELS), net.x0(X, T, LABELS.flip(0)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_alone_gives_the_features_of_a_full_forward(granularity, layers):
    net = sd.backbone(layers=layers)
    alone = net.features(X, T, LABELS, granularity)
    xhat, full = net.x0_and_features(X, T, LABELS, granularity)
    assert all(torch.equal(u, v) for u, v in zip(alone, full, strict=True))
    assert [f.shape[1] for f in alone] == net.feature_channels(granularity)
    assert torch.equal(xhat, net.x0(X, T, LABELS))


def test_a_table_is_a_role_s_own_and_no_part_of_a_checkpoint():
    net = sd.backbone()
    assert not any("prompts" in key for key in net.state_dict())
    before = net.x0(X, T, LABELS)
    net.set_prompts(torch.cat([net.prompts[[1, 0]], net.prompts[2:]]))
    assert torch.allclose(net.x0(X, T, LABELS.flip(0)), before)
    assert net.num_classes == 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_is_what_a_pipeline_does_to_the_output(kind):
    """diffusers guides the raw output; we guide x0, in one call of twice the batch."""
    net = sd.backbone(kind=kind)
    calls: list[int] = []
    net.unet.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        ours = Guided(net, 7.5).x0(X, T, LABELS)
        assert calls == [4]
        told = net.unet(X, T, encoder_hidden_states=net.prompts[[0, 1]]).sample
        untold = net.unet(X, T, encoder_hidden_states=net.prompts[[2, 2]]).sample
        theirs = to_x0(untold + 7.5 * (told - untold), X, *net.schedule.alpha_sigma(T), kind)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert guided(net, 1.0) is net


def test_labels_are_needed():
    with pytest.raises(ValueError, match="prompts"):
        sd.backbone().x0(X, T)
