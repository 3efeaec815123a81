"""From the words of a chain recipe to its stages, each with a whole recipe of its own."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.sources import DataSplits, load_data
from ..diffusion.schedule import spaced_indices
from ..engine.runtime import Runtime
from ..errors import InputError
from ..methods import METHODS, Method, Setting
from ..models.denoiser import Denoiser
from ..recipe import (
    AnyRecipe,
    ChainRecipe,
    DistillRecipe,
    StageSpec,
    TrainRecipe,
    load_recipe,
    parse_recipe,
    resolved,
    without_places,
)
from .build import (
    Teacher,
    build_denoiser,
    build_method,
    check_data,
    check_run,
    check_scales,
    open_roles,
    open_teacher,
    respaced,
)
from .distill import prepare_student

UNHASHED = ("name", "description", "device", "evaluation", "teacher", "roles", "arena")
"""Parts of a stage's recipe that its weights do not depend on (teacher and roles count by their own)."""
SHORT = 2
"""Rounds of so few steps or fewer are the last ones, which are longer."""


@dataclass(frozen=True)
class Stage:
    """A stage before it is done: a recipe, or the name of a finished model."""

    name: str
    recipe: TrainRecipe | DistillRecipe | None
    of: str | None = None
    model: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role -> the earlier stage, or the finished model, that it starts from."""

    def inputs(self, data: DataSplits, teacher: str | None, roles: Mapping[str, str]) -> dict[str, Any]:
        """All that its weights are a function of.

        Args:
            data: its own.
            teacher: its ``identity``; None where it has none.
            roles: role -> identity of the model that it starts from.
        """
        assert self.recipe is not None
        whole = without_places(resolved(self.recipe))
        kept = {key: value for key, value in whole.items() if key not in UNHASHED}
        started = {"roles": dict(roles)} if roles else {}
        return {"recipe": kept, "data": data.fingerprint(), "teacher": teacher} | started


def digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of a stage's inputs."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def stages_of(recipe: ChainRecipe) -> list[Stage]:
    """The chain's stages in their order, rounds told apart.

    Raises:
        InputError: a stage's recipe that does not fit its place.
    """
    found: list[Stage] = []
    for name, spec in recipe.stages.items():
        of = spec.of or (found[-1].name if found else None)
        if spec.model is not None:
            found.append(Stage(name, None, model=spec.model))
            continue
        for stage, overrides in _rounds(name, spec):
            found.append(_stage(recipe, stage, spec, overrides, of))
            of = stage
    return found


def _base(name: str, spec: StageSpec, overrides: Mapping[str, Any]) -> AnyRecipe:
    """A stage's own recipe.

    Raises:
        InputError: what is wrong with it, under the stage's name.
    """
    try:
        return load_recipe(spec.recipe or "", {**spec.overrides, **overrides})
    except InputError as error:
        field = error.field if error.field == "recipe" else f"overrides.{error.field}"
        raise error.renamed(f"stages.{name}.{field}") from None


def _rounds(name: str, spec: StageSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, further overrides) of each round; of the stage itself where it has none."""
    if not spec.rounds:
        yield name, {}
        return
    base = _base(name, spec, {})
    if isinstance(base, ChainRecipe):
        raise InputError(f"stages.{name}.recipe", spec.recipe, "name a recipe of kind distill", problem="is a chain")
    if not METHODS[base.method.name].fewer_steps:
        mend = f"remove them: {base.method.name} makes no fewer steps"
        raise InputError(f"stages.{name}.rounds", list(spec.rounds), mend)
    own = base.respace if isinstance(base, DistillRecipe) else None
    said = own is not None and "spacing" in own.model_fields_set
    images, spacing = base.training.images, own.spacing if own and said else METHODS[base.method.name].spacing
    for number, steps in enumerate(spec.rounds):
        respace: dict[str, Any] = {"steps": steps, "spacing": spacing, "teacher_steps": None, "timesteps": None}
        if steps == 1 and spacing == "leading":  # the image itself, and from there to the noise
            respace |= {"steps": None, "timesteps": [0]}
        if number == 0:
            respace["teacher_steps"] = spec.start or 2 * steps
        longer = spec.last_rounds_factor if steps <= SHORT else 1
        yield f"{name}-{steps}", {"respace": respace, "training.images": images * longer}


