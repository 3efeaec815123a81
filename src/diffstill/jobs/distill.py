"""``diffstill distill``: a student from a teacher, which is trained first where the recipe says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..data.sources import DataSplits, load_data
from ..engine.loop import Trainer
from ..engine.runtime import Runtime
from ..errors import InputError, RunFailed
from ..evaluation.guidance_fidelity import FidelityProbe
from ..methods import METHODS, Method, Setting
from ..models.denoiser import Denoiser, identity
from ..models.folder import load_model
from ..recipe import DistillRecipe, TrainRecipe, load_recipe, resolved, without_places
from ..report.receipt import Receipt, TrainingSummary
from .build import (
    Teacher,
    build_arms,
    build_denoiser,
    build_method,
    build_student,
    check_data,
    check_live,
    check_roles,
    check_run,
    check_scales,
    check_steps,
    check_training,
    open_roles,
    open_teacher,
    probe_data,
    respaced,
)
from .finish import Subject, evaluator_for, few_steps_subjects, finish_run, teacher_subjects
from .folder import RunFolder
from .stage import Planned, run_stage, summarise
from .subject import distill_subject
from .train import Finished, save_trained, train_teacher
from .ui import Ui

PROBE_PAIRS = 128


def teacher_recipe(recipe: DistillRecipe) -> TrainRecipe | None:
    """The recipe that makes the teacher, on the data it is trained on; None where the teacher is a finished model.

    Raises:
        InputError: where it is no training recipe.
    """
    if recipe.teacher.recipe is None:
        return None
    try:
        made = load_recipe(recipe.teacher.recipe, recipe.teacher.overrides)
    except InputError as error:
        inner = error.field in ("recipe", "extends")
        raise error.renamed(f"teacher.{error.field}" if inner else f"teacher.overrides.{error.field}") from None
    if not isinstance(made, TrainRecipe):
        mend = "name a recipe of kind: train"
        raise InputError("teacher.recipe", recipe.teacher.recipe, mend, problem="trains no teacher")
    return made if recipe.teacher.data == "own" else made.model_copy(update={"data": recipe.data})


def teacher_data(upstream: TrainRecipe, recipe: DistillRecipe, data: DataSplits) -> DataSplits:
    """What the teacher is trained on: the student's ``data``, or its own."""
    return load_data(upstream.data) if recipe.teacher.data == "own" else data


def blank_teacher(recipe: DistillRecipe, data: DataSplits) -> Teacher:
    """The teacher as far as it is known before it is trained: a finished model, or its recipe's untrained network."""
    if recipe.teacher.pipeline is not None:
        problem = "is a text-to-image pipeline, which this command does not take"
        raise InputError("teacher.pipeline", recipe.teacher.pipeline, "use diffstill distill", problem=problem)
    upstream = teacher_recipe(recipe)
    if upstream is None:
        return respaced(open_teacher(recipe.teacher.model or ""), recipe.respace)
    own = teacher_data(upstream, recipe, data)
    denoiser = build_denoiser(
        upstream.network,
        own.shape,
        own.num_classes,
        upstream.schedule.build(),
        upstream.prediction_type,
        upstream.seed,
        "teacher.network",
    )
    method = build_method(upstream.method, Setting(denoiser))
    teacher = Teacher(denoiser, method.curriculum, None, None, guided=method.guided, trained_on=own.fingerprint())
    return respaced(teacher, recipe.respace)


def inputs_of(recipe: DistillRecipe, data: DataSplits, teacher: Teacher) -> dict[str, Any]:
    """What the recipe only names, for the run folder's identity: the data, and the teacher's recipe or weights."""
    upstream = teacher_recipe(recipe)
    if upstream:
        named: dict[str, Any] = {"recipe": without_places(resolved(upstream)), "data": teacher.trained_on}
    else:
        named = {"model": identity(teacher.denoiser, teacher.guided)}
    roles = {role: identity(model) for role, model in open_roles(recipe.roles).items()}
    return {"data": data.fingerprint(), "teacher": named} | ({"roles": roles} if roles else {})


def prepare_student(
    recipe: DistillRecipe, data: DataSplits, teacher: Teacher, initial: Mapping[str, Denoiser] | None = None
) -> tuple[Denoiser, Method]:
    """Student and method. What can be refused (shapes, widths, schedules, options) is refused here, before a teacher is
    trained or a file is written.

    Args:
        initial: role -> the model that it starts from; None: those that the recipe names.
    """
    check_data(data, teacher.denoiser)
    student = build_student(recipe.student, recipe.method, teacher.denoiser, recipe.seed)
    roles = open_roles(recipe.roles) if initial is None else initial
    check_roles(roles, teacher.denoiser)
    setting = Setting(student, teacher.denoiser, teacher.curriculum, roles)
    method = build_method(recipe.method, setting, recipe.seed)
    check_training(recipe.training, method)
    check_live(method, teacher)
    asked = [*recipe.evaluation.guidance, *filter(None, [recipe.evaluation.default_guidance])]
    for model in (method.student, teacher.denoiser):
        if method.guided:
            check_scales(model, asked, "evaluation.guidance")
    return student, method


