"""What Uni-DAD minimises, as numbers (METHOD §4-§7)."""

from __future__ import annotations

from dataclasses import dataclass

from unidad.backbones.base import Granularity


@dataclass(frozen=True)
class Objective:
    """The numbers of METHOD §4-§7; the defaults are the paper's for near FSIG targets.

    Attributes:
        a: weight of the target teacher against the source teacher, in [0, 1].
        guidance: scale of classifier-free guidance on both teachers; 1 is none. Neither student nor fake teacher has any.
        dmd_weight: of L_DMD; 0 leaves the GAN alone.
        gan_weight: lambda_G. disc_weight: lambda_D.
        anchor_weight: of L_denoise of the student itself at its last timestep tau_K. Not in the paper, so 0 by default: it keeps
            the last step as clean a denoiser as the model it started from, which L_DMD alone unlearns.
        anchor: "pictures" noises the target pictures to the last timestep and asks for them back; "teacher" asks, at every timestep,
            for where the target teacher's DDIM (the source teacher's if there is no other) leads, see `UniDAD.anchor`.
        anchor_huber: c of the pseudo-Huber loss in its place, see `denoising_loss`; 0 is the square.
        anchor_steps: of that DDIM for each of the student's. anchor_pool: trajectories kept. anchor_batch: 0 is batch_size.
        fake_updates: k, fake-teacher updates per cycle.
        reuse_batch: the student's own batch serves the first of the k (METHOD §8).
        rollout_grad: "all", "last", or "random" (backward simulation: stop after a random step).
        augment: what is done to every picture the heads see, such as "flip,translate"; see `unidad.augment`.
        augment_target: 0 does it always; above 0, only as often as keeps the heads from being surer of the real pictures (ADA).
        timestep_law: of t in L_DMD, "uniform" in 0.02T..0.98T, "karras" or "quadratic" (see `NoiseSchedule`).
        denoising_law: of t in the target teacher's own loss, "uniform" (METHOD §6), "quadratic" or "detail".
        shared_forward: one fake-teacher forward serves L_fk and the fake half of L_D; not with `augment`, which L_fk must not see.
        joint_batch: where that is not so, the heads see real and fake pictures in one batch instead of two.
    """

    a: float = 0.25
    guidance: float = 1.0
    dmd_weight: float = 1.0
    gan_weight: float = 0.01
    disc_weight: float = 0.03
    gan_loss: str = "bce"
    gan_aggregation: str = "per_head"
    gradient_penalty_weight: float = 10.0
    augment: str = "none"
    augment_target: float = 0.0
    anchor_weight: float = 0.0
    anchor: str = "pictures"
    anchor_huber: float = 0.0
    anchor_steps: int = 4
    anchor_pool: int = 256
    anchor_batch: int = 0
    features: Granularity = "stage"
    fake_updates: int = 5
    reuse_batch: bool = True
    rollout_grad: str = "all"
    timestep_law: str = "uniform"
    denoising: str = "epsilon"
    denoising_law: str = "uniform"
    shared_forward: bool = True
    joint_batch: bool = False

    @property
    def uses_source(self) -> bool:
        """Whether the source teacher has a weight."""
        return self.dmd_weight > 0 and self.a < 1

    @property
    def uses_target(self) -> bool:
        """Whether the target teacher has a weight."""
        return self.dmd_weight > 0 and self.a > 0

    @property
    def uses_gan(self) -> bool:
        """Whether heads are needed."""
        return self.gan_weight > 0 or self.disc_weight > 0
