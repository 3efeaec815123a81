"""One recipe under several sets of overrides and seeds, in one table: the instrument of every ablation.

    python benchmarks/variants.py digits-teacher --seeds 3 --common evaluation.samples=500 \\
        --variant eps --variant flat method.curriculum.snr_form=none --out benchmarks/results/digits-weighting.json
    python benchmarks/variants.py digits-dash --seeds 3 --variant each --variant second training.teacher_reuse=2 \\
        --common 'beside={}' --out benchmarks/results/digits-reuse.json

Each seed has its own teacher, from the first variant's run; the other variants distil from the same one, so differences
from the first variant are paired by seed. Runs stay under --runs and are not redone when the script is started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffstill.console import make_ui
from diffstill.disk import write_text
from diffstill.engine.runtime import Runtime
from diffstill.evaluation.intervals import t_interval
from diffstill.jobs.distill import distill
from diffstill.jobs.train import Finished, train
from diffstill.recipe import TrainRecipe, load_recipe
from diffstill.recipe.schema import TeacherSpec
from diffstill.report.receipt import Receipt


def run(name: str, overrides: Sequence[str], seed: int, out: Path, teacher: Path | None) -> Receipt:
    """The receipt of one training or distillation, new or found finished."""
    recipe = load_recipe(name, [*overrides, f"seed={seed}"])
    runtime, ui = Runtime("cpu"), make_ui(quiet=False, speaks=True)
    if isinstance(recipe, TrainRecipe):
        finished: Finished = train(recipe, out, runtime, ui)
    else:
        source = recipe.teacher
        if teacher is not None:
            source = TeacherSpec(model=str(teacher))
        elif source.recipe is not None:
            source = source.model_copy(update={"overrides": {**source.overrides, "seed": seed}})
        recipe = recipe.model_copy(update={"teacher": source})
        finished = distill(recipe, out, runtime, ui)
    assert finished.receipt is not None
    return finished.receipt


def figures(receipt: Receipt) -> dict[str, float | None]:
    """Every figure of the table by name."""
    found: dict[str, float | None] = {"seconds": receipt.training[-1].seconds}
    teacher = receipt.models.get("teacher")
    for role, model in receipt.models.items():
        for point in model.sweep:
            found[f"{role} s={point.guidance} fd"] = point.fd.value
            found[f"{role} s={point.guidance} agreement"] = (
                point.class_agreement.value if point.class_agreement else None
            )
        found[f"{role} best fd"] = best = model.best.fd.value if model.best else None
        if teacher is not None and role != "teacher":
            under = teacher.best.fd.value if teacher.best else None
            found[f"{role} / teacher best fd"] = best / under if best is not None and under else None
        if model.fidelity is not None:
            for part in ("ratio", "cosine", "gap_mse", "cond_mse", "null_mse"):
                found[f"{role} {part}"] = getattr(model.fidelity.overall, part).value
    return found


def table(variants: Mapping[str, Sequence[Receipt]]) -> dict[str, dict[str, Any]]:
    """By variant and figure: the seeds' values, their mean and 95% t-interval, and the paired difference from the first
    variant."""
    found: dict[str, dict[str, Any]] = {}
    base: dict[str, list[float | None]] = {}
    for name, receipts in variants.items():
        seeds = [figures(receipt) for receipt in receipts]
        columns = {figure: [values[figure] for values in seeds] for figure in seeds[0]}
        base = base or columns
        found[name] = {
            figure: {
                "seeds": values,
                "mean": t_interval(values).model_dump(),
                "difference": t_interval(
                    [None if a is None or b is None else a - b for a, b in zip(values, base[figure], strict=True)]
                ).model_dump(),
            }
            for figure, values in columns.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--common", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar="NAME key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    first = asked.variant[0][0]
    receipts: dict[str, list[Receipt]] = {name: [] for name, *_ in asked.variant}
    for seed in range(asked.seeds):
        for name, *overrides in asked.variant:
            folder = asked.runs / asked.out.stem
            teacher = None if name == first else folder / f"{first}-{seed}" / "teacher"
            receipts[name].append(
                run(asked.recipe, [*asked.common, *overrides], seed, folder / f"{name}-{seed}", teacher)
            )
    found = table(receipts)
    told = receipts[first][0]
    written = {
        "recipe": asked.recipe,
        "common": asked.common,
        "overrides": {name: overrides for name, *overrides in asked.variant},
        "seeds": asked.seeds,
        "environment": told.environment.model_dump(mode="json"),
        "protocol": told.protocol.model_dump(mode="json") if told.protocol else None,
        "variants": found,
    }
    write_text(asked.out, json.dumps(written, indent=1, sort_keys=True) + "\n")
    for name, rows in found.items():
        print(name)
        for figure, row in rows.items():
            apart = "" if name == first else f"   difference {_shown(row['difference'])}"
            print(f"  {figure:28s} {_shown(row['mean'])}{apart}")


def _shown(estimate: Mapping[str, Any]) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "-"
    return f"{value:.4g}" if low is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


if __name__ == "__main__":
    main()
