"""The contract between a method and the engine, and the registry that makes a file in this room a method.

A method is given a ``Batch`` (images, labels, timesteps, noise: all a pure function of (seed, images_seen)) and
lazily computed ``TeacherOutputs``, shared by every method trained in the same pass. It returns a scalar loss and
named parts. It owns its trainable roles; it never touches an optimizer, a device, a file or a random generator.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..diffusion.guidance import guide
from ..diffusion.schedule import NoiseSchedule, Spacing
from ..models.denoiser import Denoiser
from ..models.features import tapped
from .curriculum import Curriculum

R = TypeVar("R")


class Options(BaseModel):
    """Base of every method's options: unknown keys are refused, values are not coerced silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _no_draws(name: str) -> Tensor:
    raise LookupError(f"this batch was made without normal draws ({name})")


@dataclass(frozen=True)
class Batch:
    """One process's slice of a global batch.

    ``uniform(name)`` gives per-sample numbers in [0, 1) (B,), a pure function of (name, seed, images_seen);
    ``uniform(name, whole_batch=True)`` one number (1,) for the global batch. ``normal(name)`` gives standard-normal
    noise (B, C, H, W) in the same way.
    """

    x0: Tensor
    """(B, C, H, W) float32 in [-1, 1]."""
    labels: Tensor
    """(B,) int64 in 0..num_classes-1."""
    t: Tensor
    """(B,) int64 uniform in 0..T-1."""
    noise: Tensor
    """(B, C, H, W) standard normal."""
    x_t: Tensor
    """(B, C, H, W): ``alpha_t x0 + sigma_t noise``."""
    t_global: Tensor
    """(global B,) the timesteps of all processes, for normalisers that run over the whole batch."""
    uniform: Callable[..., Tensor]
    images_seen: int = 0
    normal: Callable[[str], Tensor] = _no_draws
    memo: dict[str, Tensor] = field(default_factory=dict)
    """What one phase of a step leaves for the next; emptied before every step."""

    @property
    def size(self) -> int:
        return len(self.labels)


class TeacherOutputs:
    """The frozen teacher at the batch's (x_t, t, y): computed once, on first use, and shared between methods.

    Args:
        wants: the union over methods of ``Method.teacher_needs``: of ``cond``, ``null``, ``features`` and ``model``.
        clock: seconds; what methods are charged by for what they compute together.
    """

    def __init__(
        self, teacher: Denoiser, batch: Batch, wants: frozenset[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._teacher, self._batch, self._wants, self._clock = teacher, batch, wants, clock
        self._once: dict[str, Any] = {}
        self._spent: dict[str, float] = {}
        self._asked: set[str] = set()
        self._fresh: set[str] = set()
        self._paid: set[tuple[str, str]] = set()

    @cached_property
    def _computed(self) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor], dict[str, Tensor]]:
        b, teacher = self._batch, self._teacher
        with torch.no_grad(), tapped(teacher.network, "features" in self._wants) as features:
            if {"cond", "null"} <= self._wants:
                cond, null = teacher.branches(b.x_t, b.t, b.labels)
                halves = {name: f.chunk(2) for name, f in features.items()}
                return cond, null, {n: h[0] for n, h in halves.items()}, {n: h[1] for n, h in halves.items()}
            if "null" in self._wants:
                return None, teacher.null(b.x_t, b.t), {}, dict(features)
            if self._wants == {"model"}:
                return None, None, {}, {}
            return teacher(b.x_t, b.t, b.labels), None, dict(features), {}

    @property
    def computed(self) -> bool:
        """Whether the teacher has been run for this batch."""
        return "_computed" in self.__dict__

    def compute(self) -> None:
        """Runs the teacher now, where a caller wants to time it."""
        _ = self._computed

    @property
    def cond(self) -> Tensor:
        return _asked(self._computed[0], "cond")

    @property
    def null(self) -> Tensor:
        return _asked(self._computed[1], "null")

    def guided(self, scale: Tensor) -> Tensor:
        """The teacher's prediction at guidance scales (B,)."""
        return guide(self.cond, self.null, scale.view(-1, *[1] * (self.cond.ndim - 1)))

    @property
    def features(self) -> dict[str, Tensor]:
        """Stage outputs of the conditional branch, by the adapter's stage names."""
        return self._computed[2]

    @property
    def null_features(self) -> dict[str, Tensor]:
        """Stage outputs of the null branch."""
        return self._computed[3]

    def once(self, name: str, compute: Callable[[Denoiser, Batch], R]) -> R:
        """What a method computes with the teacher by itself (``model`` in its needs), kept as long as the outputs."""
        if "model" not in self._wants:
            raise LookupError("the method used the teacher's model but does not list it in teacher_needs")
        if name not in self._once:
            begun = self._clock()
            with torch.no_grad():
                self._once[name] = compute(self._teacher, self._batch)
            self._spent[name] = self._clock() - begun
            self._fresh.add(name)
        self._asked.add(name)
        found: R = self._once[name]
        return found

    def owed(self, arm: str) -> float:
        """Seconds that ``arm``, which has just been shown this batch, would have spent alone on what another arm had
        computed by ``once``; each result is paid for once an arm."""
        names = {name for name in self._asked if (arm, name) not in self._paid}
        self._paid |= {(arm, name) for name in names}
        seconds = sum(self._spent[name] for name in names - self._fresh)
        self._asked.clear()
        self._fresh.clear()
        return seconds


