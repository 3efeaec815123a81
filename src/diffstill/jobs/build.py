"""From the words of a recipe to networks, methods and data; every impossible combination is refused here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from pydantic import ValidationError
from torch import Tensor, nn

from ..data.batches import stream_seed
from ..data.dataset import ImageData
from ..data.sources import DataSplits
from ..diffusion.guidance import parse_guidance
from ..diffusion.prediction import PredictionType
from ..diffusion.sampling import steps_mend
from ..diffusion.schedule import NoiseSchedule, spaced_indices
from ..engine.runtime import Runtime
from ..engine.settings import TrainSettings
from ..errors import InputError, counted
from ..methods import METHODS, Curriculum, Method, Setting
from ..models.adapters import FAMILIES, family_of, guided_unet2d, unwrap, with_scale_input
from ..models.adapters.unet2d import in_form_of
from ..models.denoiser import Denoiser
from ..models.folder import LoadedModel, load_model
from ..models.lineage import Lineage
from ..models.loading import COMPONENTS
from ..models.students import inherit, student_for_ratio
from ..recipe import AS_TEACHER, ArmSpec, DistillRecipe, MethodSpec, NetworkSpec, RespaceSpec, TrainRecipe
from ..recipe.problems import one_line


@dataclass(frozen=True)
class Teacher:
    """A teacher as the jobs need it."""

    denoiser: Denoiser
    curriculum: Curriculum | None
    lineage: Lineage | None
    folder: Path | None
    name: str = "teacher"
    guided: bool = True
    """False for one without a live null branch."""
    trained_on: str | None = None
    """Of one that is still to be trained: the fingerprint of its data."""


@contextmanager
def _seeded(seed: int, stream: str) -> Iterator[None]:
    """What is drawn inside is a pure function of the seed; torch's generator is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, stream))
        yield


def build_network(
    spec: NetworkSpec, shape: tuple[int, int, int], num_classes: int, seed: int, field: str = "network"
) -> nn.Module:
    """A freshly initialised network, its weights a pure function of ``seed``.

    Raises:
        InputError: where the options do not fit each other or the images.
    """
    with _seeded(seed, "init"):
        try:
            return FAMILIES[spec.family].build(sample_shape=shape, num_classes=num_classes, **spec.options)
        except InputError:
            raise
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            first = " ".join(str(error).split())[:300]
            raise InputError(field, spec.options, first, problem="cannot be built") from None


def build_denoiser(
    spec: NetworkSpec,
    shape: tuple[int, int, int],
    num_classes: int,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    seed: int,
    field: str = "network",
) -> Denoiser:
    network = build_network(spec, shape, num_classes, seed, field)
    return Denoiser(network, schedule, num_classes, shape, prediction_type)


def build_student(spec: NetworkSpec, method: MethodSpec, teacher: Denoiser, seed: int) -> Denoiser:
    """A student of the teacher's kind of images, fresh or with inherited weights as the recipe or the method says."""
    made = METHODS[method.name]
    if made.scale_input:
        _check_branches(method, made.teacher_needs, teacher)
    shape, classes = teacher.sample_shape, teacher.num_classes
    init = spec.init or made.init
    if teacher.takes_scale and not (made.scale_input or made.keeps_scale):
        mend = "use guided, progressive or encoder"
        problem = "does not teach a student every scale, and this teacher takes the guidance scale as an input"
        raise InputError("method.name", method.name, mend, problem=problem)
    if spec.ratio is not None:
        spec = _smaller(spec, teacher, made.scale_input)
    if spec.family == AS_TEACHER:
        network = _as_teacher(spec, teacher, made.scale_input, init, seed)
    else:
        network = build_network(spec, shape, classes, seed, "student")
        if init != "fresh":
            with _seeded(seed, "init"):
                network = in_form_of(teacher.network, network)
            inherit(teacher.network, network, select="magnitude" if init == "magnitude" else "first")
    student = Denoiser(network, teacher.schedule, classes, shape, teacher.prediction_type)
    if family_of(network).takes_scale(network):
        if not (made.scale_input or teacher.takes_scale):
            mend = f"use a family without that input: {method.name} trains two branches"
            raise InputError("student.family", spec.family, mend, problem="takes the guidance scale")
        student.scale_range = teacher.scale_range or (1.0, 2.0)  # the method that trains the scales says which
    if teacher.origin is None or init != "fresh":  # inherited weights know the teacher's steps by their times
        student.time_index = teacher.time_index
    if teacher.origin is None:
        student.sampler = teacher.sampler
    return student


