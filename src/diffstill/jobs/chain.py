"""``diffstill chain``: stages one after another, each an artefact of its own, none done twice for the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from .. import __version__
from ..data.sources import DataSplits
from ..diffusion.sampling import usual_steps
from ..diffusion.schedule import Spacing, spaced_indices
from ..disk import write_text
from ..engine.runtime import Runtime
from ..errors import InputError
from ..evaluation.cost import device_name
from ..evaluation.protocol import Evaluator
from ..evaluation.results import ModelEvaluation
from ..models.denoiser import Denoiser, identity
from ..models.folder import LoadedModel, load_model
from ..models.lineage import weights_sha256
from ..recipe import ChainRecipe, TrainRecipe, resolved
from ..report.page import write_report
from ..report.receipt import Receipt, TrainingSummary, environment
from .build import as_teacher, open_roles, respaced, same_network
from .distill import train_student
from .finish import (
    Subject,
    ancestry,
    baselines_of,
    describe_data,
    draw_pictures,
    draw_shots,
    evaluate_subjects,
    evaluator_for,
    held_evaluation,
    refresh_card,
)
from .folder import Home
from .stage import summarise
from .stages import Stage, StageData, check_baselines, check_stages, digest, stages_of
from .train import Finished, train_teacher
from .ui import Ui

TOLD = ("recipe", "data", "protocol", "models", "baselines", "lineage", "training", "warnings")
"""Parts of a receipt that are the same where nothing has changed."""


class StageMark(BaseModel):
    """``stage.json``: what a finished stage was made from and came to."""

    name: str
    of: str | None
    inputs: dict[str, Any]
    weights_sha256: str
    warnings: list[str] = []
    training: TrainingSummary

    @classmethod
    def read(cls, home: Path) -> StageMark:
        """The mark in a stage's folder.

        Raises:
            InputError: one that is damaged, or of another version.
        """
        try:
            return cls.model_validate_json((home / "stage.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = f"has a stage.json that cannot be read ({' '.join(str(error).split())[:120]})"
            raise InputError("stage", str(home), "delete the folder to train it again", problem=problem) from None


@dataclass(frozen=True)
class Artefact:
    """A stage that is done."""

    name: str
    loaded: LoadedModel
    method: str
    sha256: str
    root: Denoiser
    """The first model of its line."""
    steps: Tensor
    """(T,) int64: which of the first model's timesteps its own are."""
    summary: TrainingSummary | None
    warnings: tuple[str, ...] = ()


class ChainFolder(Home):
    """``recipe.yaml``, ``stages/<name>-<hash>/``, ``receipt.json``, ``report.html``.

    A stage's folder is named after the hash of its inputs, so that a changed recipe finds what it can still use, and
    nothing that an earlier one made is overwritten. It belongs to the chain of one name.
    """

    marks = ("recipe.yaml", "stages")

    def __init__(self, path: Path, recipe: ChainRecipe, *, fresh: bool, write: bool) -> None:
        self._chain = recipe
        super().__init__(path, resolved(recipe), fresh=fresh, write=write)

    def _check_owner(self) -> None:
        held = self._held("recipe.yaml")
        if (held.get("kind"), held.get("name")) != ("chain", self._chain.name):
            raise self._is_another(f"another run ({held.get('name')})")

    def _write_marks(self) -> None:
        (self.path / "stages").mkdir(exist_ok=True)

    @property
    def default_guidance(self) -> str | None:
        """What the recipe wants the pipelines' own scale to be; None: each one's best."""
        return self._chain.evaluation.default_guidance

    def stage(self, name: str, sha256: str) -> Path:
        return self.path / "stages" / f"{name}-{sha256[:8]}"


