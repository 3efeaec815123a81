"""``diffstill distill`` of a text-to-image pipeline: a few-step model of one subject, from a few images of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import stream_seed
from ..data.dataset import LatentData, to_float, to_uint8
from ..data.sources import DataSpec, DataSplits, load_data
from ..diffusion.guidance import Constant
from ..diffusion.sampling import noise_source
from ..engine.arm import Arm
from ..engine.runtime import Runtime
from ..errors import InputError, RunFailed, install
from ..evaluation.cost import measure_cost
from ..evaluation.distances import PixelDistance
from ..evaluation.diversity import nearest
from ..evaluation.intervals import mean_interval
from ..evaluation.results import ModelEvaluation, SubjectFigures
from ..evaluation.sampling import draw
from ..methods import Method, Setting
from ..models.adapters.prompted_unet import PromptedUNet
from ..models.denoiser import Denoiser
from ..models.lineage import Ancestor, DataRef, Lineage, weights_sha256
from ..models.pipeline_folder import load_subject, save_pipeline, write_subject_card
from ..models.text_to_image import TextToImage, load_pipeline, load_unet
from ..recipe import DistillRecipe, LoraSpec, resolved
from ..report import receipt as receipts
from ..report.page import write_report
from ..report.pictures import grid, pairs_grid, save_png
from ..report.receipt import Receipt, TrainingSummary, environment
from .build import build_method, check_levels, check_run, check_training
from .finish import GRID_SEED, PAIRS, SHOTS_A_ROW, SHOTS_SHOWN, describe_data
from .folder import RunFolder
from .stage import Planned, run_stage, summarise
from .train import Finished
from .ui import Ui


@dataclass
class Prepared:
    """A run before it has written anything."""

    parts: TextToImage
    """Without autoencoder and text encoder, whose work is done."""
    data: DataSplits
    teacher: Denoiser
    method: Method
    encode: Callable[[], LatentData]
    inputs: dict[str, Any]


def subject_data(spec: DataSpec, size: int) -> DataSplits:
    """The images of exactly one subject, in the pipeline's size and in colour.

    Raises:
        InputError: several subjects, all images taken for one class, or another size than the pipeline's.
    """
    if spec.unlabelled:
        mend = "name the subject instead: data.classes=[dog6]"
        raise InputError("data.unlabelled", True, mend, problem="would mix the subjects of a folder")
    if spec.size not in (None, size):
        raise InputError("data.size", spec.size, "leave it out", problem=f"is not the pipeline's {size}")
    data = load_data(spec.model_copy(update={"size": size, "channels": 3}))
    if data.num_classes != 1:
        mend = f"name exactly one, e.g. data.classes=[{data.class_names[0]}]"
        shown = ", ".join(data.class_names[:10])
        raise InputError("data.classes", shown, mend, problem=f"are {data.num_classes} subjects")
    return data


def encoded(coder: TextToImage, data: DataSplits, flip: bool, device: torch.device) -> LatentData:
    """The latents of the training images, computed once; with ``flip`` those of the mirrored images too, since an
    autoencoder's mirror image is not quite its image's mirror."""
    images = to_float(data.train.images)
    images = torch.cat([images, images.flip(-1)]) if flip else images
    coder.vae.to(device)
    latents = coder.encode_images(images).cpu()
    return LatentData(data.name, "train", latents, torch.zeros(len(latents), dtype=torch.int64), data.class_names)


def lora_config(spec: LoraSpec) -> Any:
    """peft's form of the recipe's section.

    Raises:
        InputError: where peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        problem = f"needs a package that is missing ({error})"
        raise InputError("lora", f"rank {spec.rank}", install("lora"), problem=problem) from None
    return LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))


def start_of(recipe: DistillRecipe, plain: PromptedUNet) -> PromptedUNet:
    """What the trainable roles are copies of: the teacher's U-Net under the subject's prompt, with a LoRA if asked."""
    if recipe.lora is None:
        return plain
    try:
        return plain.with_adapters(lora_config(recipe.lora), stream_seed(recipe.seed, "lora"))
    except ValueError as error:
        problem = f"name no layers ({' '.join(str(error).split())[:100]})"
        raise InputError("lora.targets", list(recipe.lora.targets), "use [to_q, to_v], say", problem=problem) from None


