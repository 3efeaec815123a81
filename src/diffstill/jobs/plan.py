"""``--dry-run``: the resolved recipe and its predicted cost; reads configurations and data, writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..data.sources import load_data
from ..evaluation.cost import TrainingForecast, predict_cost
from ..methods import Setting
from ..recipe import DistillRecipe, TrainRecipe, resolved, to_yaml
from .build import build_denoiser, build_method
from .distill import blank_teacher, prepare_student, teacher_recipe


@dataclass(frozen=True)
class Plan:
    """A recipe and a forecast for each training that it would do."""

    recipe: TrainRecipe | DistillRecipe
    forecasts: dict[str, tuple[TrainingForecast, int]]
    """Stage -> (forecast, images)."""

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
                ratio = forecast.teacher_parameters / forecast.parameters
                teacher = f" ({ratio:.2f}x fewer than the teacher's {forecast.teacher_parameters:,})"
            lines += [
                f"  {name}:",
                f"    parameters           {forecast.parameters:,}{teacher}",
                f"    FLOPs a forward      {forecast.flops_forward / 1e9:.4g} G an image",
                f"    FLOPs a step         {forecast.flops_per_image / 1e9:.4g} G an image",
                f"    training memory      {forecast.memory_mb:,.0f} MB",
                f"    time                 {forecast.seconds_per_1000_images:.3g} s per 1,000 images here, "
                f"{_seconds(forecast, images):,.0f} s for {images:,}",
            ]
        return "\n".join(lines)


def _seconds(forecast: TrainingForecast, images: int) -> float:
    return forecast.seconds_per_1000_images * images / 1000


def plan(recipe: TrainRecipe | DistillRecipe) -> Plan:
    """Everything a run would refuse is refused here too; the rest is forecast."""
    data = load_data(recipe.data)
    settings = recipe.training
    batch = settings.micro_batch or settings.batch_size
    if isinstance(recipe, TrainRecipe):
        denoiser = build_denoiser(
            recipe.network, data.shape, data.num_classes, recipe.schedule.build(), recipe.prediction_type, recipe.seed
        )
        build_method(recipe.method, Setting(denoiser))
        forecast = predict_cost(denoiser, batch_size=batch, student_passes=1)
        return Plan(recipe, {recipe.name: (forecast, settings.images)})
    teacher = blank_teacher(recipe, data)
    student, method = prepare_student(recipe, data, teacher)
    forecasts: dict[str, tuple[TrainingForecast, int]] = {}
    upstream = teacher_recipe(recipe)
    if upstream is not None:
        up = upstream.training
        first = predict_cost(teacher.denoiser, batch_size=up.micro_batch or up.batch_size, student_passes=1)
        forecasts[upstream.name] = (first, up.images)
    forecast = predict_cost(
        student,
        teacher.denoiser,
        batch_size=batch,
        student_passes=method.student_passes,
        teacher_passes=len(method.teacher_needs & {"cond", "null"}),
    )
    forecasts[recipe.name] = (forecast, settings.images)
    return Plan(recipe, forecasts)
