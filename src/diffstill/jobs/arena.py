"""``diffstill arena``: several methods, one teacher, one pass; the same images, noise and timesteps for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..data.sources import DataSplits, load_data
from ..disk import write_text
from ..engine.arm import Arm
from ..engine.loop import Trainer
from ..engine.runtime import Runtime
from ..errors import InputError
from ..evaluation.guidance_fidelity import FidelityProbe
from ..evaluation.protocol import Evaluator
from ..evaluation.results import ModelEvaluation
from ..methods import METHODS
from ..models.adapters import unwrap
from ..recipe import ArmSpec, DistillRecipe, MethodSpec, NetworkSpec, resolved
from ..report.arena import ArenaArm, ArenaResult, ArmSeed, Budget
from ..report.page import write_arena
from ..report.receipt import environment
from .build import Teacher, build_arm, build_arms, check_data, check_run, probe_data
from .distill import PROBE_PAIRS, blank_teacher, inputs_of, obtain_teacher
from .finish import (
    Subject,
    describe_data,
    draw_pictures,
    evaluate_subject,
    evaluator_for,
    held_evaluation,
    refresh_card,
)
from .folder import RunFolder
from .stage import Planned, run_stage
from .train import save_trained
from .ui import Ui

CHEAPER = 0.9
"""An arm whose step costs less than this share of the reference's gets a second training at equal seconds."""


def choose_arms(recipe: DistillRecipe, methods: Sequence[str] | None) -> dict[str, ArmSpec]:
    """The arms by name: the recipe's, or those named (an arm of the recipe, or a method with its defaults).

    Raises:
        InputError: an unknown name, or a reference arm that is not among them.
    """
    known = recipe.arena.arms
    if methods is None:
        chosen = dict(known)
    else:
        chosen = {}
        for name in (word.strip() for word in methods):
            if name in known:
                chosen[name] = known[name]
            elif name in METHODS:
                chosen[name] = ArmSpec(method=MethodSpec(name=name))
            else:
                names = ", ".join(dict.fromkeys([*known, *METHODS]))
                raise InputError("methods", name, f"use some of: {names}", problem="is neither an arm nor a method")
    if not chosen:
        mend = "name methods with --methods, e.g. dash,composite, or add arena.arms to the recipe"
        raise InputError("recipe", recipe.name, mend, problem="has no arena.arms")
    return chosen


def arena(
    recipe: DistillRecipe,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    fresh: bool = False,
) -> ArenaResult:
    """Trains every arm from every seed, evaluates all, writes ``arena.json`` and ``report.html``.

    Resumes: finished trainings and evaluations are kept in the run folder.
    """
    data = load_data(recipe.data)
    arms = choose_arms(recipe, methods)
    reference = recipe.arena.reference if recipe.arena.reference in arms else next(iter(arms))
    blank = blank_teacher(recipe, data)
    check_run(recipe, blank.denoiser.schedule.T, runtime)
    check_data(data, blank.denoiser)
    build_arms(recipe, arms, blank, "arena.arms")
    identity = resolved(recipe.model_copy(update={"arena": recipe.arena.model_copy(update={"arms": arms})}))
    folder = RunFolder(out, identity, inputs_of(recipe, data, blank), fresh=fresh, write=runtime.is_main)
    evaluator = evaluator_for(recipe.evaluation, data, runtime, ui, out)
    folder.claim()
    runtime.barrier()
    teacher, _, warnings = obtain_teacher(recipe, data, folder, runtime, ui)
    session = _Session(recipe, arms, reference, data, folder.path, runtime, ui, evaluator, teacher)
    session.notes += warnings
    found: dict[str, list[ArmSeed]] = {name: [] for name in arms}
    parameters: dict[str, int] = {}
    longer: dict[str, int] = {}
    for number in range(seeds):
        seed = recipe.seed + number
        trainer = session.train(f"seed-{seed}", arms, seed)
        if number == 0:
            parameters = {arm.name: _size(arm) for arm in trainer.arms}
            if recipe.arena.equal_seconds:
                longer = _longer(trainer.arms, reference, recipe.training.batch_size)
        session.measure(trainer, f"seed-{seed}", seed, "equal_steps", found)
        if longer:
            cheaper = {name: arms[name] for name in longer}
            trainer = session.train(f"seed-{seed}-seconds", cheaper, seed, longer)
            session.measure(trainer, f"seed-{seed}-seconds", seed, "equal_seconds", found)
            for name in arms:
                if name not in longer:
                    same = next(s for s in found[name] if s.seed == seed)
                    found[name].append(same.model_copy(update={"budget": "equal_seconds"}))
    result = ArenaResult(
        recipe=identity,
        data=describe_data(data),
        environment=environment(runtime.device),
        protocol=evaluator.protocol,
        teacher=session.evaluate(
            "teacher", Subject("teacher", teacher.denoiser, "teacher", teacher.folder, teacher.guided)
        ),
        arms=[
            ArenaArm(
                name=name,
                method=spec.method.name,
                label=spec.label or name,
                parameters=parameters[name],
                seeds=found[name],
            )
            for name, spec in arms.items()
        ],
        reference=reference,
        notes=session.notes,
    )
    if runtime.is_main:
        result.save(folder.path / "arena.json")
        write_arena(result, folder.report, folder.path)
    runtime.barrier()
    return result