def build_roles(recipe: DistillRecipe, parts: TextToImage, tables: dict[str, Tensor]) -> tuple[Denoiser, Method]:
    """The frozen source teacher, which is shown the class, and the method, whose roles are shown the subject.

    Raises:
        InputError: options that do not fit, or roles' models of another network.
    """
    told = recipe.method.build_options()
    if getattr(told, "target_teacher", "") == "frozen" and "target_teacher" not in recipe.roles:
        mend = "name the finished pipeline: roles.target_teacher"
        raise InputError("method.target_teacher", "frozen", mend, problem="has no model")
    teacher = parts.denoiser(tables["source"]).freeze()
    student = parts.denoiser(tables["target"])
    first = student.with_network(start_of(recipe, PromptedUNet(parts.unet, tables["target"])))
    trained = ["student", "critic"] + ["target_teacher"] * (getattr(told, "target_teacher", "") == "online")
    initial = dict.fromkeys(trained, first)
    for role, source in recipe.roles.items():
        unet, schedule = load_unet(source, parts, f"roles.{role}")
        check_levels(role, schedule, teacher.schedule)
        initial[role] = parts.denoiser(tables["target"], unet)
    return teacher, build_method(recipe.method, Setting(student, teacher, None, initial), recipe.seed)


def prepare(recipe: DistillRecipe, runtime: Runtime) -> Prepared:
    """Everything that can be refused is refused here, before a file is written.

    Raises:
        InputError: pipeline, data, prompts or options that do not fit.
    """
    assert recipe.teacher.pipeline is not None
    assert recipe.prompts is not None
    parts = load_pipeline(recipe.teacher.pipeline)
    data = subject_data(recipe.data, parts.size)
    negative = recipe.prompts.negative
    tables = {side: parts.embed([getattr(recipe.prompts, side), negative]) for side in ("source", "target")}
    inputs = {
        "data": data.fingerprint(),
        "teacher": {part: weights_sha256(getattr(parts, part)) for part in ("unet", "vae", "text_encoder")},
    }
    coder = replace(parts, unet=None, text_encoder=None)
    parts.vae = parts.text_encoder = None
    teacher, method = build_roles(recipe, parts, tables)
    named = {role: weights_sha256(method.roles.get(role, method.frozen.get(role))) for role in recipe.roles}  # type: ignore[arg-type]
    check_training(recipe.training, method)
    check_run(recipe, teacher.schedule.T, runtime)
    encode = partial(encoded, coder, data, recipe.data.flip, runtime.device)
    return Prepared(parts, data, teacher, method, encode, inputs | ({"roles": named} if named else {}))


def distill_subject(recipe: DistillRecipe, out: Path, runtime: Runtime, ui: Ui, *, fresh: bool = False) -> Finished:
    """Latents, training, the pipeline's folder, a few pictures and figures, receipt, report.

    Raises:
        InputError: whatever does not fit, before anything is written.
        RunFailed, Interrupted: see ``Trainer.run``.
    """
    made = prepare(recipe, runtime)
    folder = RunFolder(out, resolved(recipe), made.inputs, fresh=fresh, write=runtime.is_main)
    if folder.finished:
        return Finished(out, Receipt.load(folder.receipt), already=True)
    folder.claim()
    runtime.barrier()
    latents = made.encode()
    del made.encode  # and with it the autoencoder and the text encoder
    trainer = run_stage(
        [Planned(recipe.name, made.method)],
        title=f"distill {recipe.name}",
        data=replace(made.data, train=latents),
        flip=False,  # the mirrored images are among the latents
        settings=recipe.training,
        seed=recipe.seed,
        runtime=runtime,
        run_dir=out,
        ui=ui,
        teacher=made.teacher,
    )
    arm = trainer.arms[0]
    if arm.failed is not None:
        raise RunFailed(f"{arm.failed}; try a lower training.lr or training.precision=fp32")
    source = Ancestor(
        name=_short(recipe.teacher.pipeline or ""), method="", weights_sha256=made.inputs["teacher"]["unet"]
    )
    if runtime.is_main:
        _save(recipe, made, arm, source, folder.model)
        summary = summarise(trainer, arm, recipe.name, "log.jsonl")
        warnings = [*trainer.warnings, *_doubts(recipe)]
        receipt = _finish(recipe, made, folder, source, summary, runtime, ui, warnings)
    runtime.barrier()
    return Finished(out, receipt if runtime.is_main else None)


def _doubts(recipe: DistillRecipe) -> list[str]:
    prompts = recipe.prompts
    if prompts is None or prompts.source != prompts.target:
        return []
    return [f"prompts: the source teacher was shown the subject's own prompt ({prompts.target!r}), not its class's"]


def _short(source: str) -> str:
    return source.rstrip("/").split("/")[-1]


def _save(recipe: DistillRecipe, made: Prepared, arm: Arm, source: Ancestor, model: Path) -> None:
    lineage = Lineage.new(
        recipe.name,
        arm.method.name,
        recipe=resolved(recipe),
        data=DataRef(name=f"{made.data.name}, {made.data.class_names[0]}", fingerprint=made.data.train.fingerprint()),
        teacher=source,
        images_seen=arm.images,
        seeds=[recipe.seed],
    )
    save_pipeline(arm.student, made.parts.folder, model, lineage=lineage)


