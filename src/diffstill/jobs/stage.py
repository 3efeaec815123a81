"""One training: arms, stream and trainer put together, with a progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.sources import DataSplits
from ..engine.arm import Arm
from ..engine.loop import Probe, Progress, Trainer
from ..engine.runtime import Runtime
from ..engine.settings import TrainSettings
from ..engine.stream import BatchStream
from ..methods import Method
from ..models.adapters import unwrap
from ..models.denoiser import Denoiser
from ..report.receipt import TrainingSummary
from .ui import Ui, training_note


@dataclass(frozen=True)
class Planned:
    """An arm before it is built."""

    name: str
    method: Method
    images: int | None = None


def run_stage(
    plans: list[Planned],
    *,
    title: str,
    data: DataSplits,
    flip: bool,
    settings: TrainSettings,
    seed: int,
    runtime: Runtime,
    run_dir: Path,
    ui: Ui,
    teacher: Denoiser | None = None,
    probe: Probe | None = None,
    timed: bool = False,
) -> Trainer:
    """Trains (or resumes, or finds finished) one stage and returns its trainer."""
    stream = BatchStream(
        data.train,
        # A generator of few steps has noise levels of its own, which no other arm and no teacher is asked at.
        (teacher or plans[0].method).schedule,
        batch_size=settings.batch_size,
        seed=seed,
        device=runtime.device,
        flip=flip,
        rank=runtime.rank,
        world=runtime.world,
    )
    arms = [Arm(plan.name, plan.method, settings, runtime, plan.images) for plan in plans]
    total = max(arm.images for arm in arms)
    with ui.bar(title, total) as bar:

        def show(progress: Progress) -> None:
            bar.update(progress.images_seen, training_note(progress))

        trainer = Trainer(
            arms,
            stream,
            settings,
            runtime,
            run_dir,
            teacher=teacher,
            probe=probe,
            timed=timed,
            on_progress=show,
        )
        trainer.run()
        bar.update(total)
    if (said := data.left_out()) and said not in trainer.warnings:
        trainer.warnings.append(said)
    for line in trainer.warnings:
        ui.warn(line)
    return trainer


def summarise(trainer: Trainer, arm: Arm, name: str, curve: str) -> TrainingSummary:
    """What the training took, for the receipt."""
    seconds = arm.seconds if trainer.timed else trainer.seconds
    return TrainingSummary(
        name=name,
        method=arm.method.name,
        steps=arm.images // trainer.settings.batch_size,
        images_seen=arm.images,
        seconds=seconds,
        images_per_s=arm.images / max(seconds, 1e-9),
        parameters=sum(p.numel() for p in unwrap(arm.method.roles["student"]).parameters()),
        curve=curve,
        curriculum=curriculum_bins(arm.method),
    )


def curriculum_bins(method: Method, bins: int = 20) -> list[float]:
    """Mean effective weight in equal timestep bins, one a step where there are fewer; empty where every weight is 1."""
    weights = dict(method.artefacts()).get("weights")
    if weights is None or torch.allclose(weights, torch.ones_like(weights), atol=1e-4):
        return []
    return [float(part.mean()) for part in weights.cpu().double().tensor_split(min(bins, len(weights)))]
