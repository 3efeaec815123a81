"""Writes the measured tables of README.md and docs/ from the files under benchmarks/results/.

    python benchmarks/tables.py

A table stands between ``<!-- begin: measured NAME -->`` and ``<!-- end -->``; ``TABLES`` says what NAME may be. A test
compares the pages with the files, so that no page tells an older measurement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar10_results import aims_table
from cifar10_results import table as models_table
from few_shot_tables import BOTH, aims, by_number, by_way, cost, duels, smaller, targets
from result_files import RESULTS, cell, chain_models, scaled

from diffstill.report import words
from diffstill.report.arena import ArenaArm, ArenaResult, Budget, best_fd, fidelity, markdown_table, seconds

ROOT = Path(__file__).resolve().parents[1]
DOCS = ("dash", "decisions", "guided", "chain", "sfddm", "unidad", "cifar10")
PAGES = ("README.md", *(f"docs/{name}.md" for name in DOCS))
CASCADE, NATURAL_FILE = "cascade-digits-grid.json", "cascade-cifar10-small.json"
MARKED = re.compile(r"<!-- begin: measured ([\w -]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def arena(of: str = "digits-arena") -> ArenaResult:
    return ArenaResult.load(RESULTS / of)


def arena_summary() -> str:
    """One line a method at equal steps, and its best distance at equal seconds; the ablations are left to the docs."""
    found = arena()
    arms = [arm for arm in found.ranked() if not arm.name.startswith("dash-") or arm.name == "dash-inherit"]
    assert found.teacher.best is not None
    assert found.teacher.cost is not None

    def cells(arm: ArenaArm) -> list[str]:
        fidelities = [
            arm.mean(fidelity(part, factor)) for part, factor in (("ratio", 1), ("cosine", 1), ("gap_mse", 1000))
        ]
        measured = [arm.mean(best_fd), *fidelities]
        timed = [words.seconds(arm.mean(seconds).value), words.plus_minus(arm.mean(best_fd, "equal_seconds"))]
        return [arm.label, words.count(arm.parameters), *map(words.plus_minus, measured), *timed]

    best = words.number(found.teacher.best.fd.value)
    teacher = ["Teacher", words.count(found.teacher.cost.parameters), best, "1", "1", "0", "", best]
    header = [
        "arm",
        "parameters",
        f"best {found.protocol.extractor.name}",
        "gap ratio",
        "gap cosine",
        "gap MSE \u00d7 1000",
    ]
    return words.markdown([*header, "training", "best at equal seconds"], [teacher, *map(cells, arms)])


def arena_at(budget: Budget, of: str = "digits-arena") -> Callable[[], str]:
    return lambda: markdown_table(arena(of), budget)


def throughput() -> str:
    """The library's own step and the sampler against the straightforward loop."""
    report = json.loads((RESULTS / "throughput-cpu.json").read_text(encoding="utf-8"))
    ladders = {(ladder["work"], ladder["nets"]): ladder for ladder in report["ladders"]}
    sampled = {times["nets"]: times for times in report["sampling"]}

    def spread(rung: dict[str, Any]) -> str:
        ratio = rung["ratio"]
        return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"

    def reuse(nets: str) -> str:
        return spread(next(r for r in ladders["distil", nets]["rungs"] if r["name"].startswith("teacher reuse")))

    def images(nets: str) -> str:
        times = sampled[nets]
        few = f"{times['measured_images']} images in {times['measured_steps']} of the steps"
        note = f", scaled from {few}" if times["scaled"] else ""
        teacher, student = times["teacher_s_per_1000"], times["student_s_per_1000"]
        return f"{teacher:,.0f} s / {student:,.0f} s ({times['ratio']['median']:.2f}x{note})"

    nets = {"digits": "digits networks", "cifar": "published CIFAR networks"}
    header = [f"{label}, batch {ladders['distil', name]['batch']}" for name, label in nets.items()]
    return words.markdown(
        ["", *header],
        [
            ["DASH step, as diffstill runs it", *(spread(ladders["distil", name]["library"]) for name in nets)],
            ["by hand, with `teacher_reuse: 2`", *map(reuse, nets)],
            ["teacher training step", *(spread(ladders["train", name]["library"]) for name in nets)],
            ["1,000 images, 50 guided steps, teacher / student", *map(images, nets)],
        ],
    )


def variants(file: str, labels: dict[str, str], columns: dict[str, tuple[str, float]]) -> Callable[[], str]:
    """Rows by variant: means with half a 95% t-interval, the paired difference from the first variant in brackets.

    Args:
        columns: heading -> (figure of ``variants.py``, factor).
    """

    def made() -> str:
        found = json.loads((RESULTS / file).read_text(encoding="utf-8"))["variants"]

        def cell(name: str, figure: str, factor: float) -> str:
            row = found[name][figure]
            mean, apart = (scaled(row[key], factor) for key in ("mean", "difference"))
            first = name == next(iter(labels))
            return words.plus_minus(mean) + ("" if first else f" ({words.plus_minus(apart, signed=True)})")

        rows = [[label, *(cell(name, *column) for column in columns.values())] for name, label in labels.items()]
        return words.markdown(["", *columns], rows)

    return made