def _finish(
    recipe: DistillRecipe,
    made: Prepared,
    folder: RunFolder,
    source: Ancestor,
    summary: TrainingSummary,
    runtime: Runtime,
    ui: Ui,
    warnings: list[str],
) -> Receipt:
    """Measures what was saved, draws, and writes page and receipt; the receipt last."""
    student, parts = load_subject(folder.model)
    parts.vae.to(runtime.device)
    lineage = Lineage.model_validate_json((folder.model / "lineage.json").read_text(encoding="utf-8"))
    nothing = student.with_network(made.teacher.network)
    # The row of doing nothing is shown the subject's class, by the teacher's own prompt, as the teacher is.
    subjects = {
        "teacher": (made.teacher, recipe.evaluation.steps, recipe.method.build_options().guidance),  # type: ignore[attr-defined]
        f"teacher@{student.schedule.T}-renoise": (nothing, student.schedule.T, 1.0),
        "student": (student, student.schedule.T, 1.0),
    }
    models = {}
    for role, (denoiser, steps, scale) in subjects.items():
        runtime.place(denoiser.network, channels_last=False)
        with ui.bar(f"evaluate {role}", 1.0) as bar:
            models[role] = evaluate(recipe, denoiser, role, steps, scale, made.data, parts, folder.path)
            bar.update(1.0)
    models["student"].method, models["student"].sha256 = recipe.method.name, lineage.weights_sha256
    shots = made.data.train.images
    save_png(grid(shots[:SHOTS_SHOWN], min(len(shots), SHOTS_A_ROW)), folder.path / "pictures" / "shots.png")
    write_subject_card(folder.model, grid=folder.path / models["student"].images["grid"])
    receipt = Receipt(
        kind="distill",
        name=recipe.name,
        recipe=resolved(recipe),
        seed=recipe.seed,
        environment=environment(runtime.device),
        data=describe_data(made.data),
        models=models,
        lineage=[
            receipts.Ancestor(name=source.name, method=source.method, weights_sha256=source.weights_sha256),
            receipts.Ancestor(
                name=lineage.name,
                method=lineage.method,
                recipe_sha256=lineage.recipe_sha256,
                data_fingerprint=made.data.train.fingerprint(),
                weights_sha256=lineage.weights_sha256,
                parent=source.name,
            ),
        ],
        training=[summary],
        warnings=warnings,
    )
    write_report(receipt, folder.path, folder.report)
    receipt.save(folder.receipt)
    return receipt


def evaluate(
    recipe: DistillRecipe,
    denoiser: Denoiser,
    role: str,
    steps: int,
    scale: float,
    data: DataSplits,
    parts: TextToImage,
    run_dir: Path,
) -> ModelEvaluation:
    """Pictures, their distances to the few images, and what they cost; every model from the same noise."""
    spec = recipe.evaluation
    images = pictures(denoiser, parts, spec.samples, steps=steps, scale=scale, batch_size=spec.batch_size)
    distance, shots = PixelDistance(), data.train.images
    near, which = nearest(distance.points(images), distance.points(shots), distance)
    file = run_dir / "pictures" / f"{role}-grid.png"
    notes = [f"{value:.2f}" for value in near[:PAIRS].tolist()]
    save_png(pairs_grid(images[:PAIRS], shots[which[:PAIRS]], ("sample", "nearest shot"), notes), file)
    cost = measure_cost(
        denoiser, steps=steps, guided=scale != 1, guidance=Constant(scale), batches=spec.latency_batches, clip="none"
    )
    return ModelEvaluation(
        name=role,
        guided=scale != 1,
        steps=steps,
        sampler=denoiser.sampler,
        cost=cost,
        subject=SubjectFigures(
            samples=len(images),
            nearest=mean_interval(near),
            spread=_spread(images, distance),
            real_spread=_spread(shots, distance),
        ),
        images={"grid": str(file.relative_to(run_dir))},
    )


def _spread(images: Tensor, distance: PixelDistance) -> float | None:
    if len(images) < 2:
        return None
    table = distance(images, images)
    return float(table.sum() / (len(images) * (len(images) - 1)))


def pictures(
    denoiser: Denoiser, parts: TextToImage, count: int, *, steps: int, scale: float, batch_size: int
) -> Tensor:
    """(count, 3, H, W) uint8, decoded; the noise of image i is its own. In latent space nothing is clipped."""
    found = []
    with denoiser.evaluating():
        for start in range(0, count, batch_size):
            held = min(batch_size, count - start)
            fresh = noise_source(denoiser.sample_shape, GRID_SEED, start, held, denoiser.device)
            labels = torch.zeros(held, dtype=torch.int64, device=denoiser.device)
            latents = draw(denoiser, labels, Constant(scale), fresh, steps=steps, clip="none")
            found.append(to_uint8(parts.decode(latents).nan_to_num(0.0)).cpu())
    return torch.cat(found)
