"""After the training: evaluation, pictures, receipt, report and the model card's figures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import ValidationError

from ..data.dataset import to_float, to_uint8
from ..data.sources import DataSplits, load_data
from ..diffusion.guidance import parse_guidance
from ..diffusion.sampling import usual_steps
from ..engine.runtime import Runtime
from ..errors import InputError
from ..evaluation.distances import make_distance
from ..evaluation.encoding import decode, encode
from ..evaluation.features import Extractor, make_extractor
from ..evaluation.few_shot import FewShotFigures
from ..evaluation.protocol import REPLICATED, EvalSettings, Evaluator
from ..evaluation.results import ModelEvaluation, Protocol
from ..evaluation.samples import SampleStore
from ..evaluation.sampling import sample_images
from ..models.denoiser import Denoiser
from ..models.folder import load_model, save_model
from ..recipe import DistillRecipe, EvaluationSpec, TrainRecipe, resolved
from ..report import words
from ..report.page import write_report
from ..report.pictures import class_grid, grid, pairs_grid, save_png
from ..report.receipt import Ancestor, DataSummary, Receipt, TrainingSummary, environment
from .build import Teacher
from .folder import RunFolder
from .ui import Bar, Ui

GRID_PER_CLASS = 8
SWEEP_IMAGES = 10
PAIRS = 16
"""Samples that are shown above their nearest shots."""
SHOTS_SHOWN, SHOTS_A_ROW = 40, 10
GRID_SEED = 12345
"""Pictures come from their own noise stream, the same for every model."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, under its role."""

    role: str
    denoiser: Denoiser
    method: str
    folder: Path | None
    """Where it is saved; None for a model that is measured and thrown away, and for a second view of one."""
    guided: bool = True
    against: Denoiser | None = None
    """The teacher that its guidance gap is compared with."""
    steps: int | None = None
    """Sampling steps; None: the protocol's, or all of a model that takes all its steps."""

    @property
    def own_steps(self) -> int | None:
        """Steps other than the protocol's."""
        return self.denoiser.schedule.T if self.steps is None and self.denoiser.sampler != "ddim" else self.steps


def teacher_subjects(teacher: Teacher, spec: EvaluationSpec) -> list[Subject]:
    """The teacher; where the student has fewer steps, the whole teacher at its own and the one strided over theirs."""
    method = teacher.lineage.method if teacher.lineage else ""
    if teacher.denoiser.origin is None:
        return [Subject("teacher", teacher.denoiser, method, teacher.folder, teacher.guided)]
    whole, _ = teacher.denoiser.whole
    if whole.sampler != "ddim":  # made for all its steps, and for no others
        return [Subject("teacher", whole, method, teacher.folder, teacher.guided, steps=whole.schedule.T)]
    steps = spec.teacher_steps or usual_steps(whole.schedule.T)
    return [
        Subject("teacher", whole, method, teacher.folder, teacher.guided, steps=steps),
        Subject("strided-teacher", teacher.denoiser, method, None, teacher.guided),
    ]


def few_steps_subjects(student: Denoiser, teacher: Teacher) -> list[Subject]:
    """Beside a generator of few steps what doing nothing would give: the teacher's network in the same steps."""
    if student.sampler != "renoise":
        return []
    name, K = f"teacher@{student.schedule.T}-renoise", student.schedule.T
    return [Subject(name, student.with_network(teacher.denoiser.network), "", None, guided=False, steps=K)]


def check_out(out: Path) -> None:
    """An evaluation must not write over a run.

    Raises:
        InputError: a folder that holds one, finished or not, or a file.
    """
    if out.is_file():
        raise InputError("out", str(out), "give a folder", problem="is a file")
    marks = ("recipe.yaml", "inputs.json", "checkpoints", "arena.json")
    run = any((out / mark).exists() for mark in marks)
    if run or ((out / "receipt.json").exists() and Receipt.load(out / "receipt.json").kind != "eval"):
        raise InputError("out", str(out), "name another folder", problem="holds a run, whose receipt would be lost")