def _smaller(spec: NetworkSpec, teacher: Denoiser, scale_input: bool) -> NetworkSpec:
    """The teacher's family with so many times fewer parameters, as a network with widths of its own."""
    network = unwrap(teacher.network)
    if not isinstance(network, UNet2DModel):
        mend = f"leave it out, or name a family and its sizes: {', '.join(COMPONENTS)}"
        raise InputError("student.ratio", spec.ratio, mend, problem="needs a teacher that is a UNet2DModel")
    try:
        sizes = student_for_ratio(network.config, spec.ratio or 1.0, sum(p.numel() for p in network.parameters()))
    except InputError as error:
        raise error.renamed("student.ratio") from None
    family = "guided_unet2d" if scale_input or teacher.takes_scale else "unet2d"
    return NetworkSpec.model_validate({"family": family, "init": spec.init, **sizes, **spec.options})


def _as_teacher(spec: NetworkSpec, teacher: Denoiser, scale_input: bool, init: str, seed: int) -> nn.Module:
    """The teacher's network again: its copy, or with weights of its own; with the scale as an input where asked."""
    if init == "magnitude":
        raise InputError("student.init", init, "use inherit or fresh", problem="prunes nothing of a student as large")
    network: Any = unwrap(teacher.network)
    if family_of(network).name not in COMPONENTS:
        mend = f"name a family: {', '.join(COMPONENTS)}"
        raise InputError("student.family", spec.family, mend, problem="cannot be built again")
    if init == "fresh":
        with _seeded(seed, "init"):
            network = type(network).from_config(network.config)
    else:
        network = copy.deepcopy(network)
    if scale_input and not teacher.takes_scale:
        try:
            network = with_scale_input(network, **{**guided_unet2d.OPTIONS, **spec.options})
        except ValueError as error:
            raise InputError("student", spec.options, str(error), problem="cannot be built") from None
    elif spec.options:
        raise InputError("student", spec.options, "leave them out", problem="changes nothing of a copied network")
    made: nn.Module = network.requires_grad_(True).train()
    return made


def build_method(spec: MethodSpec, setting: Setting, seed: int = 0) -> Method:
    """A method; what it initialises itself (a projector, say) is a pure function of ``seed``."""
    with _seeded(seed, "method"):
        made = METHODS[spec.name](setting, spec.build_options())
    if setting.teacher is not None:
        _check_branches(spec, made.teacher_needs, setting.teacher)
    return made


def _check_branches(spec: MethodSpec, needs: frozenset[str], teacher: Denoiser) -> None:
    """A method that learns from both branches needs a teacher that has them."""
    if teacher.unconditional and "null" in needs:
        mend = "use conditional or progressive, or sfddm with null_weight: 0, or a teacher of several classes"
        problem = "needs both branches of its teacher, and this one is unconditional"
        raise InputError("method.name", spec.name, mend, problem=problem)


def build_arm(recipe: DistillRecipe, spec: ArmSpec, teacher: Teacher, seed: int) -> Method:
    """An arm's method around its student: the recipe's, with what the arm overrides.

    Raises:
        InputError: what does not fit each other; settings or scales of the recipe that the method cannot take.
    """
    common = recipe.student
    inherits = spec.student.get("family", common.family) == common.family
    tree = {**(common.model_dump(mode="json") if inherits else {}), **spec.student}
    try:
        network = NetworkSpec.model_validate(tree)
    except ValidationError as error:
        raise one_line(error, NetworkSpec, ("arena", "student")) from None
    student = build_student(network, spec.method, teacher.denoiser, seed)
    method = build_method(spec.method, Setting(student, teacher.denoiser, teacher.curriculum), seed)
    check_live(method, teacher)
    check_training(recipe.training, method)
    if method.guided:
        check_scales(method.student, recipe.evaluation.guidance, "evaluation.guidance")
    return method


def build_arms(recipe: DistillRecipe, arms: Mapping[str, ArmSpec], teacher: Teacher, field: str) -> dict[str, Method]:
    """Every arm's method by name, from the recipe's own seed.

    Raises:
        InputError: as ``build_arm``; an arm's own parts are named ``field.NAME.method`` and ``field.NAME.student``.
    """
    made = {}
    for name, spec in arms.items():
        try:
            made[name] = build_arm(recipe, spec, teacher, recipe.seed)
        except InputError as error:
            own = error.field.partition(".")[0] in ("method", "student")
            raise error.renamed(f"{field}.{name}.{error.field}") if own else error from None
    return made


