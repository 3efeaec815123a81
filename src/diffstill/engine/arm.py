"""An arm: one method with its optimizers, its EMA copies and its clock. An ordinary run has one, an arena many."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..errors import InputError
from ..methods.base import Batch, Losses, Method, Phase, TeacherOutputs
from ..models.adapters import unwrap
from ..models.denoiser import Denoiser
from .compiled import compiled_fault
from .ema import Ema
from .runtime import Runtime
from .settings import TrainSettings
from .state import frozen_names, load_own, own_state, pack_optimizer, unpack_optimizer


class Arm:
    """What the loop trains: in every phase that is due it takes micro-batches, accumulates, clips, updates weights and
    EMA. Each phase has an optimizer and a clock of its own.

    Args:
        images: how many images this arm trains on (an arm of an arena may stop before or after the others).
    """

    def __init__(
        self, name: str, method: Method, settings: TrainSettings, runtime: Runtime, images: int | None = None
    ) -> None:
        self.name, self.method, self.settings, self.runtime = name, method, settings, runtime
        self.images = images or settings.images
        self.seconds = 0.0
        self.failed: str | None = None
        self.alarm = False
        self.ema: dict[str, Ema] = {}
        self._frozen: dict[str, frozenset[str]] = {}
        """Parameters of each role that never change (the base of a LoRA): no checkpoint holds them."""
        for role, network in list(method.roles.items()):
            runtime.place(network, runtime.channels_last(settings.channels_last))
            self._frozen[role] = frozen_names(network)
            if method.role_optimizers[role].ema:
                self.ema[role] = Ema(network, settings.ema_decay, settings.ema_cap)
            if settings.gradient_checkpointing:
                checkpoint_activations(network)
            method.replace_role(role, runtime.wrap(network))
        for module in method.frozen.values():
            runtime.place(module, channels_last=False)
        for name, value in method.memory.items():
            method.memory[name] = value.to(runtime.device)
        self.warnings: list[str] = []
        self.compiled = self._unproven = runtime.compiles(settings.compile, settings.steps) and method.compiles
        self._refused = False
        if self.compiled:
            unwrap(method.student.network).compile(dynamic=False)
        height, width = method.student.sample_shape[1:]
        for denoiser in method.denoisers():
            denoiser.autocast_dtype = runtime.dtype(settings.precision, pixels=height * width)
        self.phases = {phase.name: phase for phase in method.phases}
        self.optimizers = {name: self._optimizer(phase) for name, phase in self.phases.items()}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        """How many updates each of the sums is over."""
        self._added: set[str] = set()
        self._last: dict[str, Tensor] = {}
        """Of each logged value, that of its last update."""

    def _optimizer(self, phase: Phase) -> torch.optim.AdamW:
        s, groups = self.settings, []
        for role in phase.roles:
            how = self.method.role_optimizers[role]
            trained = [p for p in self.method.roles[role].parameters() if p.requires_grad]
            if not trained:
                raise ValueError(f"{self.name}: role {role} has nothing to train; list it in Method.frozen")
            decay = s.weight_decay if how.weight_decay is None else how.weight_decay
            groups.append({"params": trained, "weight_decay": decay, "lr_scale": how.lr_scale, "clip": how.clip})
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, fused=True)

    @property
    def student(self) -> Denoiser:
        """The EMA student in float32: what is probed, evaluated and saved."""
        made = self.method.student.with_network(self.ema["student"].network)
        made.autocast_dtype = None
        return made

    def due(self, images_seen: int) -> list[Phase]:
        """The phases that run at the step after ``images_seen`` images."""
        step = images_seen // self.settings.batch_size
        return [phase for phase in self.phases.values() if step % phase.every == 0]

    def learning_rate(self, images_seen: int, every: int = 1) -> float:
        """Linear warm-up, then cosine or linear from ``lr`` to ``lr_min``: a pure function of the images seen.

        Args:
            every: of a phase that does not run at every step: its clock is the images of its own updates.
        """
        s = self.settings
        own, whole = images_seen, self.images
        if every > 1:
            own, whole = (-(-images // (s.batch_size * every)) * s.batch_size for images in (own, whole))
        if own < s.warmup_images:
            return s.lr * (own + s.batch_size) / (s.warmup_images + s.batch_size)
        if s.decay == "none":
            return s.lr
        progress = (own - s.warmup_images) / max(1, whole - s.warmup_images)
        left = 1 - min(1.0, progress)
        share = left if s.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return s.lr_min + (s.lr - s.lr_min) * share

    def backward(self, phase: Phase, batch: Batch, teacher: TeacherOutputs | None, share: float, last: bool) -> None:
        """A phase's loss and gradients of one micro-batch that makes up ``share`` of this process's batch."""
        if self._unproven:
            self._prove_compiled(batch, teacher)
        with ExitStack() as stack:
            stack.enter_context(self._mode())
            stack.enter_context(self.method.in_phase(phase))
            for role in phase.roles:
                stack.enter_context(self.runtime.accumulate(self.method.roles[role], last))
            losses: Losses = self.method.phase_loss(phase.name, batch, teacher)
            (losses.total * share).backward()
        self._add("loss", losses.total.detach() * share)
        if len(self.phases) > 1:
            self._add(f"{phase.name}_loss", losses.total.detach() * share)
        for name, value in losses.parts.items():
            self._add(name, value * share)

    def _mode(self) -> Any:
        return torch.compiler.set_stance("force_eager") if self._refused else nullcontext()

    def _prove_compiled(self, batch: Batch, teacher: TeacherOutputs | None) -> None:
        """Goes back to eager where the compiled student has other gradients; leaves no other trace."""
        student = unwrap(self.method.roles["student"])
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in student.modules())

        def gradients() -> Tensor:
            try:
                with ExitStack() as stack:
                    for role in self.method.roles.values():
                        stack.enter_context(self.runtime.accumulate(role, last=False))
                    self.method.loss(batch, teacher).total.backward()
                return torch.cat([p.grad.flatten().float() for p in student.parameters() if p.grad is not None])
            finally:
                self._forget_gradients()

        was = student.training
        student.train(was and not drops)
        fault = compiled_fault(gradients)
        student.train(was)
        self._unproven = False
        if self.runtime.any(fault is not None):
            self._refused = True
            self.warnings.append(f"{self.name}: trained without torch.compile: {fault or 'it failed elsewhere'}")

    def update(self, phase: Phase, images_seen: int) -> None:
        """Clip, optimizer step, EMA of one phase."""
        optimizer = self.optimizers[phase.name]
        if self.settings.grad_clip is not None:
            clipped = [p for group in optimizer.param_groups if group["clip"] for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(clipped, self.settings.grad_clip)
            self._add("grad_norm" if len(self.phases) == 1 else f"{phase.name}_grad_norm", norm.detach())
        lr = self.learning_rate(images_seen, phase.every)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
        self.method.after_update(phase.name)
        if self.runtime.world > 1:
            for value in self.method.memory.values():
                value.copy_(self.runtime.mean(value))
        optimizer.zero_grad(set_to_none=True)
        for role in phase.roles:
            if role in self.ema:
                self.ema[role].update(unwrap(self.method.roles[role]))
        for name in self._added:
            self.counts[name] = self.counts.get(name, 0) + 1
        self._added.clear()

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _add(self, name: str, value: Tensor) -> None:
        # Sums stay on the device until the log point: no host sync inside a step.
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self._last[name] = self._last[name] + value if name in self._added else value
        self._added.add(name)

    def take_means(self) -> dict[str, float]:
        """Means since the last call, over updates and processes; one device sync."""
        if not self.sums:
            return {}
        names = list(self.sums)
        values = self.runtime.mean(torch.stack([self.sums[n].float() for n in names])).tolist()
        means = {name: value / self.counts[name] for name, value in zip(names, values, strict=True)}
        self.sums, self.counts = {}, {}
        return means

    def fault(self) -> str | None:
        """Why the training has diverged, where the last update says so; the means of a log point come later."""
        names = [name for name, value in self._last.items() if value.ndim == 0]
        if not names:
            return None
        values = self.runtime.mean(torch.stack([self._last[name].float() for name in names])).tolist()
        return self.method.fault(dict(zip(names, values, strict=True)))

    def share_sums(self) -> None:
        """Means over processes in place of each one's own sums: what one process saves is then true for all."""
        self.sums = {name: self.runtime.mean(value) for name, value in self.sums.items()}

    def finite(self) -> bool:
        """False when a loss since the last log point, or a weight, is NaN or infinite on any process."""
        # Weights too: a gradient may overflow where the loss did not, and the next loss comes after the checkpoint.
        values = [p.detach() for network in self.method.roles.values() for p in network.parameters()]
        values += [self.sums["loss"]] if "loss" in self.sums else []
        ok = bool(torch.stack([value.isfinite().all() for value in values]).all())
        return not self.runtime.any(not ok)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, as flat tensors."""
        saved = {
            f"optimizer/{phase}/{key}": value
            for phase, optimizer in self.optimizers.items()
            for key, value in pack_optimizer(optimizer).items()
        }
        saved |= {f"memory/{name}": value for name, value in self.method.memory.items()}
        for role, network in self.method.roles.items():
            own = own_state(unwrap(network), self._frozen[role])
            saved |= {f"role/{role}/{key}": value for key, value in own.items()}
        for role, ema in self.ema.items():
            saved |= {f"ema/{role}/{key}": value for key, value in ema.state().items()}
        saved |= {f"sum/{name}": value for name, value in self.sums.items()}
        return saved

    def meta(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "counts": self.counts,
            "alarm": self.alarm,
            "failed": self.failed,
            "ema_updates": {role: ema.updates for role, ema in self.ema.items()},
        }

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Restores what ``tensors`` and ``meta`` gave, strictly."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        try:
            for role, network in self.method.roles.items():
                load_own(unwrap(network), self._frozen[role], part(f"role/{role}/"))
            for role, ema in self.ema.items():
                ema.load(part(f"ema/{role}/"), meta["ema_updates"][role])
            for phase, optimizer in self.optimizers.items():
                unpack_optimizer(optimizer, part(f"optimizer/{phase}/"))
            for name, value in self.method.memory.items():
                value.copy_(tensors[f"memory/{name}"])
        except (RuntimeError, KeyError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise InputError(
                "run",
                self.name,
                "use another run folder or --fresh",
                problem=f"has a checkpoint of other networks ({first})",
            ) from error
        device = self.runtime.device
        self.sums = {name: value.to(device) for name, value in part("sum/").items()}
        self.counts, self.seconds = meta["counts"], meta["seconds"]
        self.alarm, self.failed = meta["alarm"], meta["failed"]


def checkpoint_activations(network: nn.Module) -> None:
    """Has those of diffusers' networks inside that can compute activations again in the backward pass do so."""
    for module in network.modules():
        if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
            module.enable_gradient_checkpointing()


def union_of_needs(arms: list[Arm]) -> frozenset[str]:
    """What the teacher has to compute for all of them."""
    return frozenset(chain.from_iterable(arm.method.teacher_needs for arm in arms))
