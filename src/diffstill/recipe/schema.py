"""What a recipe may say: one typed section for each part of a run."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..data.sources import DataSpec
from ..diffusion.guidance import parse_guidance
from ..diffusion.prediction import PredictionType
from ..diffusion.sampling import ClipMode
from ..diffusion.schedule import NoiseSchedule, Spacing, spaced_indices
from ..engine.settings import TrainSettings
from ..evaluation import distances
from ..methods import METHODS
from .named import AS_TEACHER, MethodSpec, NetworkSpec

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of recipes and arms: they become file names."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScheduleSpec(Section):
    """The forward process."""

    name: Literal["cosine", "linear", "scaled_linear"] = Field("cosine", description="cosine is DASH's")
    num_train_timesteps: int = Field(1000, ge=2, le=100_000, description="T")

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.create(self.name, self.num_train_timesteps)


def _guidance(value: Any) -> str:
    try:
        return str(parse_guidance(value))
    except ValueError as error:
        raise ValueError(str(error).rpartition("; ")[2]) from None  # field and value are named beside it


class EvaluationSpec(Section):
    """The protocol of the evaluation after training, and of ``diffstill eval``."""

    extractor: str = Field("classifier", description="classifier | inception[:PATH] | torchscript:PATH")
    samples: int = Field(1000, ge=20, description="generated images per seed and guidance setting")
    steps: int = Field(50, ge=1, description="DDIM steps")
    teacher_steps: int | None = Field(
        None, ge=1, description="of a teacher whose student has fewer steps (respace); null: 50, or all that it has"
    )
    guidance: tuple[str, ...] = Field(
        ("1", "1.5", "2", "3", "4", "tag:1,4,5"), description="scales, tag:min,max,beta or interval:s,lo,hi"
    )
    seeds: tuple[int, ...] = Field((0,), description="sampling seeds; from three on, intervals are their spread")
    pairs: int = Field(2000, ge=10, description="held-out (x_t, t, y) for guidance fidelity")
    clip: ClipMode = Field("recompute", description="what DDIM does after clipping x0 (D23)")
    batch_size: int = Field(500, gt=0, description="images sampled at once; no result depends on it")
    keep_samples: bool = Field(
        False, description="keep the images that are measured, as .npz under samples/, and go on from them after a stop"
    )
    latency_batches: tuple[int, ...] = Field((1, 64), description="images sampled at once where time is measured")
    default_guidance: str | None = Field(None, description="stored in the pipeline; null: the scale of the best FD")
    source: DataSpec | None = Field(
        None, description="images of the source domain, to measure how much of it is forgotten; with data.shots only"
    )
    distance: str = Field(
        "features", description="between images, for few-shot diversity and copies: features | pixels | lpips:vgg|alex"
    )

    @field_validator("guidance", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if isinstance(value, (str, int, float)):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(_guidance(item) for item in value)

    @field_validator("seeds", "latency_batches", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if type(value) is int else value

    @field_validator("latency_batches", mode="after")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(batch < 1 for batch in value):
            raise ValueError("use 1 or more")
        return value

    @field_validator("guidance", "seeds", mode="after")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("must not be empty")
        if len(set(value)) < len(value):
            raise ValueError("must not hold the same value twice")
        return value

    @field_validator("default_guidance", mode="before")
    @classmethod
    def _one_guidance(cls, value: Any) -> Any:
        return None if value is None else _guidance(value)

    @field_validator("extractor")
    @classmethod
    def _known_extractor(cls, value: str) -> str:
        kind, _, path = value.partition(":")
        if kind not in ("classifier", "inception", "torchscript") or (kind == "torchscript" and not path):
            raise ValueError("use classifier, inception, inception:PATH or torchscript:PATH")
        return value

    @field_validator("distance")
    @classmethod
    def _known_distance(cls, value: str) -> str:
        if value not in ("features", "pixels", "lpips:vgg", "lpips:alex"):
            raise ValueError(distances.FORMS)
        return value


class TeacherSpec(Section):
    """Where the teacher comes from: a model folder or hub id, a recipe that trains it first, or a text-to-image
    pipeline."""

    model: str | None = None
    recipe: str | None = None
    pipeline: str | None = Field(
        None, description="a Stable Diffusion 1.x pipeline, a folder or hub id, adapted to one subject (prompts)"
    )
    overrides: dict[str, Any] = Field({}, description="dotted overrides of the teacher's recipe")
    data: Literal["student", "own"] = Field(
        "student",
        description="what a recipe trains it on: the student's data, or the data that its own recipe names "
        "(another domain)",
    )

    @model_validator(mode="after")
    def _one(self) -> TeacherSpec:
        if sum(given is not None for given in (self.model, self.recipe, self.pipeline)) != 1:
            raise ValueError("give either model (a folder or hub id) or recipe (trained first), or pipeline")
        return self


class PromptSpec(Section):
    """What the models of a text-to-image run are shown."""

    source: str = Field(description="the class, for the source teacher: a dog")
    target: str = Field(description="the subject, for all others: the class with a rare token, a prt dog")
    negative: str = Field("", description="what guidance leads away from, for all")


class LoraSpec(Section):
    """Low-rank adapters over one shared, frozen U-Net instead of a trained U-Net for each role."""

    rank: int = Field(8, ge=1, description="of each adapter")
    alpha: int = Field(8, ge=1, description="the adapters' scale is alpha / rank")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="layers that get one, by the ends of their names",
    )


class RespaceSpec(Section):
    """Fewer steps: which of the teacher's timesteps the student's are. The teacher is seen through the same ones."""

    steps: int | None = Field(None, ge=1, description="how many, evenly spaced")
    spacing: Spacing = Field("leading", description="leading: from 0 on, as released; trailing: up to T-1")
    timesteps: tuple[int, ...] | None = Field(None, description="an increasing sequence, instead of steps")
    teacher_steps: int | None = Field(
        None, ge=1, description="evenly spaced steps that the teacher is reduced to first; null: all it has"
    )

    @model_validator(mode="after")
    def _one(self) -> RespaceSpec:
        if (self.steps is None) == (self.timesteps is None):
            raise ValueError("give either steps (evenly spaced) or timesteps (a sequence)")
        return self

    def indices(self, T: int) -> list[int]:
        """Timesteps of a schedule of length ``T``.

        Raises:
            ValueError: more steps than T, one leading step.
        """
        if self.timesteps is not None:
            return list(self.timesteps)
        return spaced_indices(T, self.steps or 0, self.spacing)


class ArmSpec(Section):
    """One arm of an arena: a method, and what differs from the recipe's student."""

    method: MethodSpec
    student: dict[str, Any] = Field({}, description="overrides of the recipe's student")
    label: str | None = None