def check_live(method: Method, teacher: Teacher) -> None:
    """What learns from the null branch needs a teacher whose null branch was trained.

    Raises:
        InputError: a teacher of one scale, or one whose guidance is dead.
    """
    asked = "null" in method.teacher_needs or (method.teacher_needs and method.trains_null)
    if asked and not (teacher.guided or teacher.denoiser.takes_scale):
        mend = "leave its null branch alone (null_weight: 0; of unidad guidance: 1), or take another method or teacher"
        raise InputError("teacher", teacher.name, mend, problem="has no live null branch to learn from")


def open_teacher(model: str, name: str = "teacher") -> Teacher:
    """A teacher from a model folder or hub id, frozen, with its curriculum where it has one."""
    try:
        return as_teacher(load_model(model), name)
    except InputError as error:
        raise error.renamed(f"teacher.{error.field}") from None


def as_teacher(loaded: LoadedModel, name: str = "teacher") -> Teacher:
    denoiser = loaded.denoiser.freeze()
    curriculum = restore_curriculum(loaded.curriculum, loaded.curriculum_meta, denoiser.schedule)
    return Teacher(denoiser, curriculum, loaded.lineage, loaded.folder, name, loaded.guided)


def open_roles(roles: Mapping[str, str]) -> dict[str, Denoiser]:
    """Role -> the finished model that it starts from."""
    found = {}
    for role, model in roles.items():
        try:
            found[role] = load_model(model).denoiser.freeze()
        except InputError as error:
            raise error.renamed(f"roles.{role}") from None
    return found