def extractor_for(spec: EvaluationSpec, data: DataSplits, runtime: Runtime, ui: Ui) -> Extractor:
    """The protocol's extractor. A classifier that the cache does not hold is trained, which takes minutes and a bar."""
    with ExitStack() as shown:
        bars: list[Bar] = []

        def tell(done: float) -> None:
            if not bars:
                bars.append(shown.enter_context(ui.bar("train the classifier that measures, once for this data", 1.0)))
            bars[0].update(done)

        return make_extractor(spec.extractor, data, device=runtime.device, source=spec.source, progress=tell)


def evaluator_for(
    spec: EvaluationSpec, data: DataSplits, runtime: Runtime, ui: Ui, out: Path | None = None
) -> Evaluator:
    """The evaluator of a recipe's protocol; made before training, so that a missing extractor is said at once.

    Args:
        out: the run's folder, under which samples are kept where the recipe says so; None keeps none.
    """
    extractor = extractor_for(spec, data, runtime, ui)
    settings = EvalSettings(
        samples=spec.samples,
        steps=spec.steps,
        guidance=spec.guidance,
        seeds=spec.seeds,
        pairs=spec.pairs,
        clip=spec.clip,
        batch_size=spec.batch_size,
        cost_batches=spec.latency_batches,
    )
    source = load_data(spec.source).train if spec.source is not None else None
    distance = make_distance(spec.distance, extractor, runtime.device)
    store = SampleStore(out / "samples") if spec.keep_samples and out is not None else None
    return Evaluator(data, extractor, settings, source=source, distance=distance, store=store)


def baselines_of(evaluator: Evaluator) -> dict[str, ModelEvaluation]:
    """What is measured in a model's place: of few-shot data, the shots themselves. All processes take part."""
    return {REPLICATED: evaluator.replicate()} if evaluator.few_shot is not None else {}


def held_evaluation(file: Path) -> ModelEvaluation | None:
    """One that was measured before; None where there is none."""
    try:
        return ModelEvaluation.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError):  # none yet, or one that was cut off: measured again
        return None


def evaluate_subjects(
    subjects: Sequence[Subject], evaluator: Evaluator, runtime: Runtime, ui: Ui
) -> dict[str, ModelEvaluation]:
    """Every subject under one protocol. Cost only of saved models."""
    return {
        subject.role: evaluate_subject(subject, evaluator, runtime, ui, cost=subject.folder is not None)
        for subject in subjects
    }


def evaluate_subject(
    subject: Subject, evaluator: Evaluator, runtime: Runtime, ui: Ui, *, cost: bool, name: str | None = None
) -> ModelEvaluation:
    """One subject under the protocol.

    Args:
        name: on the screen; None: its role.
    """
    for model in (subject.denoiser, subject.against):
        if model is not None:
            # One memory layout for all, or their latencies would not compare; training may have left another.
            runtime.place(model.network, channels_last=False)
    with ui.bar(f"evaluate {name or subject.role}", 1.0) as bar:
        bar.update(0.0)
        return evaluator.evaluate(
            subject.denoiser,
            subject.role,
            subject.method,
            teacher=subject.against,
            guided=subject.guided,
            steps=subject.own_steps,
            cost=cost,
            progress=bar.update,
        )


def finish_run(
    kind: Literal["train", "distill", "demo"],
    recipe: TrainRecipe | DistillRecipe,
    data: DataSplits,
    folder: RunFolder,
    subjects: Sequence[Subject],
    summaries: list[TrainingSummary],
    *,
    evaluator: Evaluator,
    runtime: Runtime,
    ui: Ui,
    warnings: Sequence[str] = (),
) -> Receipt:
    """Evaluates, draws, writes ``report.html`` and ``receipt.json``; the receipt last, as the mark of a whole run."""
    models = evaluate_subjects(subjects, evaluator, runtime, ui)
    receipt = Receipt(
        kind=kind,
        name=recipe.name,
        recipe=resolved(recipe),
        seed=recipe.seed,
        environment=environment(runtime.device),
        data=describe_data(data),
        protocol=evaluator.protocol,
        models=models,
        baselines=baselines_of(evaluator),
        # The first process alone reads the folders: it is about to write them again.
        lineage=ancestry([s.folder for s in subjects if s.folder]) if runtime.is_main else [],
        training=summaries,
        warnings=list(warnings),
    )
    if runtime.is_main:
        for subject in subjects:
            evaluation = models[subject.role]
            evaluation.images.update(draw_pictures(subject, evaluation, data, folder.path, few_shot=evaluator.few_shot))
            if subject.folder and subject.folder.parent == folder.path:
                guidance = recipe.evaluation.default_guidance
                refresh_card(subject.folder, evaluation, folder.path, guidance, evaluator.protocol)
        draw_shots(receipt.baselines, data, folder.path)
        write_report(receipt, folder.path, folder.report)
        receipt.save(folder.receipt)
    runtime.barrier()
    return receipt