def _stage(recipe: ChainRecipe, name: str, spec: StageSpec, overrides: dict[str, Any], of: str | None) -> Stage:
    field = f"stages.{name}"
    base = _base(name, spec, overrides)
    if isinstance(base, ChainRecipe):
        raise InputError(f"{field}.recipe", spec.recipe, "name a recipe of kind train or distill", problem="is a chain")
    placed: dict[str, Any] = {name: resolved(recipe)[name] for name in ("data", "seed", "device", "evaluation")}
    if isinstance(base, TrainRecipe):
        if spec.of is not None:
            problem = "trains from data alone"
            raise InputError(f"{field}.of", spec.of, f"remove it: {spec.recipe} has no teacher", problem=problem)
        of = None
        if spec.roles:
            raise InputError(f"{field}.roles", dict(spec.roles), "remove them", problem="are for stages with a teacher")
    elif of is None:
        mend = "begin with a recipe of kind train, or with model: a finished one"
        raise InputError(f"{field}.recipe", spec.recipe, mend, problem="needs a teacher, and no stage comes before")
    else:
        placed |= {"teacher": {"model": f"stage {of}", "recipe": None, "overrides": {}}, "beside": {}, "arena": {}}
        placed |= {"roles": dict(spec.roles)}
    if spec.data is not None:
        placed["data"] = spec.data.model_dump(mode="json")
    made = parse_recipe({**resolved(base), **placed, "name": name})
    assert not isinstance(made, ChainRecipe)
    return Stage(name, made, of, roles=spec.roles)


@dataclass(frozen=True)
class Blank:
    """A stage's model before it is trained, and how it would be; a finished model has no method."""

    model: Teacher
    method: Method | None = None


class StageData:
    """The data of a chain's stages, each read once.

    Args:
        own: the chain's.
    """

    def __init__(self, recipe: ChainRecipe) -> None:
        self.own = load_data(recipe.data)
        self._read = {recipe.data.model_dump_json(): self.own}

    def of(self, stage: Stage) -> DataSplits:
        """What a stage is trained on.

        Raises:
            InputError: data that cannot be read, under the stage's name.
        """
        if stage.recipe is None:
            return self.own
        key = stage.recipe.data.model_dump_json()
        if key not in self._read:
            try:
                self._read[key] = load_data(stage.recipe.data)
            except InputError as error:
                raise InputError.about(f"stages.{stage.name}", str(error)) from None
        return self._read[key]


def check_stages(
    stages: list[Stage], data: StageData, runtime: Runtime, guidance: Sequence[str] = ()
) -> dict[str, Blank]:
    """Builds every stage's networks, untrained, and refuses what would be refused hours later.

    Args:
        guidance: the protocol's, which finished models must know too.
    """
    found: dict[str, Blank] = {}
    for stage in stages:
        try:
            if stage.recipe is None:
                found[stage.name] = Blank(open_teacher(stage.model or "", stage.name))
                check_data(data.own, found[stage.name].model.denoiser)
                check_scales(found[stage.name].model.denoiser, guidance, "evaluation.guidance")
            else:
                found[stage.name] = _blank(stage, stage.recipe, data.of(stage), found, runtime)
        except InputError as error:
            raise InputError.about(f"stages.{stage.name}", str(error)) from None
    return found


def check_baselines(recipe: ChainRecipe, first: Denoiser) -> None:
    """The first stage's model must have the steps that it is to be shown in.

    Raises:
        InputError: for the first baseline that it has not.
    """
    for baseline in recipe.baselines:
        if first.sampler != "ddim":
            mend = "leave them out: the first stage's model is made for all its steps"
            raise InputError("baselines", baseline.steps, mend, problem="cannot be measured")
        try:
            spaced_indices(first.schedule.T, baseline.steps, baseline.spacing)
        except ValueError as error:
            raise InputError("baselines", baseline.steps, str(error)) from None


def _blank(
    stage: Stage,
    recipe: TrainRecipe | DistillRecipe,
    data: DataSplits,
    known: Mapping[str, Blank],
    runtime: Runtime,
) -> Blank:
    if isinstance(recipe, TrainRecipe):
        denoiser = build_denoiser(
            recipe.network, data.shape, data.num_classes, recipe.schedule.build(), recipe.prediction_type, recipe.seed
        )
        method = build_method(recipe.method, Setting(denoiser), recipe.seed)
    else:
        roles = {
            role: known[start].model.denoiser if start in known else open_roles({role: start})[role]
            for role, start in stage.roles.items()
        }
        _, method = prepare_student(recipe, data, respaced(known[stage.of or ""].model, recipe.respace), roles)
    # The chain's protocol counts, not the recipe's own number of sampling steps.
    check_run(recipe, max(method.schedule.T, recipe.evaluation.steps), runtime)
    # The next stage's teacher is read back from its folder, where it is a model of its own steps.
    student = method.student.with_network(copy.deepcopy(method.student.network))
    student.origin = None
    return Blank(Teacher(student.freeze(), method.curriculum, None, None, stage.name, method.guided), method)