def same_network(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same weights by name and shape."""
    shapes = [{name: value.shape for name, value in unwrap(n).state_dict().items()} for n in (a, b)]
    return shapes[0] == shapes[1]


def check_roles(roles: Mapping[str, Denoiser], teacher: Denoiser) -> None:
    """What a role starts from may be of another size than the teacher, but must be a model of the same thing.

    Raises:
        InputError: other images, classes, prediction or noise levels, or a network that takes the guidance scale.
    """
    for role, model in roles.items():
        field, problem = f"roles.{role}", "does not fit the teacher"
        if model.takes_scale:
            mend = "use a model with two branches"
            raise InputError(field, "a model that takes the guidance scale", mend, problem=problem)
        for what, mine, wanted in (
            ("images", f"{model.sample_shape}", f"{teacher.sample_shape}"),
            ("classes", f"{model.num_classes}", f"{teacher.num_classes}"),
            ("prediction", model.prediction_type, teacher.prediction_type),
        ):
            if mine != wanted:
                raise InputError(field, f"a model of {what} {mine}", f"use one of {what} {wanted}", problem=problem)
        check_levels(role, model.schedule, teacher.whole[0].schedule)


def check_levels(role: str, schedule: NoiseSchedule, wanted: NoiseSchedule) -> None:
    """What a role starts from must know the teacher's noise levels. A student may be a model of few steps.

    Raises:
        InputError: another schedule.
    """
    if role != "student" and not schedule.same_as(wanted):
        mend = "use a model that was made from the teacher"
        raise InputError(f"roles.{role}", "a model of another noise schedule", mend, problem="does not fit the teacher")


def respaced(teacher: Teacher, spec: RespaceSpec | None) -> Teacher:
    """The teacher seen through fewer of its steps; itself where the recipe says nothing.

    Raises:
        InputError: timesteps that the teacher's schedule does not have.
    """
    if spec is None:
        return teacher
    denoiser = teacher.denoiser
    try:
        if spec.teacher_steps not in (None, denoiser.schedule.T):
            denoiser = denoiser.respaced(spaced_indices(denoiser.schedule.T, spec.teacher_steps or 0, spec.spacing))
        denoiser = denoiser.respaced(spec.indices(denoiser.schedule.T))
    except ValueError as error:
        raise InputError("respace", spec.model_dump(exclude_none=True), str(error), problem="does not fit") from None
    curriculum = teacher.curriculum
    if curriculum is not None:
        curriculum = curriculum.respace(denoiser.schedule, denoiser.whole[1])
    return replace(teacher, denoiser=denoiser, curriculum=curriculum)


def seen_through(teacher: Teacher, student: Denoiser) -> Teacher:
    """The teacher respaced to a finished student's noise levels, where it has them all; else as it is, as for a
    generator of few steps."""
    if student.sampler == "renoise" or student.schedule.same_as(teacher.denoiser.schedule):
        return teacher
    steps = student.schedule.steps_in(teacher.denoiser.schedule)
    return respaced(teacher, RespaceSpec(timesteps=tuple(steps))) if steps else teacher


def check_scales(model: Denoiser, guidance: Sequence[str], field: str) -> None:
    """Guidance must stay where a network that takes the scale was trained.

    Raises:
        InputError: for the first setting that does not.
    """
    if model.scale_range is None:
        return
    low, high = model.scale_range
    T = model.schedule.T
    for text in guidance:
        schedule = parse_guidance(text)
        reached = [schedule(t, T) for t in range(T)]
        if not low <= min(reached) <= max(reached) <= high:
            problem = f"leaves the scales that this model knows, {low:g} to {high:g}"
            raise InputError(field, text, f"stay within {low:g} and {high:g}", problem=problem)


def restore_curriculum(
    tensors: Mapping[str, Tensor] | None, meta: Mapping[str, str] | None, schedule: NoiseSchedule
) -> Curriculum | None:
    return None if tensors is None else Curriculum.from_table(tensors, meta or {}, schedule)


def check_data(data: DataSplits, denoiser: Denoiser, whose: str = "teacher") -> None:
    """The images must be what the model was made for.

    Raises:
        InputError: other image size, channels or number of classes.
    """
    if data.shape != denoiser.sample_shape:
        c, h, _ = denoiser.sample_shape
        mend = f"set data.size={h} and data.channels={c} to match the {whose}"
        raise InputError("data", f"{data.shape[0]}x{data.shape[1]}x{data.shape[2]}", mend, problem="has another shape")
    if data.num_classes != denoiser.num_classes:
        mend = f"use data with the {whose}'s {counted(denoiser.num_classes, 'class')}"
        raise InputError("data", counted(data.num_classes, "class"), mend, problem="does not fit")


def check_run(recipe: TrainRecipe | DistillRecipe, T: int, runtime: Runtime) -> None:
    """What neither the schema nor the networks can tell.

    Raises:
        InputError: sampling steps that the model does not have, or a batch that the processes cannot share.
    """
    if mend := steps_mend(T, recipe.evaluation.steps):
        raise InputError("evaluation.steps", recipe.evaluation.steps, mend)
    if recipe.training.batch_size % runtime.world:
        mend = f"use a multiple of the {runtime.world} processes"
        raise InputError("training.batch_size", recipe.training.batch_size, mend)


def check_training(settings: TrainSettings, method: Method) -> None:
    """Settings that a method which calls all networks by itself could not honour are refused, not passed over.

    Raises:
        InputError: for the first of them.
    """
    if not method.own_calls:
        return
    if settings.teacher_reuse > 1:
        problem = f"would only repeat batches: {method.name} keeps no output of a teacher"
        raise InputError("training.teacher_reuse", settings.teacher_reuse, "use 1", problem=problem)
    if settings.teacher_precision not in ("auto", settings.precision):
        problem = f"is not training.precision: {method.name} takes differences of networks, which must round alike"
        raise InputError("training.teacher_precision", settings.teacher_precision, "use auto", problem=problem)
    if settings.compile is True:
        problem = f"has nothing to compile: {method.name} asks parts of its networks"
        raise InputError("training.compile", True, "use auto", problem=problem)


def check_steps(recipe: DistillRecipe, teacher: Denoiser, student: Denoiser) -> None:
    """The protocol's numbers of steps must be ones that student and teacher have.

    Raises:
        InputError: another number than all for a stochastic student, more for the teacher than it has.
    """
    asked, T = recipe.evaluation.steps, student.schedule.T
    if student.sampler == "stochastic" and asked != T:
        raise InputError("evaluation.steps", asked, f"use {T}: a model for the stochastic sampler takes all its steps")
    whole, _ = teacher.whole
    steps = recipe.evaluation.teacher_steps
    if steps is not None and (mend := steps_mend(whole.schedule.T, steps)):
        raise InputError("evaluation.teacher_steps", steps, f"use null, or {mend.removeprefix('use ')}")


def probe_data(data: DataSplits) -> ImageData:
    """Where guidance is watched during training: the validation images, or the training images where there are none."""
    return data.val if len(data.val) else data.train