STUDENT: dict[str, tuple[str, float]] = {
    "teacher, best FD-digits": ("teacher best fd", 1),
    "student, best FD-digits": ("student best fd", 1),
    "student / teacher": ("student / teacher best fd", 1),
    "gap ratio": ("student ratio", 1),
    "gap cosine": ("student cosine", 1),
}


def guided_grid() -> str:
    """FD by sampler, steps and scale, with the class agreement at s = 2."""
    models, scales = chain_models(CASCADE), ("1", "1.3", "2", "3", "5")
    rows = [["teacher", "teacher"], ["one network for every scale (`full-dial`)", "full-dial"]]
    rows += [[f"student, deterministic, {n} step{'s' * (n > 1)}", f"full-{n}"] for n in (16, 8, 4, 2, 1)]
    rows += [[f"student, stochastic, {n} steps", f"stochastic-{n}"] for n in (16, 8, 4, 2)]
    rows += [[f"teacher as it is, {n} step{'s' * (n > 1)}", f"teacher@{n}"] for n in (16, 8, 4, 2, 1)]
    return words.markdown(
        ["", "NFE, s > 1", *(f"s = {s}" for s in scales), "agreement, s = 2"],
        [
            [label, str(models[name]["nfe"]), *(cell(models[name], f"s={s} fd") for s in scales),
             cell(models[name], "s=2 class_agreement")]
            for label, name in rows
        ],
    )  # fmt: skip


def at_best(model: dict[str, Any]) -> tuple[str, int]:
    """The scales of the seeds' lowest distances, and the network evaluations an image there: at s = 1 a model of two
    passes a step needs one."""
    sweeps = {
        figure[2:-3]: told["seeds"] for figure, told in model["figures"].items() if re.fullmatch(r"s=\S+ fd", figure)
    }
    best = {min(sweeps, key=lambda scale: sweeps[scale][seed]) for seed in range(len(next(iter(sweeps.values()))))}
    single = best == {"1"} and model["nfe"] == 2 * model["steps"]
    return ", ".join(sorted(best, key=float)), model["steps"] if single else model["nfe"]


def cascade(rows: dict[str, str], file: str = CASCADE, distance: str = "FD-digits") -> Callable[[], str]:
    """Stage by stage: what it costs beside the teacher, and what is left."""

    def made() -> str:
        models = chain_models(file)

        def flops(m: dict[str, Any]) -> float:
            return float(m["flops_image"]) / m["nfe"] * at_best(m)[1]

        def row(label: str, m: dict[str, Any]) -> list[str]:
            scale, nfe = at_best(m)
            told = [label, words.count(m["parameters"]), cell(m, "best fd"), scale, str(nfe)]
            told.append(f"{words.number(flops(models['teacher']) / flops(m))}x")
            return [*told, *(cell(m, f) for f in ("best fd / first", "ratio", "cosine", "s=2 response"))]

        header = [
            "",
            "parameters",
            f"best {distance}",
            "at s",
            "NFE there",
            "fewer FLOPs",
            "of the teacher's",
            "gap ratio",
            "gap cosine",
        ]
        return words.markdown(
            [*header, "response, s = 1 to 2"], [row(label, models[name]) for name, label in rows.items()]
        )

    return made


def by_scale(rows: dict[str, str], file: str, scales: Sequence[str]) -> Callable[[], str]:
    """Distance at every scale, and the share of samples of the class asked for at the first and at the last."""

    def made() -> str:
        models, ends = chain_models(file), (scales[0], scales[-1])
        header = ["", "NFE, s > 1", *(f"s = {s}" for s in scales), *(f"agreement, s = {s}" for s in ends)]
        asked = [*(f"s={s} fd" for s in scales), *(f"s={s} class_agreement" for s in ends)]
        return words.markdown(
            header,
            [
                [label, str(models[name]["nfe"]), *(cell(models[name], figure) for figure in asked)]
                for name, label in rows.items()
            ],
        )

    return made


def sfddm() -> str:
    """Best distance by number of steps, a column a way to fewer."""
    models = chain_models("sfddm-digits.json")
    ways = {
        "strided, leading": "teacher@{}-leading",
        "SFDDM, leading": "sfddm-{}",
        "strided, trailing": "teacher@{}",
        "trajectory (ours), trailing": "trajectory-{}",
        "progressive, trailing": "progressive-{}",
    }
    return words.markdown(
        ["steps", *ways],
        [[str(n), *(cell(models[way.format(n)], "best fd") for way in ways.values())] for n in (100, 50, 16, 8, 4, 2)],
    )