def describe_data(data: DataSplits) -> DataSummary:
    parts = (data.train, data.val, data.test)
    return DataSummary(
        name=data.name,
        fingerprint=data.fingerprint(),
        splits={part.split: len(part) for part in parts},
        shape=data.shape,
        classes=list(data.class_names),
        per_class={part.split: part.labels.bincount(minlength=data.num_classes).tolist() for part in parts},
        fingerprints={part.split: part.fingerprint() for part in parts},
        skipped=len(data.skipped),
        skipped_first=list(data.skipped[:10]),
    )


def draw_pictures(
    subject: Subject,
    evaluation: ModelEvaluation,
    data: DataSplits,
    run_dir: Path,
    *,
    few_shot: FewShotFigures | None = None,
) -> dict[str, str]:
    """Grids from the same noise for every model, in the steps it was measured in: one at its best scale, one a sweep
    point; of few-shot data also samples with their nearest shots."""
    if subject.denoiser.sampler == "encode":
        return _draw_encoding(subject, data, run_dir)
    images: dict[str, str] = {}
    classes = data.num_classes
    best = evaluation.best.guidance if evaluation.best else "2"

    def picture(guidance: str, labels: torch.Tensor) -> torch.Tensor:
        return sample_images(
            subject.denoiser,
            len(labels),
            guidance=parse_guidance(guidance),
            steps=evaluation.steps or subject.denoiser.schedule.T,
            seed=GRID_SEED,
            labels=labels,
            guided=subject.guided,
        )

    shown = min(classes, 20)
    labels = torch.arange(shown).repeat_interleave(GRID_PER_CLASS)
    drawn = picture(best, labels)
    path = run_dir / "pictures" / f"{subject.role}-grid.png"
    save_png(class_grid(drawn, labels, data.class_names, GRID_PER_CLASS), path)
    images["grid"] = str(path.relative_to(run_dir))
    row = torch.arange(SWEEP_IMAGES) % classes
    for point in evaluation.sweep:
        file = run_dir / "pictures" / f"{subject.role}-{point.guidance.replace(':', '_').replace(',', '_')}.png"
        save_png(grid(picture(point.guidance, row), SWEEP_IMAGES), file)
        images[f"sweep:{point.guidance}"] = str(file.relative_to(run_dir))
    if few_shot is not None:
        pairs = nearest_picture(picture(best, torch.arange(PAIRS) % classes), few_shot)
        path = save_png(pairs, run_dir / "pictures" / f"{subject.role}-nearest.png")
        images["nearest"] = str(path.relative_to(run_dir))
    return images


def nearest_picture(drawn: torch.Tensor, few_shot: FewShotFigures) -> Image.Image:
    """Samples (n, C, H, W) uint8 above their nearest shots, the nearest pair first, with its distance in the units of
    ``FewShotFigures.nearest``."""
    ratio, which = few_shot.nearest(drawn)
    order = ratio.argsort(stable=True)
    notes = [f"{ratio[i]:.2f}" for i in order.tolist()]
    return pairs_grid(drawn[order], few_shot.shots.images[which[order]], ("sample", "nearest shot"), notes)


