"""``diffstill train``: a class-conditional model from data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.sources import DataSplits, load_data
from ..engine.runtime import Runtime
from ..errors import InputError
from ..methods import Setting
from ..methods.base import Method
from ..models.denoiser import Denoiser
from ..models.folder import load_model, save_model
from ..models.lineage import DataRef, Lineage
from ..recipe import AnyRecipe, DistillRecipe, TrainRecipe, resolved
from ..report.receipt import Receipt, TrainingSummary
from .build import Teacher, as_teacher, build_denoiser, build_method, check_run
from .finish import Subject, evaluator_for, finish_run
from .folder import RunFolder
from .stage import Planned, run_stage, summarise
from .ui import Ui

USUAL = "2"
"""Guidance of a model whose best one is not known yet."""


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: Path
    receipt: Receipt | None
    already: bool = False
    """True when an earlier call had done it all."""


def save_trained(
    folder: Path,
    student: Denoiser,
    method: Method,
    *,
    recipe: TrainRecipe | DistillRecipe,
    data: DataSplits,
    images: int,
    teacher: Lineage | None = None,
    name: str | None = None,
    default_guidance: str = USUAL,
    seed: int | None = None,
    **card: Any,
) -> Lineage:
    """The model folder of a trained EMA network, with its curriculum and lineage."""
    curriculum = method.curriculum
    tensors = dict(method.artefacts())
    if student.scale_range is not None and default_guidance == USUAL:
        default_guidance = f"{min(max(float(USUAL), student.scale_range[0]), student.scale_range[1]):g}"
    lineage = Lineage.new(
        name or recipe.name,
        method.name,
        recipe=resolved(recipe),
        data=DataRef(name=data.name, fingerprint=data.train.fingerprint()),
        teacher=teacher,
        timesteps=method.teacher.whole[1].tolist() if method.teacher and method.teacher.origin else (),
        images_seen=images,
        seeds=[recipe.seed if seed is None else seed],
    )
    return save_model(
        student,
        folder,
        lineage=lineage,
        class_names=data.class_names,
        guided=method.guided,
        default_guidance=default_guidance,
        curriculum=tensors or None,
        curriculum_meta=curriculum.meta() if curriculum is not None and tensors else None,
        **card,
    )


def untrained(recipe: TrainRecipe, data: DataSplits) -> Method:
    """The recipe's method around its fresh network."""
    denoiser = build_denoiser(
        recipe.network, data.shape, data.num_classes, recipe.schedule.build(), recipe.prediction_type, recipe.seed
    )
    return build_method(recipe.method, Setting(denoiser), recipe.seed)


def train_teacher(
    recipe: TrainRecipe, data: DataSplits, work: Path, model: Path, runtime: Runtime, ui: Ui
) -> tuple[Teacher, TrainingSummary, list[str]]:
    """Trains (or resumes, or finds finished) the recipe's network in ``work`` and saves it as ``model``; with the
    training's warnings."""
    method = untrained(recipe, data)
    trainer = run_stage(
        [Planned(recipe.name, method)],
        title=f"train {recipe.name}",
        data=data,
        flip=recipe.data.flip,
        settings=recipe.training,
        seed=recipe.seed,
        runtime=runtime,
        run_dir=work,
        ui=ui,
    )
    arm = trainer.arms[0]
    if runtime.is_main:
        save_trained(model, arm.student, method, recipe=recipe, data=data, images=arm.images)
    runtime.barrier()
    summary = summarise(trainer, arm, recipe.name, str((work / "log.jsonl").relative_to(model.parent)))
    # Read back from disk: what is distilled from and evaluated is what was saved.
    loaded = load_model(model, runtime.device)
    return as_teacher(loaded, recipe.name), summary, trainer.warnings


def train(recipe: TrainRecipe, out: Path, runtime: Runtime, ui: Ui, *, fresh: bool = False) -> Finished:
    """A whole ``diffstill train``: training, evaluation, receipt, report.

    Raises:
        InputError: data, network or folder that do not fit, before anything is written.
        RunFailed, Interrupted: see ``Trainer.run``.
    """
    data = load_data(recipe.data)
    untrained(recipe, data)
    check_run(recipe, recipe.schedule.num_train_timesteps, runtime)
    inputs = {"data": data.fingerprint()}
    folder = RunFolder(out, resolved(recipe), inputs, fresh=fresh, write=runtime.is_main)
    if folder.finished:
        return Finished(out, Receipt.load(folder.receipt), already=True)
    evaluator = evaluator_for(recipe.evaluation, data, runtime, ui, out)
    folder.claim()
    runtime.barrier()
    teacher, summary, warnings = train_teacher(recipe, data, out, folder.model, runtime, ui)
    subject = Subject("teacher", teacher.denoiser, recipe.method.name, folder.model, teacher.guided)
    receipt = finish_run(
        "train", recipe, data, folder, [subject], [summary], evaluator=evaluator, runtime=runtime, ui=ui,
        warnings=warnings,
    )  # fmt: skip
    return Finished(out, receipt)


def require_kind(recipe: AnyRecipe, kind: str) -> None:
    """The command must fit the recipe."""
    if recipe.kind != kind:
        raise InputError(
            "recipe", recipe.name, f"run: diffstill {recipe.kind} {recipe.name}", problem=f"is no {kind} recipe"
        )
