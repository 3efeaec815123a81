"""Seconds for 1,000 images, teacher against student, by the library's sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from problem import NUM_CLASSES, Problem
from timing import Round, Spread, Stopwatch

from diffstill.diffusion.guidance import Constant
from diffstill.evaluation.sampling import sample_images
from diffstill.models.denoiser import Denoiser

STEPS = 50
IMAGES = 1000
GUIDANCE = 2.0


@dataclass(frozen=True)
class Plan:
    """What is sampled in a turn. ``rounds * images`` images of ``steps`` steps are measured of each network."""

    rounds: int
    images: int
    steps: int = STEPS

    @property
    def scale(self) -> float:
        """From the seconds of an image as measured to those of one with all its steps."""
        return STEPS / self.steps


@dataclass
class SamplingTimes:
    """Float32, two-pass guidance in one batched forward, DDIM."""

    nets: str
    guidance: float
    steps: int
    batch: int
    measured_images: int
    measured_steps: int
    scaled: bool
    """True where 1,000 images of all steps were not sampled in full but computed from ``measured_images`` images of
    ``measured_steps`` steps; the time of an image is proportional to its steps."""
    teacher_s_per_1000: float
    student_s_per_1000: float
    ratio: Spread
    rounds: list[Round] = field(default_factory=list)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> SamplingTimes:
        """From what ``asdict`` made of one."""
        rounds = [Round(**turn) for turn in plain["rounds"]]
        return cls(**{**plain, "ratio": Spread(**plain["ratio"]), "rounds": rounds})


class Sampling:
    """A turn of sampling with one network."""

    def __init__(self, problem: Problem, network: torch.nn.Module, plan: Plan) -> None:
        self.denoiser = Denoiser(network, problem.schedule, NUM_CLASSES, problem.nets.sample_shape)
        self.plan = plan

    def prepare(self) -> None:
        """Nothing global."""

    def __call__(self) -> None:
        guidance = Constant(GUIDANCE)
        sample_images(
            self.denoiser, self.plan.images, guidance=guidance, steps=self.plan.steps, batch_size=self.plan.images
        )


def measure_sampling(problem: Problem, watch: Stopwatch, plan: Plan) -> SamplingTimes:
    """Teacher and student in turns, T S T S ... T. ``ratio`` is teacher over student."""
    teacher = Sampling(problem, problem.teacher(), plan)
    student = Sampling(problem, problem.trained(), plan)
    short = Plan(1, min(2, plan.images), 2)
    for network in (teacher, student):
        network.plan = short
        watch.seconds(network, 1)
        network.plan = plan
    rounds = watch.against(teacher, student, plan.rounds, 1, warm=1)
    per_1000 = IMAGES / plan.images * plan.scale / len(rounds)
    images = plan.images * len(rounds)
    return SamplingTimes(
        nets=problem.nets.name,
        guidance=GUIDANCE,
        steps=STEPS,
        batch=plan.images,
        measured_images=images,
        measured_steps=plan.steps,
        scaled=plan.steps != STEPS or images < IMAGES,
        teacher_s_per_1000=sum(turn.baseline_s for turn in rounds) * per_1000,
        student_s_per_1000=sum(turn.seconds for turn in rounds) * per_1000,
        ratio=Spread.of([turn.ratio for turn in rounds]),
        rounds=rounds,
    )