def obtain_teacher(
    recipe: DistillRecipe, data: DataSplits, folder: RunFolder, runtime: Runtime, ui: Ui
) -> tuple[Teacher, list[TrainingSummary], list[str]]:
    """The teacher: opened, or trained into ``<run>/teacher`` by its own recipe; with that training's warnings."""
    upstream = teacher_recipe(recipe)
    if upstream is None:
        teacher = open_teacher(recipe.teacher.model or "")
        teacher.denoiser.network.to(runtime.device)
        return respaced(teacher, recipe.respace), [], []
    own = teacher_data(upstream, recipe, data)
    teacher, summary, warnings = train_teacher(
        upstream, own, folder.path / "stages" / "teacher", folder.path / "teacher", runtime, ui
    )
    return respaced(teacher, recipe.respace), [summary], warnings


def train_student(
    recipe: DistillRecipe,
    data: DataSplits,
    teacher: Teacher,
    work: Path,
    model: Path,
    runtime: Runtime,
    ui: Ui,
    name: str | None = None,
    initial: Mapping[str, Denoiser] | None = None,
) -> Trainer:
    """Trains (or resumes, or finds finished) the recipe's student in ``work`` and saves it as ``model``.

    Args:
        name: of the student; None: the recipe's.
        initial: see ``prepare_student``.

    Returns:
        The trainer; its first arm is the student, the others those beside it.

    Raises:
        RunFailed, Interrupted: see ``Trainer.run``.
    """
    name = name or recipe.name
    _, method = prepare_student(recipe, data, teacher, initial)
    probe = None
    if METHODS[recipe.method.name].guided and not teacher.denoiser.unconditional:
        probe = FidelityProbe(teacher.denoiser, probe_data(data), pairs=PROBE_PAIRS, seed=recipe.seed)
    beside = build_arms(recipe, recipe.beside, teacher, "beside")
    trainer = run_stage(
        [Planned(name, method), *(Planned(arm, other) for arm, other in beside.items())],
        title=f"distill {name}",
        data=data,
        flip=recipe.data.flip,
        settings=recipe.training,
        seed=recipe.seed,
        runtime=runtime,
        run_dir=work,
        ui=ui,
        teacher=teacher.denoiser,
        probe=probe,
        timed=bool(beside),
    )
    arm = trainer.arms[0]
    if arm.failed is not None:
        raise RunFailed(f"{arm.failed}; try a lower training.lr or training.precision=fp32")
    if runtime.is_main:
        save_trained(
            model, arm.student, method, recipe=recipe, data=data, images=arm.images, teacher=teacher.lineage, name=name
        )
    runtime.barrier()
    return trainer


def distill(
    recipe: DistillRecipe,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    *,
    fresh: bool = False,
    kind: Literal["distill", "demo"] = "distill",
) -> Finished:
    """A whole ``diffstill distill``: teacher where needed, student, evaluation of both, receipt, report.

    Raises:
        InputError: data, networks or folder that do not fit, before anything is written.
        RunFailed, Interrupted: see ``Trainer.run``.
    """
    if recipe.teacher.pipeline is not None:
        return distill_subject(recipe, out, runtime, ui, fresh=fresh)
    data = load_data(recipe.data)
    blank = blank_teacher(recipe, data)
    _, method = prepare_student(recipe, data, blank)
    build_arms(recipe, recipe.beside, blank, "beside")
    check_run(recipe, blank.denoiser.schedule.T, runtime)
    check_steps(recipe, blank.denoiser, method.student)
    folder = RunFolder(out, resolved(recipe), inputs_of(recipe, data, blank), fresh=fresh, write=runtime.is_main)
    if folder.finished:
        return Finished(out, Receipt.load(folder.receipt), already=True)
    evaluator = evaluator_for(recipe.evaluation, data, runtime, ui, out)
    folder.claim()
    runtime.barrier()
    teacher, summaries, warnings = obtain_teacher(recipe, data, folder, runtime, ui)
    trainer = train_student(recipe, data, teacher, out, folder.model, runtime, ui)
    arm, *others = trainer.arms
    method = arm.method
    summaries.append(summarise(trainer, arm, recipe.name, "log.jsonl"))
    loaded = load_model(folder.model, runtime.device)
    subjects = [
        *teacher_subjects(teacher, recipe.evaluation),
        *few_steps_subjects(loaded.denoiser, teacher),
        Subject(
            "student",
            loaded.denoiser,
            method.name,
            folder.model,
            method.guided,
            against=teacher.denoiser,
        ),
        *(
            Subject(o.name, o.student, o.method.name, None, o.method.guided, against=teacher.denoiser)
            for o in others
            if o.failed is None
        ),
    ]
    receipt = finish_run(
        kind, recipe, data, folder, subjects, summaries, evaluator=evaluator, runtime=runtime, ui=ui,
        warnings=list(dict.fromkeys([*warnings, *trainer.warnings])),
    )  # fmt: skip
    return Finished(out, receipt)