def chain(recipe: ChainRecipe, out: Path, runtime: Runtime, ui: Ui, *, fresh: bool = False) -> Finished:
    """A whole ``diffstill chain``: every stage, its evaluation, one receipt and one report.

    Raises:
        InputError: stages, data or a folder that do not fit, before anything is written.
        RunFailed, Interrupted: see ``Trainer.run``; the same call goes on in the stage where it stopped.
    """
    stages, stage_data = stages_of(recipe), StageData(recipe)
    data = stage_data.own
    blanks = check_stages(stages, stage_data, runtime, recipe.evaluation.guidance)
    check_baselines(recipe, blanks[stages[0].name].model.denoiser)
    folder = ChainFolder(out, recipe, fresh=fresh, write=runtime.is_main)
    evaluator = evaluator_for(recipe.evaluation, data, runtime, ui, out)
    folder.claim()
    runtime.barrier()
    done: dict[str, Artefact] = {}
    models: dict[str, ModelEvaluation] = {}
    redone = False
    for stage in stages:
        done[stage.name], trained = _artefact(stage, done, stage_data.of(stage), folder, runtime, ui)
        models[stage.name], measured = _measured(len(models), done[stage.name], data, folder, evaluator, runtime, ui)
        redone |= trained or measured
    first = next(iter(done.values()))
    views = [_strided(first, baseline.steps, baseline.spacing) for baseline in recipe.baselines]
    for strided in [*views, *_undistilled(list(done.values()))]:
        models[strided.name], measured = _measured(len(models), strided, data, folder, evaluator, runtime, ui)
        redone |= measured
    receipt = Receipt(
        kind="chain",
        name=recipe.name,
        recipe=resolved(recipe),
        seed=recipe.seed,
        environment=environment(runtime.device),
        data=describe_data(data),
        protocol=evaluator.protocol,
        models=models,
        baselines=baselines_of(evaluator),
        lineage=ancestry([a.loaded.folder for a in done.values()]) if runtime.is_main else [],
        training=[a.summary for a in done.values() if a.summary is not None],
        warnings=list(dict.fromkeys(line for a in done.values() for line in a.warnings)),
    )
    if runtime.is_main:
        draw_shots(receipt.baselines, data, out)
    held = _held_receipt(out / "receipt.json") if runtime.is_main and not redone else None
    same = held is not None and all(getattr(held, part) == getattr(receipt, part) for part in TOLD)
    if runtime.is_main and not same:
        write_report(receipt, out, out / "report.html")
        receipt.save(out / "receipt.json")
    runtime.barrier()
    return Finished(out, held if same else receipt, already=same)


def _held_receipt(file: Path) -> Receipt | None:
    """The receipt of an earlier call, where there is one that can be read."""
    try:
        return Receipt.load(file) if file.exists() else None
    except InputError:
        return None


def _artefact(
    stage: Stage, done: dict[str, Artefact], data: DataSplits, folder: ChainFolder, runtime: Runtime, ui: Ui
) -> tuple[Artefact, bool]:
    """A stage's model, trained now or found finished; whether it was trained now."""
    before = done.get(stage.of or "")
    if stage.recipe is None:
        loaded = load_model(stage.model or "", runtime.device)
        return _line(stage.name, loaded, loaded.lineage.method if loaded.lineage else ""), False
    inputs = _inputs(stage, done, data)
    home = folder.stage(stage.name, digest(inputs))
    found = not runtime.any(not (home / "stage.json").exists())  # of all processes: they go the same way
    if not found:
        _train(stage, before, _roles(stage, done), inputs, data, home, runtime, ui)
    mark = StageMark.read(home)
    loaded = load_model(home / "model", runtime.device)
    if weights_sha256(loaded.denoiser.network) != mark.weights_sha256:
        problem = "has other weights than its stage.json says"
        raise InputError("stage", str(home), "delete the folder to train the stage again", problem=problem)
    made = _line(stage.name, loaded, stage.recipe.method.name, mark.training, before)
    return replace(made, warnings=tuple(mark.warnings)), not found


def _line(
    name: str, loaded: LoadedModel, method: str, summary: TrainingSummary | None = None, before: Artefact | None = None
) -> Artefact:
    """The artefact at its place in its line: its steps are told as the first model's."""
    sha256 = weights_sha256(loaded.denoiser.network)
    if before is None:
        whole = torch.arange(loaded.denoiser.schedule.T)
        return Artefact(name, loaded, method, sha256, loaded.denoiser, whole, summary)
    chosen = loaded.lineage.timesteps if loaded.lineage else []
    steps = before.steps[torch.tensor(chosen)] if chosen else before.steps
    return Artefact(name, loaded, method, sha256, before.root, steps, summary)


def _roles(stage: Stage, done: Mapping[str, Artefact]) -> dict[str, Denoiser]:
    """Role -> the model that it starts from."""
    named = {role: start for role, start in stage.roles.items() if start not in done}
    found = {role: done[start].loaded.denoiser for role, start in stage.roles.items() if start in done}
    return found | open_roles(named)


def _inputs(stage: Stage, done: Mapping[str, Artefact], data: DataSplits) -> dict[str, Any]:
    before = done[stage.of].loaded if stage.of is not None else None
    teacher = identity(before.denoiser, before.guided) if before is not None else None
    return stage.inputs(data, teacher, {role: identity(model) for role, model in _roles(stage, done).items()})


