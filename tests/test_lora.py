from __future__ import annotations

import pytest
import sd
import torch

pytest.importorskip("peft")

from unidad.backbones.lora import LoraRole, _layers, only_adapter

T = torch.tensor([3, 500])
LABELS = torch.tensor([0, 1])
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
ROLES = ("student", "fake_teacher", "target_teacher", "source_teacher")


def roles() -> dict[str, LoraRole]:
    base = sd.backbone()
    return {name: LoraRole(base, name, 0 if name == "source_teacher" else 2, base.prompts) for name in ROLES}


def outputs(role: LoraRole) -> list[torch.Tensor]:
    with torch.no_grad():
        xhat, features = role.x0_and_features(X, T, LABELS, "layer")
        return [xhat, role.x0(X, T, LABELS), *features, *role.features(X, T, LABELS)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def shake(role: LoraRole) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_fresh_roles_are_the_base_to_the_bit():
    plain = sd.backbone()
    xhat, features = plain.x0_and_features(X, T, LABELS, "layer")
    expected = [xhat, xhat, *features, *plain.features(X, T, LABELS)]
    for role in roles().values():
        assert same(outputs(role), expected)


@pytest.mark.parametrize("changed", ["student", "fake_teacher", "target_teacher"])
def test_a_role_s_adapter_never_changes_another_s_output(changed: str):
    nets = roles()
    before = {name: outputs(role) for name, role in nets.items()}
    shake(nets[changed])
    for name, role in nets.items():
        assert same(outputs(role), before[name]) == (name != changed)
    assert same(outputs(nets["source_teacher"]), before["source_teacher"])


def test_nothing_is_active_outside_of_a_role_even_after_an_error():
    nets = roles()
    shake(nets["student"])
    unet = nets["student"].unet
    base = sd.backbone().unet(X, T, sd.backbone().prompts[LABELS]).sample

    def boom(*_: object) -> None:
        raise RuntimeError("in the middle")

    hook = unet.mid_block.register_forward_hook(boom)
    with pytest.raises(RuntimeError, match="in the middle"):
        nets["student"].x0(X, T, LABELS)
    hook.remove()
    assert torch.equal(unet(X, T, nets["student"].prompts[LABELS]).sample, base)
    layers = _layers(unet)
    with only_adapter(layers, ["student"]), only_adapter(layers, []):
        assert torch.equal(unet(X, T, nets["student"].prompts[LABELS]).sample, base)


def test_gradients_go_through_a_role_into_another_s_sample_and_stay_out_of_its_adapter():
    """The student's GAN step: its sample passes the fake teacher's encoder, whose adapter must learn nothing."""
    nets = roles()
    for role in nets.values():
        shake(role)
        role.requires_grad_(role.role == "student")
    features = nets["fake_teacher"].features(nets["student"].x0(X, T, LABELS), T, LABELS)
    sum(f.square().mean() for f in features).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in nets["student"].parameters())
    assert all(p.grad is None for name in ROLES if name != "student" for p in nets[name].parameters())
    assert all(p.grad is None for name, p in nets["student"].unet.named_parameters() if "lora" not in name)


def test_a_role_s_state_is_its_adapter_and_nothing_else():
    nets = roles()
    state = nets["student"].state_dict()
    assert 0 < sum(v.numel() for v in state.values()) < sum(v.numel() for v in sd.backbone().state_dict().values())
    assert nets["source_teacher"].state_dict() == {}
    shake(nets["student"])
    changed = outputs(nets["student"])
    other = roles()
    other["fake_teacher"].load_state_dict(nets["student"].state_dict(), strict=True)
    assert same(outputs(other["fake_teacher"]), changed)


def test_merging_gives_a_plain_network_that_predicts_the_same():
    nets = roles()
    shake(nets["student"])
    shake(nets["fake_teacher"])
    merged = nets["student"].merged()
    assert merged.state_dict().keys() == sd.backbone().state_dict().keys()
    with torch.no_grad():
        ours, theirs = nets["student"].x0(X, T, LABELS), merged.x0(X, T, LABELS)
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
    assert not torch.allclose(theirs, sd.backbone().x0(X, T, LABELS), rtol=1e-2)
    assert len(nets["student"].adapter_state()) == 2 * len(nets["student"].adapter)
