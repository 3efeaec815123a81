"""``diffstill eval`` and ``diffstill sample``: models that exist already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.sources import DataSpec, load_data
from ..diffusion.guidance import Constant, GuidanceSchedule, parse_guidance
from ..diffusion.sampling import ClipMode, steps_mend, usual_steps
from ..engine.runtime import Runtime
from ..errors import InputError, RunFailed
from ..evaluation.guidance_fidelity import check_comparable
from ..evaluation.samples import write_samples
from ..evaluation.sampling import sample_images
from ..models.denoiser import Denoiser
from ..models.folder import LoadedModel, load_model
from ..recipe import EvaluationSpec, override_section, section_of
from ..report.page import write_report
from ..report.pictures import grid, plain, save_png
from ..report.receipt import Receipt, environment
from .build import as_teacher, check_data, check_scales, seen_through
from .finish import (
    Subject,
    ancestry,
    baselines_of,
    check_out,
    describe_data,
    draw_pictures,
    draw_shots,
    evaluate_subjects,
    evaluator_for,
    teacher_subjects,
)
from .train import Finished
from .ui import Ui


def guidance_of(text: str | None, model: LoadedModel) -> GuidanceSchedule:
    """The asked guidance, or the model's own default.

    Raises:
        InputError: text that is no guidance, or a scale for a model whose guidance is not live.
    """
    try:
        made = parse_guidance(text if text is not None else model.default_guidance)
    except ValueError as error:
        raise InputError("guidance", text, str(error).rpartition("; ")[2]) from None
    if not model.guided and text is not None and made != Constant(1.0):
        why = "is unconditional" if model.denoiser.unconditional else "has one scale baked in"
        raise InputError("guidance", text, "leave it out", problem=f"cannot be set: this model {why}")
    if model.guided:
        check_scales(model.denoiser, [str(made)], "guidance")
    return made


def default_steps(model: Denoiser) -> int:
    """50, or all of a model that has few or that takes all or none."""
    return usual_steps(model.schedule.T) if model.sampler == "ddim" else model.schedule.T


def check_own_steps(model: Denoiser, steps: int | None, field: str) -> None:
    """Steps asked of a model that can be sampled in several numbers of them; the samplers check the others.

    Raises:
        InputError: none, more than it has, or a number that leaves its noisy end out.
    """
    if steps is None or model.sampler != "ddim":
        return
    if mend := steps_mend(model.schedule.T, steps):
        raise InputError(field, steps, mend)


def label_number(word: str, classes: int) -> int | None:
    """The label, of 0..classes-1, that a word is the number of; None for any other word."""
    return int(word) if re.fullmatch("[0-9]{1,9}", word) and int(word) < classes else None


def parse_labels(text: str | None, class_names: Sequence[str]) -> list[int] | None:
    """``"0,1,2"`` or class names, comma-separated."""
    if text is None:
        return None
    found = []
    for word in (part.strip() for part in text.split(",")):
        if word in class_names:
            found.append(class_names.index(word))
        elif (number := label_number(word, len(class_names))) is not None:
            found.append(number)
        else:
            shown = ", ".join(class_names[:10]) + ("..." if len(class_names) > 10 else "")
            raise InputError("labels", word, f"use 0..{len(class_names) - 1} or names: {shown}")
    return found


def sample(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    *,
    guidance: str | None = None,
    steps: int | None = None,
    labels: str | None = None,
    count: int | None = None,
    seed: int = 0,
    clip: ClipMode = "recompute",
    batch_size: int = 256,
) -> Path:
    """Draws images into one PNG grid (``out`` ends in .png), one array (``.npz``), or one PNG an image (a folder)."""
    model = load_model(source, runtime.device)
    scale = guidance_of(guidance, model)
    check_own_steps(model.denoiser, steps, "steps")
    wanted = parse_labels(labels, model.class_names)
    if count is not None and count < 1:
        raise InputError("n", count, "ask for one image or more")
    if out.suffix and out.suffix.lower() not in (".png", ".npz"):
        raise InputError("out", str(out), "name a .png file for a grid, an .npz file, or a folder for single images")
    if not out.suffix and any(out.glob("[0-9]*-*.png")):
        problem = "holds images of an earlier call, which an evaluation of the folder would count in"
        raise InputError("out", str(out), "name another folder, or delete them", problem=problem)
    if seed < 0:
        raise InputError("seed", seed, "use 0 or a greater whole number")
    per_row = 8
    if wanted is None:
        classes = torch.arange(len(model.class_names))
        wanted = (torch.arange(count) % len(classes) if count else classes.repeat_interleave(per_row)).tolist()
    elif count:
        wanted = (wanted * count)[:count]
    with ui.bar("sample", len(wanted)) as bar:
        images = sample_images(
            model.denoiser,
            len(wanted),
            guidance=scale,
            steps=default_steps(model.denoiser) if steps is None else steps,
            seed=seed,
            batch_size=batch_size,
            clip=clip,
            labels=torch.tensor(wanted),
            guided=model.guided,
            progress=bar.update,
        )
    try:
        if out.suffix.lower() == ".npz":
            made = {"model": source, "guidance": str(scale), "seed": seed, "clip": clip}
            write_samples(out, images, torch.tensor(wanted), made)
        elif out.suffix.lower() == ".png":
            out.parent.mkdir(parents=True, exist_ok=True)
            save_png(grid(images, min(per_row, len(images))), out)
        else:
            out.mkdir(parents=True, exist_ok=True)
            for number, (image, label) in enumerate(zip(images, wanted, strict=True)):
                name = re.sub(r"[^\w.-]+", "_", model.class_names[label])
                save_png(plain(image), out / f"{number:06d}-{name}.png")
    except OSError as error:
        raise RunFailed(f"cannot write {out}: {error}") from error
    return out


def evaluate(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    *,
    teacher: str | None = None,
    data: str | None = None,
    data_overrides: Sequence[str] = (),
    spec: EvaluationSpec | None = None,
) -> Finished:
    """Measures a model (against its teacher, where one is named) and writes a receipt and a report.

    Without ``data`` and ``spec``, the data and protocol of the model's own recipe are used. ``data_overrides`` are
    ``key=value`` of the data section (``limit=300``), over either.
    """
    model = load_model(source, runtime.device)
    recipe: Mapping[str, Any] = model.lineage.recipe if model.lineage else {}
    data_spec = _data_spec(recipe, data, data_overrides)
    # A chain's protocol may be of more steps than a stage's model has.
    spec = spec or _in_own_steps(own_protocol(recipe), model)
    check_own_steps(model.denoiser, spec.steps, "evaluation.steps")
    check_out(out)
    splits = load_data(data_spec)
    check_data(splits, model.denoiser, "model")
    if model.guided:
        check_scales(model.denoiser, spec.guidance, "evaluation.guidance")
    name = model.lineage.name if model.lineage else model.folder.name
    method = model.lineage.method if model.lineage else ""
    subjects = [Subject("model", model.denoiser, method, model.folder, model.guided)]
    if teacher is not None:
        loaded = load_model(teacher, runtime.device)
        check_data(splits, loaded.denoiser)
        made = seen_through(as_teacher(loaded), model.denoiser)
        student = replace(subjects[0], role="student", against=made.denoiser)
        subjects = [*teacher_subjects(made, spec), student]
        for subject in subjects[:-1]:
            check_own_steps(subject.denoiser, subject.steps or spec.steps, "evaluation.steps")
        if model.guided and student.denoiser.sampler not in ("encode", "renoise"):
            check_comparable(student.denoiser, made.denoiser, splits.test if len(splits.test) else splits.train)
    evaluator = evaluator_for(spec, splits, runtime, ui, out)
    models = evaluate_subjects(subjects, evaluator, runtime, ui)
    receipt = Receipt(
        kind="eval",
        name=name,
        recipe=recipe,
        seed=int(recipe.get("seed", 0)),
        environment=environment(runtime.device),
        data=describe_data(splits),
        protocol=evaluator.protocol,
        models=models,
        baselines=baselines_of(evaluator),
        lineage=ancestry([s.folder for s in subjects if s.folder]),
    )
    if runtime.is_main:
        for subject in subjects:
            found = models[subject.role]
            found.images.update(draw_pictures(subject, found, splits, out, few_shot=evaluator.few_shot))
        draw_shots(receipt.baselines, splits, out)
        write_report(receipt, out, out / "report.html")
        receipt.save(out / "receipt.json")
    runtime.barrier()
    return Finished(out, receipt)


def own_protocol(recipe: Mapping[str, Any]) -> EvaluationSpec:
    """That of a model's own recipe. No other section is read: its method may be one that is not known here."""
    return section_of(EvaluationSpec, recipe.get("evaluation", {}), "evaluation")


