"""Distil and adapt in one run: distribution matching towards two domains and a many-headed GAN on few images (Uni-DAD).

DMD2, GAN only, distribution matching only and a frozen target teacher are settings of the same method (docs/unidad.md).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diffusion.adversarial import (
    balanced_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    mean_logit,
    measured_norms,
    per_image,
    r1_penalty,
)
from ..diffusion.levels import LevelTable, geometric_ratios, ratios
from ..diffusion.matching import dual_domain, matching_gradient, tied
from ..diffusion.prediction import to_epsilon, to_x0
from ..diffusion.sampling import renoise_sample
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError
from ..models.adapters import unwrap
from ..models.denoiser import Denoiser
from ..models.features import Heads, chosen_taps, encode_features, feature_shapes
from .base import Batch, Losses, Options, Phase, PhasedMethod, RoleOptimizer, Setting, TeacherOutputs, register
from .distillation import require_teacher
from .unidad_options import UniDadOptions

LOST = 4.0
"""How many times the mean absolute pixel of the first images, or of white ones, a diverged student's are."""


@register
class UniDad(PhasedMethod):
    """Roles: ``student`` (K steps), ``critic`` (scores the student's images, its encoder carries the ``heads``) and,
    where it is online, ``target_teacher``; the source ``teacher`` is frozen. A step is a student update now and then,
    a critic update always, and a target teacher's update beside the student's."""

    name = "unidad"
    summary = "a one- to four-step generator adapted to few images in one run; DMD2 and its kin are settings of it"
    source = "Uni-DAD 2511.18281; DMD2 2405.14867"
    options_class = UniDadOptions
    teacher_needs = frozenset({"model"})
    init = "inherit"
    starts = ("student", "critic", "target_teacher")
    guided = False
    own_calls = True
    copy_parts: Mapping[str, float] = {"dmd": 0.0}

    teacher: Denoiser

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        o = self.options
        source = require_teacher(setting, made_for=("ddim",))
        if source.takes_scale:
            mend = "take the model with two branches that it was distilled from"
            raise InputError("teacher", "a model that takes the guidance scale", mend, problem="does not fit unidad")
        if o.target_teacher == "none" and "target_teacher" in setting.initial:
            mend = "use method.target_teacher: online or frozen, or leave the role out"
            raise InputError("roles.target_teacher", "a model", mend, problem="would never be asked")
        self.trains_null = o.guidance != 1
        if not o.dmd_weight or o.guidance != 1:
            self.copy_parts = {}
        if not o.dmd_weight or o.a == 1:
            self.teacher_needs = frozenset()  # it is what the roles start from, and is not asked
        self._times = source.time_index
        self._range = self._levels_of(source.schedule)
        self.teacher = self._plain(source, source.network)
        start = setting.initial.get("student")
        network = setting.student.network if start is None else self._trainable(start)
        chain = geometric_ratios(self._range[1], o.sigma_end, o.steps)
        self.student = source.with_network(network).renoising(chain, nearest=o.times == "nearest")
        self.student.exact_output = True
        self.roles = {"student": self.student.network}
        self.role_optimizers = {"student": RoleOptimizer()}
        self._add_critic(setting)
        self._target: Denoiser | None = None
        if o.target_teacher != "none":
            self._add_target(setting)
        self.memory = {"norms": torch.zeros(3)}
        """What ``measured_norms`` keeps of the gradients at the image: the matching's, the GAN's."""
        self.memory["pixel"] = torch.zeros(1)
        """Mean absolute pixel of the first images."""
        self._seen: dict[str, list[Tensor]] = {"norms": [], "pixel": []}

    # What it is built of.

    def _plain(self, like: Denoiser, network: nn.Module) -> Denoiser:
        """A model that is asked at any noise level."""
        made = Denoiser(network, like.schedule, like.num_classes, like.sample_shape, like.prediction_type)
        made.exact_output = True
        return made

    def _trainable(self, start: Denoiser) -> nn.Module:
        """A copy of a model's network to be trained."""
        return copy.deepcopy(unwrap(start.network)).requires_grad_(True).train()

    def _copy(self, setting: Setting, role: str) -> Denoiser:
        """A trainable copy of the model that a role starts from: the recipe's, else the teacher."""
        return self._plain(self.teacher, self._trainable(setting.initial.get(role, self.teacher)))

    def _add_critic(self, setting: Setting) -> None:
        o = self.options
        self.critic = self._copy(setting, "critic")
        self.roles["critic"] = self.critic.network
        self.role_optimizers["critic"] = RoleOptimizer(lr_scale=o.critic_lr_scale, ema=False)
        if o.gan == "none":
            return
        self._taps = chosen_taps(self.critic.network, o.taps)
        if not self._taps:
            mend = "use a teacher of the unet2d family, or gan: none"
            raise InputError("method.gan", o.gan, mend, problem="needs an encoder, which this network has not")
        self.roles["heads"] = Heads(feature_shapes(self.critic, self._taps), o.head, o.pool)
        self.role_optimizers["heads"] = RoleOptimizer(lr_scale=o.heads_lr_scale, ema=False)

    def _add_target(self, setting: Setting) -> None:
        o = self.options
        if o.target_teacher == "frozen" and "target_teacher" not in setting.initial:
            mend = "name the finished model: roles.target_teacher"
            raise InputError("method.target_teacher", "frozen", mend, problem="has no model")
        self._target = self._copy(setting, "target_teacher")
        if o.target_teacher == "frozen":
            self.frozen["target_teacher"] = self._target.freeze().network
            return
        self.roles["target_teacher"] = self._target.network
        self.role_optimizers["target_teacher"] = RoleOptimizer(lr_scale=o.target_lr_scale, ema=False)

    def _levels_of(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """Smallest and largest ratio: the options', within what the teacher knows."""
        o = self.options
        side = min(self.student.sample_shape[1:])
        table = ratios(schedule)
        high = min(o.sigma_max or 80.0 * min(1.0, side / 64), float(table[-1]))
        low = max(o.sigma_min, float(table[0]))
        known = f"the teacher's {float(table[0]):.3g} to {float(table[-1]):.3g}"
        if not low < high:
            asked = f"{o.sigma_min:g} and {high:g}"
            mend = f"stay within {known}, e.g. 0.02 and 10"
            raise InputError("method.sigma_min and sigma_max", asked, mend, problem="leave no levels between them")
        if o.steps > 1 and not low <= o.sigma_end < high:
            problem = f"does not lie below sigma_max {high:g} and within {known}"
            raise InputError("method.sigma_end", o.sigma_end, "use 0.5, say", problem=problem)
        return low, high

    @cached_property
    def _levels(self) -> LevelTable:
        o, like = self.options, self.teacher
        table = LevelTable(*self._range, like.schedule, times=self._times, nearest=o.times == "nearest")
        return table.to(self.critic.device)

    # What the engine asks.

    @contextmanager
    def in_phase(self, phase: Phase) -> Iterator[None]:
        # Checkpointed activations are computed again in the backward pass: by the attention of the forward pass.
        twice = phase.name == "critic" and (self.options.r1 or self.options.gan == "wgan")
        with super().in_phase(phase), sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            yield

    @property
    def phases(self) -> tuple[Phase, ...]:
        o = self.options
        found = [Phase("student", ("student",), o.student_every)]
        found.append(Phase("critic", ("critic", "heads") if "heads" in self.roles else ("critic",)))
        if "target_teacher" in self.roles:
            found.append(Phase("target", ("target_teacher",), o.target_every or o.student_every))
        return tuple(found)

    @property
    def student_passes(self) -> int:  # type: ignore[override]
        """Forwards with a backward, of networks as large as the student: the chain and the critic's, in the mean."""
        o = self.options
        return math.ceil(o.steps / o.student_every + 2 + (o.target_teacher == "online") / o.student_every)

    @property
    def teacher_passes(self) -> int:
        """Forwards without one: the chain's at most steps, teachers and critic now and then."""
        return math.ceil(self.options.steps + 3 / self.options.student_every)

    def denoisers(self) -> Sequence[Denoiser]:
        return [d for d in (self.student, self.critic, self.teacher, self._target) if d is not None]

    def replace_role(self, name: str, wrapped: nn.Module) -> None:
        super().replace_role(name, wrapped)
        if name == "critic":
            self.critic = self.critic.with_network(wrapped)
        elif name == "target_teacher" and self._target is not None:
            self._target = self._target.with_network(wrapped)

    def phase_loss(self, phase: str, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        if phase == "student":
            return self.student_loss(batch)
        if phase == "critic":
            return self.critic_loss(batch)
        assert self._target is not None
        loss = self._denoising(self._target, batch.x0, batch, "target")
        return Losses(loss, {"target": loss.detach()})

    def after_update(self, phase: str) -> None:
        """Keeps the gradient norms of calibrating student updates, and what the first images were like."""
        if phase != "student":
            return
        if self._seen["norms"]:
            o, squares = self.options, torch.stack(self._seen["norms"]).mean(0)
            # The matching's gradient is zero at the first update: all networks are the teacher.
            self.memory["norms"] = measured_norms(self.memory["norms"], squares, o.calibration, o.calibrate == "always")
        first = torch.stack(self._seen["pixel"]).mean(0)
        self.memory["pixel"] = torch.where(self.memory["pixel"] > 0, self.memory["pixel"], first)
        for seen in self._seen.values():
            seen.clear()

    def fault(self, means: Mapping[str, float]) -> str | None:
        now, first = means.get("pixel", 0.0), float(self.memory["pixel"])
        if now <= LOST * max(1.0, first):
            return None
        return f"the student's images have left their range (mean absolute pixel {now:.1f}, at first {first:.1f})"

    # The losses.

    def unroll(self, batch: Batch) -> Tensor:
        """The student's images (B, C, H, W), with graph where gradients are on."""
        o, names = self.options, itertools.count()
        last, tracked = 0, None
        if o.gradient == "random":
            last = int(batch.uniform("student step", whole_batch=True).item() * o.steps)
        if o.gradient != "chain":
            tracked = last
        return renoise_sample(
            lambda x, t, _: self.student(x, t, batch.labels),
            batch.normal(f"chain {next(names)}"),
            self.student.schedule,
            lambda: batch.normal(f"chain {next(names)}"),
            prediction_type=self.student.prediction_type,
            last=last,
            gradient_from=tracked,
        )

    def student_loss(self, batch: Batch) -> Losses:
        """Distribution matching plus GAN; both gradients are taken at the image and sent through the chain at once.

        Of either, ``dmd_norm`` and ``gan_norm`` tell the norm an image, in the root mean square over the images.
        """
        o, x = self.options, self.unroll(batch)
        held = x.detach()
        batch.memo["student"] = held
        value, slope = held.new_zeros(()), torch.zeros_like(held)
        parts = {"pixel": held.abs().mean()}
        dmd_slope = gan_slope = None
        if o.dmd_weight:
            loss, dmd_slope = self.matching(held, batch)
            value, slope = value + o.dmd_weight * loss, slope + o.dmd_weight * dmd_slope
            parts |= {"dmd": loss, "dmd_norm": per_image(dmd_slope).sqrt()}
        if o.gan != "none":
            leaf = held.clone().requires_grad_()
            with torch.enable_grad():
                loss = generator_loss(self._logits(batch, {"generator": leaf})[0], o.gan, o.aggregation)
            (gan_slope,) = torch.autograd.grad(loss, leaf)
            weight = self.gan_weight()
            value, slope = value + weight * loss.detach(), slope + weight * gan_slope
            parts |= {"gan": loss.detach(), "gan_norm": per_image(gan_slope).sqrt(), "gan_weight": weight}
        if dmd_slope is not None and gan_slope is not None and o.gan_share is not None:
            squares = torch.stack([per_image(o.dmd_weight * dmd_slope), per_image(gan_slope)])
            self._seen["norms"].append(squares)
        self._seen["pixel"].append(parts["pixel"][None])
        return Losses(tied(x, value, slope), parts)

    def gan_weight(self) -> Tensor:
        """The weight of the GAN's loss, a scalar: the option, or once enough is measured the calibrated one."""
        o, norms = self.options, self.memory["norms"]
        if o.gan_share is None:
            return torch.full_like(norms[0], o.gan_weight).float()
        return balanced_weight(norms, o.gan_weight, o.gan_share, o.calibration)

    def matching(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss, its gradient in x)`` of the matching towards source and target at a fresh noise level."""
        a = self.options.a
        with torch.no_grad():
            x_t, t, alpha, sigma = self._noised(x, batch, "matching", 0.02, 0.98)
            critic = self._x0(self.critic, x_t, t, batch.labels, alpha, sigma)

            def gradient(teacher: Denoiser) -> Tensor:
                clean = self._x0(teacher, x_t, t, batch.labels, alpha, sigma, self.options.guidance)
                return matching_gradient(x, critic, clean, self.options.normalizer, x_t=x_t, ratio=sigma / alpha)

            source = gradient(self.teacher) if a < 1 else None
            target = gradient(self._target) if a > 0 and self._target is not None else None
            return dual_domain(a, source, target)

    def critic_loss(self, batch: Batch) -> Losses:
        """Denoising of the student's images, and telling them from real ones."""
        o = self.options
        fake = batch.memo.get("student")
        if fake is None:
            with torch.no_grad():
                fake = self.unroll(batch)
        denoising = self._denoising(self.critic, fake, batch, "critic")
        total, parts = denoising, {"critic": denoising.detach()}
        if o.gan != "none":
            real, made = self._logits(batch, {"real": batch.x0, "fake": fake})
            loss = discriminator_loss(real, made, o.gan, o.aggregation)
            total, parts["gan_critic"] = total + o.gan_critic_weight * loss, loss.detach()
            for name, penalty in self._penalties(batch, fake).items():
                total, parts[name] = total + o.gan_critic_weight * penalty, penalty.detach()
        return Losses(total, parts)

    def _penalties(self, batch: Batch, fake: Tensor) -> dict[str, Tensor]:
        o, found = self.options, {}

        def score(x: Tensor) -> Tensor:
            return mean_logit(self._logits(batch, {"real": x})[0])

        if o.r1:
            found["r1"] = o.r1 * r1_penalty(score, batch.x0)
        if o.gan == "wgan" and o.gradient_penalty:
            found["gradient_penalty"] = o.gradient_penalty * gradient_penalty(
                score, batch.x0, fake, batch.uniform("penalty")
            )
        return found

    def _logits(self, batch: Batch, images: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """The heads' opinion of each of some images, noised afresh; in one pass."""
        noised = [self._noised(x, batch, name) for name, x in images.items()]
        x_t, t = (torch.cat([each[part] for each in noised]) for part in (0, 1))
        features = encode_features(self.critic, x_t, t, batch.labels.repeat(len(images)), self._taps)
        heads: nn.Module = self.roles["heads"]
        # As a judge of the student it is no role of the phase, and its distributed form must not be told of it.
        logits = (unwrap(heads) if "generator" in images else heads)(features)
        return [list(each) for each in zip(*(z.chunk(len(images)) for z in logits), strict=True)]

    def _denoising(self, model: Denoiser, x: Tensor, batch: Batch, name: str) -> Tensor:
        """Mean squared error of the noise estimate, or of the clean one weighted by ``ratio^-2 + 4`` (EDM)."""
        x_t, t, alpha, sigma = self._noised(x, batch, name)
        out = model(x_t, t, batch.labels)
        if self.options.denoising == "edm":
            error = to_x0(out, x_t, alpha, sigma, model.prediction_type) - x
            weight = (alpha / sigma).square() + 4
            return (weight * error.square()).mean()
        return (to_epsilon(out, x_t, alpha, sigma, model.prediction_type) - batch.normal(name)).square().mean()

    def _noised(
        self, x: Tensor, batch: Batch, name: str, low: float = 0.0, high: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(x_t, t, alpha, sigma)`` at levels drawn from the part ``low`` to ``high`` of all."""
        share = low + (high - low) * batch.uniform(f"level {name}")
        alpha, sigma, t = self._levels.at(share, x.ndim)
        return alpha * x + sigma * batch.normal(name), t, alpha, sigma

    def _x0(
        self, model: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor, scale: float = 1.0
    ) -> Tensor:
        return to_x0(model.guided(x_t, t, labels, scale), x_t, alpha, sigma, model.prediction_type)
