"""An arm: one method with its optimizer, its EMA copies and its clock. An ordinary run has one, an arena many."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..methods.base import Batch, Losses, Method, TeacherOutputs
from ..models.adapters import unwrap
from ..models.denoiser import Denoiser
from .compiled import compiled_fault
from .ema import Ema
from .runtime import Runtime
from .settings import TrainSettings
from .state import pack_optimizer, unpack_optimizer


class Arm:
    """What the loop trains: ``step`` takes micro-batches, accumulates, clips, updates weights and EMA.

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
        groups = []
        self._clipped: list[nn.Parameter] = []
        for role, network in list(method.roles.items()):
            how = method.role_optimizers[role]
            runtime.place(network, runtime.channels_last(settings.channels_last))
            if how.ema:
                self.ema[role] = Ema(network, settings.ema_decay, settings.ema_cap)
            trained = [p for p in network.parameters() if p.requires_grad]
            decay = settings.weight_decay if how.weight_decay is None else how.weight_decay
            groups.append({"params": trained, "weight_decay": decay, "lr_scale": how.lr_scale})
            if how.clip:
                self._clipped += trained
            method.replace_role(role, runtime.wrap(network))
        for module in method.frozen.values():
            runtime.place(module, channels_last=False)
        self.warnings: list[str] = []
        self._unproven = runtime.compiles(settings.compile, settings.steps) and method.compiles
        self._refused = False
        if self._unproven:
            unwrap(method.student.network).compile()
        height, width = method.student.sample_shape[1:]
        method.student.autocast_dtype = runtime.dtype(settings.precision, pixels=height * width)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @property
    def student(self) -> Denoiser:
        """The EMA student in float32: what is probed, evaluated and saved."""
        made = self.method.student.with_network(self.ema["student"].network)
        made.autocast_dtype = None
        return made

    def learning_rate(self, images_seen: int) -> float:
        """Linear warm-up, then cosine or linear from ``lr`` to ``lr_min``: a pure function of the images seen."""
        s = self.settings
        if images_seen < s.warmup_images:
            return s.lr * (images_seen + s.batch_size) / (s.warmup_images + s.batch_size)
        if s.decay == "none":
            return s.lr
        progress = (images_seen - s.warmup_images) / max(1, self.images - s.warmup_images)
        left = 1 - min(1.0, progress)
        share = left if s.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return s.lr_min + (s.lr - s.lr_min) * share

    def backward(self, batch: Batch, teacher: TeacherOutputs | None, share: float, last: bool) -> None:
        """Loss and gradients of one micro-batch that makes up ``share`` of this process's batch."""
        if self._unproven:
            self._prove_compiled(batch, teacher)
        with ExitStack() as stack:
            stack.enter_context(self._mode())
            for role in self.method.roles.values():
                stack.enter_context(self.runtime.accumulate(role, last))
            losses: Losses = self.method.loss(batch, teacher)
            (losses.total * share).backward()
        self._add("loss", losses.total.detach() * share)
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
                self.optimizer.zero_grad(set_to_none=True)

        was = student.training
        student.train(was and not drops)
        fault = compiled_fault(gradients)
        student.train(was)
        self._unproven = False
        if self.runtime.any(fault is not None):
            self._refused = True
            self.warnings.append(f"{self.name}: trained without torch.compile: {fault or 'it failed elsewhere'}")

    def update(self, images_seen: int) -> None:
        """Clip, optimizer step, EMA."""
        if self.settings.grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(self._clipped, self.settings.grad_clip)
            self._add("grad_norm", norm.detach())
        lr = self.learning_rate(images_seen)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.method.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        for role, ema in self.ema.items():
            ema.update(unwrap(self.method.roles[role]))
        self.count += 1

    def _add(self, name: str, value: Tensor) -> None:
        # Sums stay on the device until the log point: no host sync inside a step.
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take_means(self) -> dict[str, float]:
        """Means since the last call, over steps and processes; one device sync."""
        if not self.count:
            return {}
        names = list(self.sums)
        values = self.runtime.mean(torch.stack([self.sums[n].float() for n in names])) / self.count
        self.sums, self.count = {}, 0
        return dict(zip(names, values.tolist(), strict=True))

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
        saved = {f"optimizer/{key}": value for key, value in pack_optimizer(self.optimizer).items()}
        for role, network in self.method.roles.items():
            saved |= {f"role/{role}/{key}": value for key, value in unwrap(network).state_dict().items()}
        for role, ema in self.ema.items():
            saved |= {f"ema/{role}/{key}": value for key, value in ema.state().items()}
        saved |= {f"sum/{name}": value for name, value in self.sums.items()}
        return saved

    def meta(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "count": self.count,
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
                unwrap(network).load_state_dict(part(f"role/{role}/"), strict=True)
            for role, ema in self.ema.items():
                ema.load(part(f"ema/{role}/"), meta["ema_updates"][role])
            unpack_optimizer(self.optimizer, part("optimizer/"))
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
        self.count, self.seconds = meta["count"], meta["seconds"]
        self.alarm, self.failed = meta["alarm"], meta["failed"]


def union_of_needs(arms: list[Arm]) -> frozenset[str]:
    """What the teacher has to compute for all of them."""
    return frozenset(chain.from_iterable(arm.method.teacher_needs for arm in arms))