def _asked(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise LookupError(f"the method used the teacher's {name} output but does not list it in teacher_needs")
    return value


@dataclass
class Losses:
    """``total`` is a scalar with grad; ``parts`` are detached scalars on the device, for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def weighted(cls, **terms: tuple[float, Tensor]) -> Losses:
        """Sum of ``weight * term``; terms of weight 0 are logged but send no gradient."""
        total = torch.stack([weight * term for weight, term in terms.values() if weight != 0]).sum()
        return cls(total, {name: term.detach() for name, (_, term) in terms.items()})


@dataclass(frozen=True)
class RoleOptimizer:
    """How a trainable role is optimised, relative to the recipe's settings; None keeps the recipe's value."""

    weight_decay: float | None = None
    lr_scale: float = 1.0
    clip: bool = True
    """Whether the role's parameters count in the gradient-norm clipping."""
    ema: bool = True
    """Whether an EMA copy is kept, evaluated and saved."""


@dataclass(frozen=True)
class Phase:
    """A part of a training step that has an optimizer of its own."""

    name: str
    roles: tuple[str, ...]
    """The roles that it trains; all others are frozen and in eval mode while it runs."""
    every: int = 1
    """It runs at steps 0, ``every``, 2 ``every`` ... and its learning rate follows its own updates."""


@dataclass(frozen=True)
class Setting:
    """What a method is built from: the student, the frozen teacher (None when training a teacher) and the teacher's
    timestep curriculum (None where it has none)."""

    student: Denoiser
    teacher: Denoiser | None = None
    curriculum: Curriculum | None = None
    initial: Mapping[str, Denoiser] = field(default_factory=dict)
    """Role -> the finished model that it starts from, where the recipe says one (``roles``)."""


class Method(ABC):
    """A training method. Subclasses set ``name``, ``options_class``, ``summary`` and implement ``loss``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``diffstill list methods``."""
    source: ClassVar[str] = ""
    """Paper and equation."""
    options_class: ClassVar[type[Options]] = Options
    teacher_needs: frozenset[str] = frozenset()
    """Of ``cond``, ``null``, ``features`` and ``model`` (to call it otherwise); may be set per instance."""
    student_passes: int = 1
    """Student forwards an image and step; what ``--dry-run`` predicts with."""
    compiles: ClassVar[bool] = True
    """False where the student must not be compiled (hooks on its stages come and go)."""
    guided: bool = True
    """False for students that have no live null branch (those of one class among them) and are sampled in one pass."""
    trains_null: bool = True
    """False for guided students whose null branch stays as it was; may be set per instance from the options."""
    copy_parts: Mapping[str, float] = {}
    """Known values of loss parts when the student is an exact copy of the teacher; ``check_method`` verifies them.
    May be set per instance from the options."""
    scale_input: ClassVar[bool] = False
    """True where the student's network must take the guidance scale as an input, whatever its teacher's does."""
    keeps_scale: ClassVar[bool] = False
    """True where a student of a teacher that takes the scale learns every scale that its teacher knows."""
    own_calls: ClassVar[bool] = False
    """True where the loss calls every network by itself: no teacher output is kept, and all run in one precision."""
    fewer_steps: ClassVar[bool] = False
    """True for methods that make a student of fewer steps: their recipes say which (``respace``)."""
    spacing: ClassVar[Spacing] = "trailing"
    """Of the steps in the rounds of a chain: what the method's steps start from."""
    starts: ClassVar[tuple[str, ...]] = ()
    """Roles that may start from a model of their own (``roles`` in a recipe) instead of the teacher's."""
    init: ClassVar[str] = "fresh"
    """How the student starts unless the recipe says otherwise: ``fresh``, ``inherit`` or ``magnitude``."""

    student: Denoiser
    teacher: Denoiser | None
    curriculum: Curriculum | None = None
    """The timestep weights it trains with, where it has any; saved with the model."""

    def __init__(self, setting: Setting, options: Options) -> None:
        self.student = setting.student
        self.teacher = setting.teacher
        if self.student.unconditional:
            self.guided = self.trains_null = False
        self.options: Any = options
        self.roles: dict[str, nn.Module] = {"student": setting.student.network}
        self.role_optimizers: dict[str, RoleOptimizer] = {"student": RoleOptimizer()}
        self.frozen: dict[str, nn.Module] = {}
        """Modules that the loss uses and nobody trains, the teacher aside; the engine moves them to the device."""
        self.memory: dict[str, Tensor] = {}
        """Tensors that the method changes in ``after_update``: saved with a checkpoint, averaged over processes."""
        self._resting: dict[str, tuple[list[nn.Parameter], list[nn.Module]]] = {}

    @property
    def schedule(self) -> NoiseSchedule:
        return self.student.schedule

    @property
    def teacher_passes(self) -> int:
        """Teacher forwards an image and step; what ``--dry-run`` predicts with."""
        return len(self.teacher_needs & {"cond", "null"})

    @abstractmethod
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        """The loss of one (micro-)batch; gradients reach only ``self.roles``."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of a step, in their order. One for most methods: all roles, at every step."""
        return (Phase("train", tuple(self.roles)),)

    def phase_loss(self, phase: str, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        """The loss of one phase; of a method of one phase, ``loss``. Called inside ``in_phase``."""
        return self.loss(batch, teacher)

    @contextmanager
    def in_phase(self, phase: Phase) -> Iterator[None]:
        """Only the phase's roles ask for gradients and are in train mode; afterwards all is as it was, also after an
        exception."""
        if phase.name not in self._resting:
            resting = [network for name, network in self.roles.items() if name not in phase.roles]
            self._resting[phase.name] = (
                [p for network in resting for p in network.parameters()],
                [module for network in resting for module in network.modules()],
            )
        parameters, modules = self._resting[phase.name]
        asked = [p for p in parameters if p.requires_grad]
        modes = [(module, module.training) for module in modules]
        try:
            for module in modules:
                module.training = False
            for parameter in asked:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in asked:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode

    def denoisers(self) -> Sequence[Denoiser]:
        """The models that run in training precision."""
        return [self.student]

    def fault(self, means: Mapping[str, float]) -> str | None:
        """Why a training with these means of the logged values has diverged, where it has; asked at log points."""
        return None

    def after_update(self, phase: str) -> None:
        """Called after every optimizer step of a phase."""
        if self.curriculum is not None:
            self.curriculum.keep_inside()

    def artefacts(self) -> Mapping[str, Tensor]:
        """Tensors to save beside the model (a teacher's curriculum, say)."""
        return {}

    def replace_role(self, name: str, wrapped: nn.Module) -> None:
        """The engine puts the DDP or compiled form of a role in its place."""
        self.roles[name] = wrapped
        self._resting.clear()
        if name == "student":
            self.student = self.student.with_network(wrapped)


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


class PhasedMethod(Method):
    """A method of several phases, each with its own roles, optimizer and cadence: implement ``phases``, the first of
    which trains the student, and ``phase_loss``."""

    compiles = False

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]: ...

    @abstractmethod
    def phase_loss(self, phase: str, batch: Batch, teacher: TeacherOutputs | None) -> Losses: ...

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        """Sum over the phases, through which each still reaches its own roles only."""
        found = []
        for phase in self.phases:
            with self.in_phase(phase):
                found.append(self.phase_loss(phase.name, batch, teacher))
        parts = {name: value for losses in found for name, value in losses.parts.items()}
        return Losses(torch.stack([losses.total for losses in found]).sum(), parts)


def register(method: M) -> M:
    """Class decorator: makes a method known by its ``name`` to recipes, ``diffstill list methods`` and the checks."""
    if method.name in METHODS and METHODS[method.name] is not method:
        raise ValueError(f"two methods are called {method.name!r}")
    METHODS[method.name] = method
    return method


def per_sample_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error over all dims but the first, (B,) float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)