def cifar10(made: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table of ``cifar10.py``'s results; a line where there are none yet."""

    def told() -> str:
        file = RESULTS / "cifar10" / "cifar10.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"smoke": True}
        if found["smoke"]:
            return "No figures yet: no GPU was available. The script has run to the end in its smoke form on a CPU.\n"
        return made(found)

    return told


SMALL_AND_FAST = {
    "small": "DASH student",
    "dial": "one pass at any scale",
    **{f"steps-{n}": f"{n} step{'s' * (n > 1)}" for n in (8, 4, 2, 1)},
}
NATURAL = {
    "teacher": "teacher, 25 guided steps",
    **SMALL_AND_FAST,
    "teacher@8": "the teacher as it is, 8 guided steps",
    "teacher@4": "the teacher as it is, 4 guided steps",
}
TABLES: dict[str, Callable[[], str]] = {
    "guided grid": guided_grid,
    "cascade": cascade(
        {
            "teacher": "teacher, 50 guided steps",
            **SMALL_AND_FAST,
            "teacher@4": "the teacher as it is, 4 guided steps",
        }
    ),
    "cascade natural": cascade(NATURAL, NATURAL_FILE, "FD-cifar10"),
    "cascade natural by scale": by_scale(NATURAL, NATURAL_FILE, ("1", "1.5", "2", "3", "4")),
    "orders": cascade(
        {
            "steps-4": "small (DASH), then the scale, then 4 steps",
            "small-last": "the scale, 4 steps, then small",
            "small-sfddm": "small (DASH), then SFDDM with trajectories, two passes a step",
            "full-4": "4 steps at full size",
        }
    ),
    "sfddm": sfddm,
    "arena": arena_summary,
    "arena at equal steps": arena_at("equal_steps"),
    "arena at equal seconds": arena_at("equal_seconds"),
    "arena cifar10 small": arena_at("equal_steps", "cifar10-small-arena"),
    "throughput": throughput,
    "demo": variants(
        "digits-student.json",
        {"default": "mean of three runs, each with its own teacher"},
        STUDENT,
    ),
    "few shot": by_way("few-shot-digits.json", 1),
    "few shot far": by_way("few-shot-digits-far.json", names=BOTH),
    "few shot by number": by_number(
        {1: "few-shot-digits-1.json", 5: "few-shot-digits-5.json", 10: "few-shot-digits.json"}
    ),
    "few shot far by number": by_number(
        {1: "few-shot-digits-far-1.json", 5: "few-shot-digits-far-5.json", 10: "few-shot-digits-far.json"}
    ),
    "few shot fashion far by number": by_number(
        {1: "few-shot-fashion-far-1.json", 5: "few-shot-fashion-far-5.json", 10: "few-shot-fashion-far.json"}
    ),
    "few shot fashion": by_way("few-shot-fashion.json", 1),
    "few shot fashion three steps": by_way("few-shot-fashion-3.json", 3),
    "few shot three steps slow": by_way("few-shot-digits-3-slow.json", 3),
    "few shot fashion three steps slow": by_way("few-shot-fashion-3-slow.json", 3),
    "few shot fashion by number": by_number(
        {1: "few-shot-fashion-1.json", 5: "few-shot-fashion-5.json", 10: "few-shot-fashion.json"}
    ),
    "few shot fashion far": by_way("few-shot-fashion-far.json", names=BOTH),
    "few shot fashion fixed": by_way("few-shot-fashion-fixed.json", 1),
    "few shot fashion far fixed": by_way("few-shot-fashion-far-fixed.json", 1),
    "few shot fashion tens": by_way("few-shot-fashion-tens.json", names=BOTH),
    "few shot small": smaller("few-shot-digits-small.json"),
    "few shot aims": aims,
    "few shot duels": duels,
    "few shot targets": targets,
    "few shot cost": cost,
    "cifar10": cifar10(models_table),
    "cifar10 aims": cifar10(aims_table),
    "few shot three steps": by_way("few-shot-digits-3.json", 3),
    "student": variants(
        "digits-student.json",
        {"default": "as the recipe says", "reuse2": "`teacher_reuse: 2`", "fp32-teacher": "`teacher_precision: fp32`"},
        {
            **STUDENT,
            "gap MSE \u00d7 1000": ("student gap_mse", 1000),
        },
    ),
    "weighting": variants(
        "digits-weighting.json",
        {"eps": "`eps`: standard Min-SNR", "flat": "`none`: flat", "x0": "`x0`: as published"},
        {
            "FD-digits, s = 1": ("teacher s=1 fd", 1),
            "s = 1.5": ("teacher s=1.5 fd", 1),
            "s = 2": ("teacher s=2 fd", 1),
            "agreement, s = 1": ("teacher s=1 agreement", 1),
            "s = 2 ": ("teacher s=2 agreement", 1),
        },
    ),
}


def with_tables(text: str) -> str:
    return MARKED.sub(lambda m: f"<!-- begin: measured {m[1]} -->\n{TABLES[m[1]]()}<!-- end -->", text)


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
