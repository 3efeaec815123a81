"""Tables of the few-shot runs: ways side by side, by number of images, smaller students, aims, duels, cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from result_files import RESULTS, cell, chain_models

from diffstill.report import words

FEW_SHOT = {
    "shots-replicated": "the ten images, repeated",
    "source@{}-renoise": "source model in as few steps (do nothing)",
    "finetune": "fine-tuning",
    "finetune@{}-renoise": "fine-tuning, in as few steps",
    "dmd2-then-finetune": "DMD2 in the source domain, then fine-tuning",
    "finetune-then-dmd2": "fine-tuning, then DMD2",
    "unidad": "Uni-DAD",
    "no-target-teacher": "without target teacher",
    "single-head": "with a single head",
    "dmd-only": "matching to the source alone",
    "gan-only": "GAN alone",
}
BOTH = {
    "shots-replicated": "the ten images, repeated",
    "source@1-renoise": "source model in one step (do nothing)",
    "source@3-renoise": "source model in three steps (do nothing)",
    "finetune": "fine-tuning",
    "finetune@1-renoise": "fine-tuning, in one step",
    "finetune@3-renoise": "fine-tuning, in three steps",
    "finetune-then-dmd2": "fine-tuning, then DMD2",
    "unidad": "Uni-DAD, one step",
    "no-target-teacher": "without target teacher, one step",
    "three": "Uni-DAD, three steps",
}
SMALL = {
    "source@1-renoise": "source model in one step (do nothing)",
    "small@1-renoise": "its small student in one step (do nothing)",
    "small-finetune": "small, fine-tuning",
    "small-finetune@1-renoise": "small, fine-tuning, in one step",
    "unidad": "large: Uni-DAD",
    "small-alone": "small: Uni-DAD, all networks small",
    "small-student": "small: Uni-DAD, teachers and critic large",
}


def by_way(file: str, steps: int = 1, names: Mapping[str, str] = FEW_SHOT) -> Callable[[], str]:
    """Ways from ten images to a generator: distance, diversity, copies and forgetting side by side."""

    def made() -> str:
        models = chain_models(file)
        known = {name.format(steps): label for name, label in names.items() if name.format(steps) in models}
        return _table([""], [([label], models[name]) for name, label in known.items()])

    return made


def smaller(file: str) -> Callable[[], str]:
    """The same for students that are smaller than the source model."""

    def made() -> str:
        models = chain_models(file)
        rows = [([label, words.count(models[name]["parameters"])], models[name]) for name, label in SMALL.items()]
        return _table(["", "parameters"], rows)

    return made


def _table(header: list[str], rows: list[tuple[list[str], dict[str, Any]]]) -> str:
    """With the distance in pixels where all rows have it: older runs have not."""
    at = [next(name.split()[0] for name in model["figures"] if name.startswith("s=")) for _, model in rows]  # its one
    pixels = all(model["figures"].get(f"{s} fd_pixels") for s, (_, model) in zip(at, rows, strict=True))
    header = [*header, "NFE", "FD", *(["FD-pixels"] if pixels else [])]
    header += ["diversity, % of real", "copies, %", "FD to the source"]
    told = []
    for s, (labels, model) in zip(at, rows, strict=True):
        distances = [cell(model, f"{s} {figure}") for figure in ("fd", *(["fd_pixels"] if pixels else []))]
        percent = [cell(model, f"{s} {figure}", 100) for figure in ("diversity_share", "memorised")]
        nfe = str(model["nfe"]) if model["nfe"] else words.MISSING
        told.append([*labels, nfe, *distances, *percent, cell(model, f"{s} source_fd")])
    return words.markdown(header, told)


def by_number(files: Mapping[int, str]) -> Callable[[], str]:
    """The same by the number of images."""

    def made() -> str:
        rows = [
            ([str(shots), FEW_SHOT[name.replace("@1", "@{}")]], models[name])
            for shots, file in files.items()
            for models in [chain_models(file)]
            for name in ("finetune@1-renoise", "unidad")
        ]
        return _table(["images", ""], rows)

    return made


def cost() -> str:
    """What each way costs to train beside plain fine-tuning."""
    ways = json.loads((RESULTS / "few-shot-cost.json").read_text(encoding="utf-8"))["ways"]

    def row(way: str, found: dict[str, Any]) -> list[str]:
        step, memory = found["step / plain"], found["memory / plain"]
        return [
            way,
            f"{step['median']:.2f}x [{step['low']:.2f}, {step['high']:.2f}]",
            f"{step['median'] * found['steps'] / ways['fine-tuning']['steps']:.1f}x",
            f"{memory['median']:.2f}x [{memory['low']:.2f}, {memory['high']:.2f}]",
            f"{found['peak_mb']:.0f} MB",
        ]

    rows = sorted(ways.items(), key=lambda item: item[1]["step / plain"]["median"])
    header = ["", "a step, of fine-tuning's", "whole training", "memory", "peak"]
    return words.markdown(header, [row(way, found) for way, found in rows])


RUNS = {
    "nines, one step": ("few-shot-digits.json", 1, "unidad"),
    "ones (far), one step": ("few-shot-digits-far.json", 1, "unidad"),
    "ones (far), three steps, half the learning rate": ("few-shot-digits-far.json", 3, "three"),
    "nines, three steps": ("few-shot-digits-3.json", 3, "unidad"),
    "nines, three steps, half the learning rate": ("few-shot-digits-3-slow.json", 3, "unidad"),
    "shirts, one step": ("few-shot-fashion.json", 1, "unidad"),
    "other shirts, one step": ("few-shot-fashion-tens.json", 1, "unidad"),
    "ankle boots (far), one step": ("few-shot-fashion-far.json", 1, "unidad"),
    "ankle boots (far), three steps, half the learning rate": ("few-shot-fashion-far.json", 3, "three"),
    "shirts, three steps": ("few-shot-fashion-3.json", 3, "unidad"),
    "other shirts, three steps": ("few-shot-fashion-tens.json", 3, "three"),
    "shirts, three steps, half the learning rate": ("few-shot-fashion-3-slow.json", 3, "unidad"),
}
"""Runs from ten images -> file, steps, name of Uni-DAD's model."""
DISTANCES = ("fd", "fd_pixels")


