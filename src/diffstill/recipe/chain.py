"""A chain of stages: each a training of its own whose teacher is an earlier stage's model."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..data.sources import DataSpec
from ..diffusion.schedule import Spacing
from .schema import NAME, EvaluationSpec, Section

CHAINS_OWN = ("kind", "name", "seed", "device", "data", "teacher", "roles", "beside", "arena", "evaluation")
"""Parts of a recipe that a stage cannot override."""


class StageSpec(Section):
    """One stage, or with ``rounds`` one a number of steps, each the next one's teacher."""

    recipe: str | None = Field(None, description="the recipe that trains it; its data and teacher are the chain's")
    model: str | None = Field(None, description="instead of a recipe: a finished model, a folder or hub id")
    overrides: dict[str, Any] = Field({}, description="dotted overrides of that recipe")
    of: str | None = Field(None, description="the stage whose model is the teacher; null: the one before")
    data: DataSpec | None = Field(None, description="what it is trained on; null: the chain's data")
    roles: dict[str, str] = Field(
        {}, description="role -> the earlier stage, or finished model, that it starts from instead of the teacher"
    )
    rounds: tuple[int, ...] = Field((), description="steps of the student, a stage each: 8, 4, 2, 1")
    start: int | None = Field(
        None, ge=1, description="steps of the teacher in the first round; null: twice the first round's"
    )
    last_rounds_factor: int = Field(2, ge=1, description="how many times longer the rounds of 2 and of 1 steps are")

    @field_validator("rounds")
    @classmethod
    def _falling(cls, rounds: tuple[int, ...]) -> tuple[int, ...]:
        if any(steps < 1 for steps in rounds) or any(b >= a for a, b in pairwise(rounds)):
            raise ValueError(f"{list(rounds)} must be falling numbers of steps, e.g. [8, 4, 2, 1]")
        return rounds

    @model_validator(mode="after")
    def _one(self) -> StageSpec:
        if (self.recipe is None) == (self.model is None):
            raise ValueError("give either recipe (trained here) or model (a finished one)")
        if self.model is not None and (self.overrides or self.of or self.rounds or self.data or self.roles):
            raise ValueError("model is a finished one: overrides, of, data, roles and rounds belong to a recipe")
        for key in self.overrides:
            if key.split(".")[0] in CHAINS_OWN:
                raise ValueError(f"overrides.{key}: the chain itself says that, or the stage beside its recipe")
        if not self.rounds and self.last_rounds_factor != 2:
            raise ValueError("last_rounds_factor is for rounds; set training.images in overrides instead")
        if self.start is not None and not self.rounds:
            raise ValueError("start is for rounds; set respace.teacher_steps in overrides instead")
        if self.start is not None and self.start < self.rounds[0]:
            raise ValueError(f"start {self.start} is fewer steps than the first round's {self.rounds[0]}")
        return self


class BaselineSpec(Section):
    """The first stage's model seen through few of its steps."""

    steps: int = Field(ge=1)
    spacing: Spacing = "trailing"


class ChainRecipe(Section):
    """Stages one after another in one run folder, measured under one protocol on the chain's data."""

    kind: Literal["chain"]
    name: str = Field(pattern=NAME)
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**31, description="of every stage")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: DataSpec
    stages: dict[str, StageSpec] = Field(
        description="in their order; the first trains from data alone; one set to null is left out"
    )
    result: str | None = Field(None, description="the stage that the report speaks of; null: the last")
    baselines: tuple[BaselineSpec, ...] = Field(
        (), description="the first stage's model as it is, in few steps: 8, or {steps: 8, spacing: leading}"
    )
    evaluation: EvaluationSpec = EvaluationSpec()

    @field_validator("stages", mode="before")
    @classmethod
    def _left(cls, value: Any) -> Any:
        """Without the stages that were set to null: an inherited one that is not wanted."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @field_validator("baselines", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return [{"steps": v} if type(v) is int else v for v in value] if isinstance(value, (list, tuple)) else value

    @field_validator("baselines")
    @classmethod
    def _distinct(cls, value: tuple[BaselineSpec, ...]) -> tuple[BaselineSpec, ...]:
        if len(set(value)) < len(value):
            raise ValueError("must not hold the same steps twice")
        return value

    @field_validator("evaluation")
    @classmethod
    def _no_teacher_steps(cls, value: EvaluationSpec) -> EvaluationSpec:
        if value.teacher_steps is not None:
            raise ValueError("teacher_steps says nothing here; baselines measure the first model in few steps")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> ChainRecipe:
        known: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(NAME, name):
                raise ValueError(f"stages.{name}: use another name (letters, digits, . _ -)")
            if stage.of is not None and stage.of not in known:
                raise ValueError(f"stages.{name}.of: {stage.of!r} is no earlier stage; one of {', '.join(known)}")
            known += [f"{name}-{steps}" for steps in stage.rounds] or [name]
        if len(set(known)) < len(known):
            raise ValueError(f"stages: two of {', '.join(known)} have one name")
        if not known:
            raise ValueError("stages: must not be empty")
        if self.result is not None and self.result not in known:
            raise ValueError(f"result: {self.result!r} is no stage; one of {', '.join(known)}")
        return self