class ArenaSpec(Section):
    """The arms of ``diffstill arena``; names are free, the reference is what differences are paired with."""

    arms: dict[str, ArmSpec] = {}
    reference: str = "dash"
    equal_seconds: bool = Field(True, description="train cheaper arms a second time, for the reference's seconds")
    keep_models: bool = Field(False, description="save every arm's student as a model folder, under models/")


class Base(Section):
    name: str = Field(pattern=NAME)
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: DataSpec
    method: MethodSpec
    training: TrainSettings
    evaluation: EvaluationSpec = EvaluationSpec()

    @property
    def subject(self) -> NetworkSpec:
        """The network that is trained."""
        raise AttributeError


class TrainRecipe(Base):
    """A class-conditional model from data."""

    kind: Literal["train"]
    network: NetworkSpec
    schedule: ScheduleSpec = ScheduleSpec()
    prediction_type: PredictionType = "epsilon"

    @property
    def subject(self) -> NetworkSpec:
        return self.network

    @model_validator(mode="after")
    def _sensible(self) -> TrainRecipe:
        if METHODS[self.method.name].teacher_needs:
            raise ValueError(f"method {self.method.name!r} needs a teacher: use kind: distill")
        if self.network.family == "guided_unet2d" or self.network.options.get("time_cond_proj_dim") is not None:
            raise ValueError("network: the guidance scale as an input needs a teacher: use kind: distill (guided)")
        if self.network.family == AS_TEACHER:
            raise ValueError("network.family teacher needs a teacher: use kind: distill, or name the family")
        if self.network.init not in (None, "fresh"):
            raise ValueError(f"network.init {self.network.init!r} needs a teacher: use kind: distill")
        return self