class _Session:
    """What every pass of an arena shares."""

    def __init__(
        self,
        recipe: DistillRecipe,
        arms: dict[str, ArmSpec],
        reference: str,
        data: DataSplits,
        path: Path,
        runtime: Runtime,
        ui: Ui,
        evaluator: Evaluator,
        teacher: Teacher,
    ) -> None:
        self.arms, self.timed = arms, ("teacher", reference)
        self.recipe, self.data, self.path, self.runtime, self.ui = recipe, data, path, runtime, ui
        self.evaluator, self.teacher = evaluator, teacher
        self.notes: list[str] = []
        self.probe = None
        if not teacher.denoiser.unconditional:
            self.probe = FidelityProbe(teacher.denoiser, probe_data(data), pairs=PROBE_PAIRS, seed=recipe.seed)

    def train(self, name: str, arms: dict[str, ArmSpec], seed: int, images: dict[str, int] | None = None) -> Trainer:
        """One pass: every arm on the same stream of batches."""
        plans = []
        for arm, spec in arms.items():
            method = build_arm(self.recipe, spec, self.teacher, seed)
            plans.append(Planned(arm, method, (images or {}).get(arm)))
        return run_stage(
            plans,
            title=f"{len(plans)} arms, {name}",
            data=self.data,
            flip=self.recipe.data.flip,
            # Compiling would fall into the first arm's seconds.
            settings=self.recipe.training.model_copy(update={"compile": False}),
            seed=seed,
            runtime=self.runtime,
            run_dir=self.path / name,
            ui=self.ui,
            teacher=self.teacher.denoiser,
            probe=self.probe,
            timed=True,
        )

    def measure(self, trainer: Trainer, name: str, seed: int, budget: Budget, found: dict[str, list[ArmSeed]]) -> None:
        """Evaluates every arm of a pass and files the results."""
        self.notes += [line for line in trainer.warnings if line not in self.notes]
        for arm in trainer.arms:
            subject = Subject(
                arm.name, arm.student, arm.method.name, None, arm.method.guided, against=self.teacher.denoiser
            )
            # The first seed's pictures stand for the arm.
            pictures = budget == "equal_steps" and seed == self.recipe.seed
            evaluation = self.evaluate(f"{name}/{arm.name}", subject, pictures=pictures)
            if self.recipe.arena.keep_models and self.runtime.is_main:
                self._keep(arm, self.path / "models" / name / arm.name, seed, evaluation)
            found[arm.name].append(
                ArmSeed(
                    seed=seed,
                    steps=arm.images // self.recipe.training.batch_size,
                    images_seen=arm.images,
                    seconds=arm.seconds,
                    evaluation=evaluation,
                    budget=budget,
                    collapse_alarm=arm.alarm,
                )
            )

    def _keep(self, arm: Arm, folder: Path, seed: int, evaluation: ModelEvaluation) -> None:
        """The arm's student as a model folder, with its figures on its card."""
        if arm.failed is not None:
            return
        spec = self.arms[arm.name]
        network = NetworkSpec.model_validate({**self.recipe.student.model_dump(mode="json"), **spec.student})
        recipe = self.recipe.model_copy(update={"method": spec.method, "student": network})
        save_trained(
            folder, arm.student, arm.method, recipe=recipe, data=self.data, images=arm.images,
            teacher=self.teacher.lineage, name=f"{recipe.name}-{arm.name}", seed=seed,
        )  # fmt: skip
        guidance = recipe.evaluation.default_guidance
        refresh_card(folder, evaluation, self.path, guidance, self.evaluator.protocol)

    def evaluate(self, name: str, subject: Subject, *, pictures: bool = True) -> ModelEvaluation:
        """Measured once and kept: an arena that is started again does not measure again."""
        kept = self.path / "evaluations" / f"{name.replace('/', '-')}.json"
        held = held_evaluation(kept)
        missing = self.runtime.any(held is None)
        if held is not None and not missing:
            return held
        cost = subject.role in self.timed and pictures
        found = evaluate_subject(subject, self.evaluator, self.runtime, self.ui, cost=cost, name=name)
        if self.runtime.is_main:
            if pictures:
                found.images.update(draw_pictures(subject, found, self.data, self.path))
            write_text(kept, found.model_dump_json(indent=1))
        self.runtime.barrier()
        return found


def _size(arm: Arm) -> int:
    return sum(p.numel() for p in unwrap(arm.method.roles["student"]).parameters())


def _longer(arms: list[Arm], reference: str, batch: int) -> dict[str, int]:
    # The mean over processes, so that all of them choose alike.
    seconds = {
        arm.name: float(arm.runtime.mean(torch.tensor(arm.seconds, device=arm.runtime.device)))
        for arm in arms
        if arm.failed is None
    }
    return images_for_equal_seconds(seconds, {arm.name: arm.images for arm in arms}, reference, batch)


def images_for_equal_seconds(
    seconds: Mapping[str, float], images: Mapping[str, int], reference: str, batch: int
) -> dict[str, int]:
    """Images, in whole batches, for each arm that is clearly cheaper (``CHEAPER``) than the reference, so that it takes
    the reference's seconds. Empty where the reference itself has none (it diverged)."""
    budget = seconds.get(reference, 0.0)
    return {
        name: round(images[name] * budget / took / batch) * batch
        for name, took in seconds.items()
        if 0 < took < CHEAPER * budget
    }