def _train(
    stage: Stage,
    before: Artefact | None,
    roles: Mapping[str, Denoiser],
    inputs: dict[str, Any],
    data: DataSplits,
    home: Path,
    runtime: Runtime,
    ui: Ui,
) -> None:
    """Trains a stage in ``home`` and marks it as done, with the mark last."""
    recipe = stage.recipe
    assert recipe is not None
    warnings: list[str] = []
    if isinstance(recipe, TrainRecipe):
        _, summary, warnings = train_teacher(recipe, data, home, home / "model", runtime, ui)
    else:
        assert before is not None
        teacher = as_teacher(before.loaded, before.name)
        teacher.denoiser.network.to(runtime.device)
        trainer = train_student(
            recipe, data, respaced(teacher, recipe.respace), home, home / "model", runtime, ui, stage.name, roles
        )
        summary = summarise(trainer, trainer.arms[0], stage.name, "log.jsonl")
        warnings = trainer.warnings
    if runtime.is_main:
        curve = home.relative_to(home.parent.parent) / "log.jsonl"
        mark = StageMark(
            name=stage.name,
            of=stage.of,
            inputs=inputs,
            weights_sha256=weights_sha256(load_model(home / "model").denoiser.network),
            warnings=warnings,
            training=summary.model_copy(update={"curve": str(curve)}),
        )
        write_text(home / "stage.json", mark.model_dump_json(indent=1) + "\n")
    runtime.barrier()


def _strided(first: Artefact, steps: int, spacing: Spacing) -> Artefact:
    """The first stage's model as it is, in few of its steps."""
    few = first.loaded.denoiser.respaced(spaced_indices(first.root.schedule.T, steps, spacing))
    name = f"{first.name}@{steps}" + ("" if spacing == "trailing" else f"-{spacing}")
    return replace(first, name=name, loaded=replace(first.loaded, denoiser=few), summary=None, warnings=())


def _undistilled(done: Sequence[Artefact]) -> list[Artefact]:
    """What doing nothing would give: the models of many steps in the steps of each kind of few-step generator."""
    found: dict[str, Artefact] = {}
    few = [made for made in done if made.loaded.denoiser.sampler == "renoise"]
    many = [made for made in done if made.loaded.denoiser.sampler == "ddim"]
    for made, plain in product(few, many):
        model, network = made.loaded.denoiser, plain.loaded.denoiser.network
        name = f"{plain.name}@{model.schedule.T}-renoise"
        if made.root.network is plain.root.network and same_network(model.network, network):
            view = replace(plain.loaded, denoiser=model.with_network(network), guided=False)
            found.setdefault(name, replace(plain, name=name, loaded=view, summary=None, warnings=()))
    return list(found.values())


def _measured(
    place: int,
    made: Artefact,
    data: DataSplits,
    folder: ChainFolder,
    evaluator: Evaluator,
    runtime: Runtime,
    ui: Ui,
) -> tuple[ModelEvaluation, bool]:
    """The artefact under the chain's protocol, measured now or found; whether it was measured now.

    Models of more steps than the protocol's are sampled in so many, others in all their own. The guidance gap is
    compared with that of the first model of the line, seen through the same steps.
    """
    model = made.loaded.denoiser
    T = model.schedule.T
    steps = usual_steps(T, evaluator.settings.steps) if model.sampler == "ddim" else T
    against = None
    if model.sampler != "renoise" and model.network is not made.root.network:
        same = model.schedule.T == made.root.schedule.T
        against = made.root if same else made.root.respaced(made.steps.tolist())
    key = digest(_measurement(made, data, evaluator, runtime) | {"steps": steps})
    file = folder.path / "stages" / f"{made.name}-{key[:8]}.json"
    evaluation = held_evaluation(file)
    found = not runtime.any(evaluation is None)
    if evaluation is None or not found:
        subject = Subject(made.name, model, made.method, made.loaded.folder, made.loaded.guided, against, steps)
        evaluation = evaluate_subjects([subject], evaluator, runtime, ui)[made.name]
        if runtime.is_main:
            drawn = replace(subject, role=file.stem)
            evaluation.images.update(draw_pictures(drawn, evaluation, data, folder.path, few_shot=evaluator.few_shot))
            if made.summary is not None:
                home, guidance = made.loaded.folder, folder.default_guidance
                refresh_card(home, evaluation, folder.path, guidance, evaluator.protocol)
            write_text(file, evaluation.model_dump_json(indent=1) + "\n")
        runtime.barrier()
    return evaluation.model_copy(update={"place": place}), not found


def _measurement(made: Artefact, data: DataSplits, evaluator: Evaluator, runtime: Runtime) -> dict[str, Any]:
    """All that an evaluation is a function of."""
    model = made.loaded.denoiser
    return {
        "version": __version__,
        "measures": ModelEvaluation.model_json_schema(),
        "protocol": evaluator.protocol.settings(),
        "latency": list(evaluator.settings.cost_batches),
        "pairs": evaluator.settings.pairs,
        "data": data.fingerprint(),
        "device": device_name(runtime.device),
        "model": made.sha256,
        "levels": model.schedule.fingerprint(),
        "prediction": model.prediction_type,
        "sampler": model.sampler,
        "scales": model.scale_range,
        "guided": made.loaded.guided,
        "root": weights_sha256(made.root.network),
    }