OF_SUBJECTS = ("samples", "steps", "batch_size", "latency_batches")
"""What of ``evaluation`` a text-to-image run knows: it measures distances between pixels."""


class DistillRecipe(Base):
    """A student from a teacher. Schedule, prediction type, classes and image size are the teacher's."""

    kind: Literal["distill"]
    teacher: TeacherSpec
    student: NetworkSpec
    roles: dict[str, str] = Field(
        {}, description="role -> the finished model (folder or hub id) that it starts from, instead of the teacher"
    )
    respace: RespaceSpec | None = Field(None, description="null: the student takes the teacher's steps")
    beside: dict[str, ArmSpec] = Field(
        {}, description="students trained in the same pass and measured beside this one, not saved"
    )
    arena: ArenaSpec = ArenaSpec()
    prompts: PromptSpec | None = Field(None, description="of a text-to-image teacher (teacher.pipeline)")
    lora: LoraSpec | None = Field(None, description="of a text-to-image teacher; null: whole networks are trained")

    @model_validator(mode="after")
    def _text_to_image(self) -> DistillRecipe:
        if self.teacher.pipeline is None:
            if self.prompts is not None or self.lora is not None:
                raise ValueError("prompts and lora are for a text-to-image teacher; name one: teacher.pipeline")
            return self
        if self.prompts is None:
            raise ValueError("prompts: say what the models are shown, e.g. {source: a dog, target: a prt dog}")
        if self.method.name != "unidad":
            raise ValueError(f"method {self.method.name!r} has no text-to-image form; use unidad")
        if self.student.family != AS_TEACHER or self.student.options or self.student.init not in (None, "inherit"):
            raise ValueError("student: of a text-to-image teacher it is its copy; write student: {family: teacher}")
        if self.respace is not None or self.beside or self.arena.arms:
            raise ValueError("respace, beside and arena have no text-to-image form; leave them out")
        for name, field in EvaluationSpec.model_fields.items():
            if name not in OF_SUBJECTS and getattr(self.evaluation, name) != field.get_default():
                raise ValueError(f"evaluation.{name} has no text-to-image form; leave it out")
        if self.lora is not None and self.roles:
            raise ValueError("roles: with lora all start from the teacher, whose weights they share; leave one out")
        return self

    @model_validator(mode="after")
    def _named(self) -> DistillRecipe:
        if METHODS[self.method.name].fewer_steps and self.respace is None:
            raise ValueError(f"respace: say how many steps a {self.method.name} student has, e.g. respace.steps=8")
        for role in self.roles:
            known = METHODS[self.method.name].starts
            if role not in known:
                mend = f"one of {', '.join(known)}" if known else f"leave it out: {self.method.name} has none"
                raise ValueError(f"roles.{role}: no role that may start from a model of its own; {mend}")
        for name in (*self.beside, *self.arena.arms):
            if not re.fullmatch(NAME, name) or name in ("teacher", "strided-teacher", "student", self.name):
                taken = f"teacher, strided-teacher, student, {self.name}"
                raise ValueError(f"arm {name!r}: use another name (letters, digits, . _ -; not {taken})")
        return self

    @property
    def subject(self) -> NetworkSpec:
        return self.student