def _data_spec(recipe: Mapping[str, Any], data: str | None, overrides: Sequence[str]) -> DataSpec:
    """The data asked for, or the recipe's, with overrides applied."""
    if data is not None:
        spec = DataSpec.parse(data)
    elif recipe:
        spec = section_of(DataSpec, recipe.get("data", {}), "data")
    else:
        raise InputError("data", None, "name it with --data, e.g. --data digits", problem="is not known from the model")
    return override_section(spec, overrides, "data")


def of_data(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides that begin with ``data.``, without it, and the others, which are the protocol's: with or without the
    section's name that they have in a recipe."""
    mine = [item.removeprefix("data.") for item in overrides if item.startswith("data.")]
    return mine, [item.removeprefix("evaluation.") for item in overrides if not item.startswith("data.")]


def protocol_of(source: str, overrides: Sequence[str]) -> EvaluationSpec | None:
    """The protocol asked for on the command line (``samples=5000 steps=20``), over the model's own; None: its own."""
    if not overrides:
        return None
    model = load_model(source)
    own = own_protocol(model.lineage.recipe if model.lineage else {})
    return override_section(_in_own_steps(own, model), overrides, "evaluation")


def _in_own_steps(spec: EvaluationSpec, model: LoadedModel) -> EvaluationSpec:
    """A protocol whose number of steps the model has. Of a generator of few steps, it is its teacher's."""
    if model.denoiser.sampler == "renoise":
        return spec
    return spec.model_copy(update={"steps": usual_steps(model.denoiser.schedule.T, spec.steps)})