def draw_shots(baselines: dict[str, ModelEvaluation], data: DataSplits, run_dir: Path) -> None:
    """The few images, beside the row that repeats them."""
    for name, evaluation in baselines.items():
        path = run_dir / "pictures" / f"{name}.png"
        save_png(grid(data.train.images[:SHOTS_SHOWN], min(len(data.train), SHOTS_A_ROW)), path)
        evaluation.images["shots"] = str(path.relative_to(run_dir))


def _draw_encoding(subject: Subject, data: DataSplits, run_dir: Path) -> dict[str, str]:
    """Held-out images, the noise that an encoder makes of them, and what the first model's many steps make of that."""
    held = data.test if len(data.test) else data.val
    decoder = subject.against.whole[0] if subject.against is not None else None
    if decoder is None or decoder.sampler != "ddim" or not len(held):
        return {}
    chosen = torch.arange(min(SWEEP_IMAGES, len(held)))
    x, labels = to_float(held.images[chosen]).to(decoder.device), held.labels[chosen].to(decoder.device)
    one = parse_guidance("1")
    with subject.denoiser.evaluating(), decoder.evaluating():
        noise = encode(subject.denoiser, x, labels, one)
        back = decode(decoder, noise, labels, one)
    path = run_dir / "pictures" / f"{subject.role}-grid.png"
    rows = torch.cat([to_uint8(part).cpu() for part in (x, noise / 3, back)])
    save_png(grid(rows, len(chosen), row_labels=("image", "noise", "decoded")), path)
    return {"grid": str(path.relative_to(run_dir))}


def refresh_card(
    folder: Path, evaluation: ModelEvaluation, run_dir: Path, default_guidance: str | None, protocol: Protocol
) -> None:
    """Writes the model folder again with its best scale as the pipeline's default, its figures as the report words
    them, and its picture."""
    loaded = load_model(folder)
    assert loaded.lineage is not None
    best = evaluation.best
    # The distance of a few-shot model is to the test images: nothing that ships is chosen by it.
    chosen = best if best is None or best.few_shot is None else None
    figures: dict[str, object] = {}
    if best is not None:
        figures = {"best guidance": best.guidance, words.metric(protocol): words.estimate(best.fd)}
        if best.class_agreement is not None:
            figures["class agreement"] = words.percent(best.class_agreement)
    if evaluation.fidelity is not None:
        figures["guidance beside the teacher's"] = words.guidance_state(evaluation.fidelity)[1]
    if evaluation.encoding is not None:
        figures["error of decoded images"] = words.estimate(evaluation.encoding.error)
    save_model(
        loaded.denoiser,
        folder,
        lineage=loaded.lineage,
        class_names=loaded.class_names,
        guided=loaded.guided,
        default_guidance=default_guidance or (chosen.guidance if chosen else loaded.default_guidance),
        curriculum=loaded.curriculum,
        curriculum_meta=loaded.curriculum_meta,
        card_images=run_dir / evaluation.images["grid"] if "grid" in evaluation.images else None,
        figures=figures,
    )


def ancestry(folders: Sequence[Path]) -> list[Ancestor]:
    """The chain of models behind these folders, oldest first."""
    found: dict[str, Ancestor] = {}
    for folder in folders:
        lineage = load_model(folder).lineage
        if lineage is None:
            continue
        older = lineage.teacher
        chain: list[Ancestor] = []
        while older is not None:
            parent = older.teacher.name if older.teacher else None
            chain.append(
                Ancestor(
                    name=older.name,
                    method=older.method,
                    recipe_sha256=older.recipe_sha256,
                    weights_sha256=older.weights_sha256,
                    parent=parent,
                )
            )
            older = older.teacher
        for ancestor in reversed(chain):
            found.setdefault(ancestor.weights_sha256, ancestor)
        found[lineage.weights_sha256] = Ancestor(
            name=lineage.name,
            method=lineage.method,
            recipe_sha256=lineage.recipe_sha256,
            data_fingerprint=lineage.data.fingerprint if lineage.data else "",
            weights_sha256=lineage.weights_sha256,
            parent=lineage.teacher.name if lineage.teacher else None,
        )
    return list(found.values())