def _seeds(model: dict[str, Any], figure: str) -> list[float]:
    """A figure of a model that is measured at one scale, by seed; none where it was not measured."""
    found = [held for name, held in model["figures"].items() if name.startswith("s=") and name.endswith(f" {figure}")]
    values = found[0]["seeds"] if found else []
    return [value for value in values if value is not None]


def _count(mine: list[float], theirs: list[float]) -> str:
    """In how many seeds the first are lower."""
    if not mine or not theirs:
        return words.MISSING
    return str(sum(a < b for a, b in zip(mine, theirs, strict=True)))


def aims() -> str:
    """What was aimed at, by target: the mean and the seeds."""

    def told(values: list[float], digits: int) -> str:
        if not values:
            return words.MISSING
        mean, *seeds = (f"{value:.{digits}f}" for value in (sum(values) / len(values), *values))
        return f"{mean} ({', '.join(seeds)})"

    rows = []
    for run, (file, steps, own) in RUNS.items():
        models = chain_models(file)
        nothing, tuned = (models[f"{name}@{steps}-renoise"] for name in ("source", "finetune"))
        for name, label in ((own, "many heads"), ("single-head", "one head")):
            if name not in models:
                continue
            values = {figure: _seeds(models[name], figure) for figure in (*DISTANCES, "diversity_share")}
            shares = [
                told([a / b for a, b in zip(values[f], _seeds(nothing, f), strict=True)] if values[f] else [], 2)
                for f in DISTANCES
            ]
            nearer = " · ".join(_count(values[f], _seeds(tuned, f)) for f in DISTANCES)
            rows.append([run, label, *shares, nearer, told([100 * v for v in values["diversity_share"]], 0)])
    header = ["", "", "FD, of doing nothing's", "FD-pixels, of doing nothing's"]
    return words.markdown([*header, "seeds nearer than fine-tuning", "diversity, % of real"], rows)


def targets() -> str:
    """One step by target: doing nothing, two stages, Uni-DAD."""
    ways = {"source@1-renoise": "doing nothing", "finetune-then-dmd2": "two stages", "unidad": "Uni-DAD"}
    figures = {"FD": ("fd", 1.0), "FD-pixels": ("fd_pixels", 1.0), "copies, %": ("memorised", 100.0)}
    columns = [(heading, way) for heading in figures for way in ways]
    columns.remove(("copies, %", "source@1-renoise"))  # it has seen none of them
    rows = []
    for run, (file, steps, own) in RUNS.items():
        models = chain_models(file)
        if steps == 1 and own in ways:
            told = [cell(models[way], f"s=1 {figures[heading][0]}", figures[heading][1]) for heading, way in columns]
            rows.append([run.removesuffix(", one step"), *told])
    return words.markdown(["", *(f"{heading}: {ways[way]}" for heading, way in columns)], rows)


def duels() -> str:
    """In how many seeds Uni-DAD is nearer, and copies less, than a way it is compared with."""
    others = {"finetune-then-dmd2": "fine-tuning, then DMD2", "single-head": "a single head"}
    others["no-target-teacher"] = "no target teacher"
    rows = []
    for run, (file, _, own) in RUNS.items():
        models = chain_models(file)
        mine = {figure: _seeds(models[own], figure) for figure in (*DISTANCES, "memorised")}
        if own == "unidad":  # the other ways are in as many steps
            compared = [models.get(other) for other in others]
            told = [" · ".join(_count(mine[f], _seeds(m, f)) for f in mine) if m else words.MISSING for m in compared]
            rows.append([run, *told])
    return words.markdown(["Uni-DAD against", *others.values()], rows)
