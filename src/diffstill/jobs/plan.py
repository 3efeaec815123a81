"""``--dry-run``: the resolved recipe and its predicted cost; reads configurations and data, writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..data.sources import DataSplits, load_data
from ..engine.runtime import Runtime
from ..engine.settings import TrainSettings
from ..evaluation.cost import TrainingForecast, predict_cost
from ..evaluation.distances import LpipsDistance
from ..evaluation.features import check_extractor
from ..methods import Method, Setting
from ..models.denoiser import Denoiser
from ..recipe import AnyRecipe, ArmSpec, ChainRecipe, DistillRecipe, EvaluationSpec, TrainRecipe, resolved, to_yaml
from ..report.words import seconds as duration
from .build import build_arms, build_denoiser, build_method, check_run
from .distill import blank_teacher, prepare_student, teacher_recipe
from .stages import StageData, check_baselines, check_stages, stages_of
from .subject import prepare


@dataclass(frozen=True)
class Plan:
    """A recipe and a forecast for each training that it would do."""

    recipe: AnyRecipe
    forecasts: dict[str, tuple[TrainingForecast, int]]
    """Stage -> (forecast, images)."""
    seeds: int = 1
    """How often an arena trains its arms."""
    arms: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        stages = {
            name: {**asdict(forecast), "images": images, "seconds": _seconds(forecast, images)}
            for name, (forecast, images) in self.forecasts.items()
        }
        return {"recipe": resolved(self.recipe), "predicted": stages}

    def as_text(self) -> str:
        lines = [to_yaml(self.recipe).rstrip(), "", "predicted (estimates, within a factor of two):"]
        for name, (forecast, images) in self.forecasts.items():
            teacher = ""
            if forecast.teacher_parameters:
                teacher = f" ({_beside(forecast.parameters, forecast.teacher_parameters)})"
            lines += [
                f"  {name}:",
                f"    parameters           {forecast.parameters:,}{teacher}",
                f"    FLOPs a forward      {forecast.flops_forward / 1e9:.4g} G an image",
                f"    FLOPs a step         {forecast.flops_per_image / 1e9:.4g} G an image",
                f"    training memory      {forecast.memory_mb:,.0f} MB",
                f"    time                 {forecast.seconds_per_1000_images:.3g} s per 1,000 images here, "
                f"{duration(_seconds(forecast, images))} for {images:,}",
            ]
        if len(self.forecasts) > 1:
            total = sum(
                _seconds(forecast, images) * (self.seeds if name in self.arms else 1)
                for name, (forecast, images) in self.forecasts.items()
            )
            times = f", every arm from {self.seeds} seeds" if self.seeds > 1 else ""
            lines.append(f"  all together: {duration(total)} of training{times}; evaluation comes on top")
        return "\n".join(lines)


def _beside(mine: int, theirs: int) -> str:
    if mine == theirs:
        return "as many as the teacher's"
    less, ratio = theirs > mine, max(mine, theirs) / min(mine, theirs)
    return f"{ratio:.2f}x {'fewer' if less else 'more'} than the teacher's {theirs:,}"


def _seconds(forecast: TrainingForecast, images: int) -> float:
    return forecast.seconds_per_1000_images * images / 1000


def plan(recipe: AnyRecipe, runtime: Runtime, arms: Mapping[str, ArmSpec] | None = None, *, seeds: int = 1) -> Plan:
    """What a run would refuse of recipe, data and networks is refused here too; the rest is forecast on its device.

    Args:
        arms: of an arena; each is forecast by itself.
        seeds: how often the arena trains them.
    """
    if isinstance(recipe, ChainRecipe):
        return Plan(recipe, _plan_chain(recipe, runtime))
    settings = recipe.training
    if isinstance(recipe, DistillRecipe) and recipe.teacher.pipeline is not None and arms is None:
        made = prepare(recipe, runtime)
        return Plan(recipe, {recipe.name: (_forecast(made.method, made.teacher, settings, runtime), settings.images)})
    data = load_data(recipe.data)
    _check_protocol(recipe.evaluation, data)
    if isinstance(recipe, TrainRecipe):
        denoiser = build_denoiser(
            recipe.network, data.shape, data.num_classes, recipe.schedule.build(), recipe.prediction_type, recipe.seed
        )
        method = build_method(recipe.method, Setting(denoiser))
        check_run(recipe, denoiser.schedule.T, runtime)
        return Plan(recipe, {recipe.name: (_forecast(method, None, settings, runtime), settings.images)})
    teacher = blank_teacher(recipe, data)
    check_run(recipe, teacher.denoiser.schedule.T, runtime)
    forecasts: dict[str, tuple[TrainingForecast, int]] = {}
    upstream = teacher_recipe(recipe)
    if upstream is not None:
        first = build_method(upstream.method, Setting(teacher.denoiser))
        forecasts[upstream.name] = (_forecast(first, None, upstream.training, runtime), upstream.training.images)
    if arms is None:
        _, method = prepare_student(recipe, data, teacher)
        forecasts[recipe.name] = (_forecast(method, teacher.denoiser, settings, runtime), settings.images)
    beside, field = (recipe.beside, "beside") if arms is None else (arms, "arena.arms")
    for name, method in build_arms(recipe, beside, teacher, field).items():
        forecasts[name] = (_forecast(method, teacher.denoiser, settings, runtime), settings.images)
    return Plan(recipe, forecasts, seeds, tuple(arms or ()))


def _check_protocol(spec: EvaluationSpec, data: DataSplits) -> None:
    """What the evaluation would lack is said now, not by the run."""
    check_extractor(spec.extractor, data, spec.source)
    kind, _, net = spec.distance.partition(":")
    if kind == "lpips":
        LpipsDistance(net)


def _plan_chain(recipe: ChainRecipe, runtime: Runtime) -> dict[str, tuple[TrainingForecast, int]]:
    stages = stages_of(recipe)
    data = StageData(recipe)
    _check_protocol(recipe.evaluation, data.own)
    blanks = check_stages(stages, data, runtime)
    check_baselines(recipe, blanks[stages[0].name].model.denoiser)
    found = {}
    for stage in stages:
        method = blanks[stage.name].method
        if method is not None and stage.recipe is not None:
            settings = stage.recipe.training
            found[stage.name] = _forecast(method, method.teacher, settings, runtime), settings.images
    return found


def _forecast(method: Method, teacher: Denoiser | None, settings: TrainSettings, runtime: Runtime) -> TrainingForecast:
    runtime.place(method.student.network, channels_last=False)
    passes = method.teacher_passes
    if teacher is not None:
        runtime.place(teacher.network, channels_last=False)
    return predict_cost(
        method.student,
        teacher if passes else None,
        batch_size=settings.micro_batch or settings.batch_size,
        student_passes=method.student_passes,
        teacher_passes=passes,
        beside=[network for role, network in (method.roles | method.frozen).items() if role != "student"],
    )
