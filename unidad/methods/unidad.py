"""Uni-DAD: distillation and adaptation in one stage (arXiv 2511.18281), METHOD §3-§7.

One cycle: the student once (dual-domain DMD and GAN), the fake teacher with the heads k times on student samples, the target
teacher once on the target pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unidad.augment import Augmentation, CutMix
from unidad.backbones.base import Backbone, guided
from unidad.distributed import shared_draws, sum_over_processes
from unidad.losses import (
    denoising_loss,
    dmd_loss,
    dual_domain_gradient,
    gan_discriminator_loss,
    gan_generator_loss,
    gradient_penalty,
)
from unidad.methods.base import Losses, Method, Phase
from unidad.methods.finetune import denoise
from unidad.methods.handover import add_change, same_weights
from unidad.methods.objective import Objective
from unidad.methods.pool import TrajectoryPool
from unidad.rollout import batch_noise, ddim_trajectory, rollout


class UniDAD(Method):
    """The method over four networks of one architecture and the heads.

    Args:
        student: G, trained; gives x0-predictions at `student_steps`.
        source_teacher: frozen; None where its weight is 0.
        fake_teacher: trained on student samples; its encoder feeds the heads.
        target_teacher: trained on the target pictures, or frozen, or None (then a must be 0 unless dmd_weight is 0).
        heads: maps `fake_teacher.features` to logits; None where both GAN weights are 0.
        student_steps: tau_1 > ... > tau_K.
        batch_size: student samples per (micro-)batch.
        generator: source of all noise and timesteps, on the networks' device.
        train_target: False keeps the target teacher as it is (a pre-adapted checkpoint).
        target_warmup: so many first cycles train the target teacher alone.
        target_cycles: so many train it at all, after which it is frozen; None: all.
        transfer: where the student begins to learn, so much of what the target teacher has learnt since `origin` is added to its
            weights, and the fake teacher takes the target teacher's (`handover.add_change`); 0 leaves both as given. Not in the paper.
        origin: the source model's weights, for `transfer`.
        mix: of the pictures the target teacher learns from, see `CutMix`. Not in the paper.
        label: class of every picture, for class-conditional networks.
        contexts: each student sample is drawn under one of the labels 0..contexts-1 at random, and that label goes with it to every
            network; target pictures keep `label`. 1: all under `label`. The heads are told `label` with every picture: with labels of
            their own, samples and pictures could be told apart without looking.

    Raises:
        ValueError: if a teacher with a weight, or the heads, are missing.
    """

    product = "student"

    def __init__(
        self,
        *,
        student: Backbone,
        source_teacher: Backbone | None,
        fake_teacher: Backbone,
        target_teacher: Backbone | None,
        heads: nn.Module | None,
        objective: Objective,
        student_steps: list[int],
        batch_size: int,
        generator: torch.Generator,
        train_target: bool = True,
        target_warmup: int = 0,
        target_cycles: int | None = None,
        transfer: float = 0.0,
        origin: Mapping[str, Tensor] | None = None,
        mix: CutMix | None = None,
        label: int | None = None,
        contexts: int = 1,
    ):
        self.o = objective
        if (objective.uses_source and source_teacher is None) or (objective.uses_target and target_teacher is None):
            missing = "source" if objective.uses_source and source_teacher is None else "target"
            raise ValueError(f"a = {objective.a} needs a {missing} teacher")
        if objective.uses_gan and heads is None:
            raise ValueError("the GAN has a weight but there are no heads")
        self.student, self.fake_teacher = student, fake_teacher
        self.source_teacher, self.target_teacher, self.heads = source_teacher, target_teacher, heads
        self.student_steps: list[int] = student_steps
        self._augmentation = Augmentation(objective.augment, objective.augment_target, generator.device)
        self.batch_size, self.generator, self.label, self.contexts = batch_size, generator, label, contexts
        named: dict[str, nn.Module | None] = {"student": student, "source_teacher": source_teacher, "fake_teacher": fake_teacher}
        named |= {"target_teacher": target_teacher, "heads": heads}
        self.networks = {name: network for name, network in named.items() if network is not None}
        self._fresh: list[tuple[Tensor, Tensor | None]] = []  # student samples and their labels
        self._pool = TrajectoryPool(objective.anchor_pool, self.trajectories)
        learners = ("fake_teacher", "heads") if objective.uses_gan else ("fake_teacher",)
        trains_target = objective.uses_target and train_target
        first, k = target_warmup if trains_target else 0, objective.fake_updates
        self._first, self.transfer, self._origin, self._mix = first, transfer, origin, mix
        looks = objective.anchor_weight > 0 and objective.anchor == "pictures"
        self.phases = [
            Phase("student", ("student",), 1, self.student_loss, looks, begins=first),
            Phase("fake_teacher", learners, k, self.fake_teacher_loss, needs_data=objective.uses_gan, begins=first),
        ]
        if trains_target:
            self.phases.append(Phase("target_teacher", ("target_teacher",), 1, self.target_teacher_loss, ends=target_cycles))

    def start_cycle(self, cycle: int) -> tuple[str, ...]:
        """Where the student begins: `transfer`, unless it was done before the run was resumed here. Samples that an update left out of the
        cycle before did not take are not for this one.
        """
        self._fresh = []
        if not self.transfer or cycle != self._first:
            return ()
        assert self.target_teacher is not None
        assert self._origin is not None
        if not same_weights(self.fake_teacher, self.target_teacher):
            add_change(self.student, self._origin, self.target_teacher, self.transfer)
            self.fake_teacher.load_state_dict(self.target_teacher.state_dict())
        return ("student", "fake_teacher")

    def carried(self) -> list[Tensor]:
        """Student samples kept for the first fake-teacher update, then the anchor's pool and its age, then how often pictures are augmented
        (where there is a pool, and where that is learnt).
        """
        fresh = [tensor for pair in self._fresh for tensor in pair if tensor is not None]
        return [*fresh, *self._pool.carried(), *self._augmentation.carried()]

    def carried_rows(self) -> int:
        """The student samples, and their labels."""
        return sum(tensor is not None for pair in self._fresh for tensor in pair)

    def restore(self, carried: list[Tensor]) -> None:
        """Take them back."""
        self._fresh = []
        for tensor in self._pool.restore(self._augmentation.restore(carried)):
            if tensor.ndim == 1:  # labels follow their samples
                self._fresh[-1] = (self._fresh[-1][0], tensor)
            else:
                self._fresh.append((tensor, None))

    def anchor_pool(self) -> TrajectoryPool | None:
        """The teacher's trajectories, where the student is regressed onto some."""
        return self._pool if self.o.anchor_weight > 0 and self.o.anchor == "teacher" else None

    # -- pieces -------------------------------------------------------------------------------------------------------

    def generate(self, grad: str = "all", stop_after: int | None = None, labels: Tensor | None = None) -> Tensor:
        """x = G(z), a batch of student samples, [batch_size, C, H, W]; gradients as the surrounding mode and `grad` say."""
        noise = batch_noise((self.batch_size, *self.student.shape), self.generator)
        labels = self._labels(self.batch_size) if labels is None else labels
        return rollout(self.student, noise, self.student_steps, labels, grad, stop_after)

    def _context(self) -> Tensor | None:
        """Labels for a batch of student samples where there is a choice, [batch_size], else None."""
        if self.contexts == 1:
            return None
        return torch.randint(0, self.contexts, (self.batch_size,), generator=self.generator, device=self.generator.device)

    def _labels(self, n: int) -> Tensor | None:
        return None if self.label is None else torch.full((n,), self.label, device=self.generator.device)

    def _noised(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eps = torch.randn(x.shape, generator=self.generator, device=x.device)
        alpha, sigma = self.fake_teacher.schedule.alpha_sigma(t, x.ndim)
        return alpha * x + sigma * eps, alpha, sigma

    def _logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert self.heads is not None
        return self.heads(self.fake_teacher.features(x_t, t, self._labels(len(x_t)), self.o.features))

    def _disguised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Clean pictures as the heads see them: augmented and noised to random t; with t."""
        x = self._augmentation(x, self.generator)
        t = self.fake_teacher.schedule.uniform(len(x), self.generator)
        return self._noised(x, t)[0], t

    def _judge(self, x: Tensor) -> Tensor:
        """Logits of clean pictures, [B, heads]."""
        return self._logits(*self._disguised(x))

    # -- the student: L_DMD + lambda_G L_G,GAN (METHOD §4, §5) --------------------------------------------------------

    def student_loss(self, pictures: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> Losses:
        """L_G on a fresh batch; the graph runs through the rollout, and through the fake teacher's encoder for the GAN.

        The pictures [B, C, H, W] and their masks are those that an anchor of that kind is computed on.
        """
        x, context = self._student_batch()
        losses: Losses = {}
        total = x.new_zeros(())
        if self.o.dmd_weight > 0:
            gradient = self.dmd_gradient(x, context)
            losses["dmd"] = dmd_loss(x, gradient)
            losses["dmd_gradient"] = gradient.abs().mean().detach()
            total = total + self.o.dmd_weight * losses["dmd"]
        if self.o.gan_weight > 0:
            losses["gan"] = gan_generator_loss(self._judge(x), self.o.gan_loss, self.o.gan_aggregation)
            total = total + self.o.gan_weight * losses["gan"]
        if self.o.anchor_weight > 0:
            losses["anchor"] = self.anchor(pictures, labels, masks)
            total = total + self.o.anchor_weight * losses["anchor"]
        if self.o.reuse_batch:
            self._fresh.append((x.detach(), context))
        return losses | {"total": total}

    def anchor(self, pictures: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        """L_denoise of the student itself.

        With "pictures": on real pictures [B, C, H, W] where their masks say, noised to tau_K. With "teacher": at each tau_k, onto where the
        teacher's DDIM leads from there (regression onto the teacher's ODE as in DMD, arXiv 2311.18828, section 4.2), see `trajectories`.
        """
        if self.o.anchor == "teacher":
            x_t, t, clean = self._from_pool(self.o.anchor_batch or self.batch_size)
            labels = masks = None  # the teacher drew them under the run's own
            alpha, sigma = self.student.schedule.alpha_sigma(t, x_t.ndim)
        else:
            clean, t = pictures, torch.full((len(pictures),), self.student_steps[-1], device=pictures.device)
            x_t, alpha, sigma = self._noised(clean, t)
        xhat = self.student.x0(x_t, t, self._labels(len(t)) if labels is None else labels)
        return denoising_loss(clean, xhat, alpha, sigma, self.o.denoising, mask=masks, huber=self.o.anchor_huber)

    def _from_pool(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        pool, draw = self._pool.use(), partial(torch.randint, generator=self.generator, device=self.generator.device)
        which, k = draw(0, len(pool), (n,)), draw(0, len(self.student_steps), (n,))
        t = torch.tensor(self.student_steps, device=k.device)[k]
        return pool[which, k, 0], t, pool[which, k, 1]

    @torch.no_grad()
    def trajectories(self, n: int) -> Tensor:
        """n times, at each tau_k: x there, and where the teacher's DDIM leads from it, [n, K, 2, C, H, W].

        At all but the last, x is on the teacher's own way down from noise. At tau_K > tau_1 it is the student's: so that its last step
        learns to take away what is left by the steps before it, which a teacher's x has nothing of.
        The teacher is the target teacher if it has a weight, else the source teacher.
        """
        return torch.cat([self._trajectories(min(32, n - start)) for start in range(0, n, 32)])

    def _trajectories(self, n: int) -> Tensor:
        teacher = self.target_teacher if self.o.uses_target else self.source_teacher
        assert teacher is not None
        teacher, steps = guided(teacher, self.o.guidance), self.student_steps
        per_step = [self.o.anchor_steps] * len(steps)
        with shared_draws():
            start, *fresh = (batch_noise((n, *self.student.shape), self.generator)() for _ in range(len(steps) + 1))
        path = ddim_trajectory(teacher, start, steps, per_step, self._labels(n))
        pairs = torch.stack([path[:, :-1], path[:, -1:].expand_as(path[:, :-1])], dim=2)
        if len(steps) > 1:
            noise = iter(fresh).__next__
            own = rollout(self.student, noise, steps[:-1], self._labels(n))
            own = self.student.schedule.add_noise(own, noise(), torch.full((n,), steps[-1], device=own.device))
            pairs[:, -1] = ddim_trajectory(teacher, own, steps[-1:], per_step[-1:], self._labels(n))
        return pairs

    def _student_batch(self) -> tuple[Tensor, Tensor | None]:
        context = self._context()
        if self.o.rollout_grad != "random":
            return self.generate(self.o.rollout_grad, labels=context), context
        return self.generate("last", self._random_stop(), context), context

    def _random_stop(self) -> int:
        # Drawn on the host: reading it back from a device would make the loop wait for all that is queued there.
        generator = self.generator if self.generator.device.type == "cpu" else None
        return int(torch.randint(1, len(self.student_steps) + 1, (), generator=generator))

    @torch.no_grad()
    def dmd_gradient(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """g of METHOD §4 for a batch x, [B, C, H, W], drawn under `labels`; a teacher whose weight is 0 is not run."""
        schedule = self.fake_teacher.schedule
        t = schedule.draw_timesteps(self.o.timestep_law, len(x), self.generator)
        x_t, labels = self._noised(x.detach(), t)[0], self._labels(len(x)) if labels is None else labels
        source, target = (
            guided(teacher, self.o.guidance).x0(x_t, t, labels) if used and teacher is not None else None
            for used, teacher in ((self.o.uses_source, self.source_teacher), (self.o.uses_target, self.target_teacher))
        )
        return dual_domain_gradient(x, self.fake_teacher.x0(x_t, t, labels), source, target, self.o.a)

    # -- the fake teacher and the heads: L_fk + lambda_D L_D (METHOD §5, §6) ------------------------------------------

    def fake_teacher_loss(self, pictures: Tensor, _labels: Tensor | None = None, _masks: Tensor | None = None) -> Losses:
        """On student samples without a graph into the student: fresh ones, or the student's own batch for the first.

        The pictures' own labels and masks are not used: samples have none, and heads that saw masked photos beside whole samples would
        tell them apart by the masks, as they would by the labels.
        """
        x, context = self._samples_for_fake_teacher()
        t = self.fake_teacher.schedule.uniform(len(x), self.generator)
        x_t, alpha, sigma = self._noised(x, t)
        labels = self._labels(len(x)) if context is None else context
        if not self.o.uses_gan:
            xhat = self.fake_teacher.x0(x_t, t, labels)
            fake = denoising_loss(x, xhat, alpha, sigma, self.o.denoising)
            return {"fake": fake, "total": fake}
        if self.o.shared_forward and not self._augmentation.kinds and context is None:
            xhat, features = self.fake_teacher.x0_and_features(x_t, t, labels, self.o.features)
            assert self.heads is not None
            fake_logits, real_logits = self.heads(features), self._judge(pictures)
        else:
            xhat = self.fake_teacher.x0(x_t, t, labels)
            shown = self._disguised(x) if self._augmentation.kinds else (x_t, t)
            fake_logits, real_logits = self._judge_both(shown, self._disguised(pictures))
        fake = denoising_loss(x, xhat, alpha, sigma, self.o.denoising)
        disc, accuracy = self._discriminator_loss(pictures, x, fake_logits, real_logits)
        told: Losses = {"fake": fake, "disc": disc, "disc_accuracy": accuracy}
        if self._augmentation.target:
            surely_real = real_logits.detach().float().sign().mean(dim=1).sum()
            seen = surely_real.new_tensor(float(len(pictures)))
            told["augment_p"] = self._augmentation.adapt(*sum_over_processes(torch.stack([surely_real, seen])))
        return told | {"total": fake + self.o.disc_weight * disc}

    def _judge_both(self, fake: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of noised pictures (x_t, t)."""
        if not self.o.joint_batch:
            return self._logits(*fake), self._logits(*real)
        x_t, t = (torch.cat(pair) for pair in zip(fake, real, strict=True))
        fake_logits, real_logits = self._logits(x_t, t).split([len(fake[0]), len(real[0])])
        return fake_logits, real_logits

    @torch.no_grad()
    def _samples_for_fake_teacher(self) -> tuple[Tensor, Tensor | None]:
        if self._fresh:
            return self._fresh.pop(0)
        context = self._context()
        stop = self._random_stop() if self.o.rollout_grad == "random" else None
        return self.generate(stop_after=stop, labels=context), context

    def _discriminator_loss(self, pictures: Tensor, x: Tensor, fake_logits: Tensor, real_logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = gan_discriminator_loss(real_logits, fake_logits, self.o.gan_loss, self.o.gan_aggregation)
        if self.o.gan_loss == "wgan-gp":
            loss = loss + self.o.gradient_penalty_weight * self._penalty(pictures, x)
        accuracy = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
        return loss, accuracy.detach()

    def _penalty(self, pictures: Tensor, x: Tensor) -> Tensor:
        n = min(len(pictures), len(x))
        mix = torch.rand((n, 1, 1, 1), generator=self.generator, device=x.device)
        between = (mix * pictures[:n] + (1 - mix) * x[:n]).detach()
        t = self.fake_teacher.schedule.uniform(n, self.generator)
        x_t = self._noised(between, t)[0].requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            logits = self._logits(x_t, t)
        return gradient_penalty(logits, x_t, self.o.gan_aggregation)

    # -- the target teacher: L_trg (METHOD §6) ------------------------------------------------------------------------

    def target_teacher_loss(self, pictures: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> Losses:
        """L_denoise on the target pictures, [B, C, H, W], under their own labels and where their own masks say, if they have them."""
        assert self.target_teacher is not None
        label = self.label if labels is None else labels
        law = self.o.denoising_law
        loss = denoise(self.target_teacher, pictures, self.generator, self.o.denoising, label, law=law, mask=masks, mix=self._mix)
        return {"target": loss, "total": loss}
