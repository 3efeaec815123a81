"""One training recipe under several sets of overrides and seeds, in one table: the instrument of every ablation.

    python benchmarks/variants.py digits-teacher --seeds 3 --common training.images=38400 evaluation.samples=500 \\
        --variant flat method.curriculum.snr_form=none --variant x0 method.curriculum.snr_form=x0 \\
        --out benchmarks/results/digits-weighting.json

Runs stay under --runs and are not redone when the script is started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diffstill.console import make_ui
from diffstill.engine.runtime import Runtime
from diffstill.jobs.train import train
from diffstill.recipe import TrainRecipe, load_recipe
from diffstill.report.arena import t_interval
from diffstill.report.receipt import Receipt, write_text


def run(recipe: str, overrides: list[str], seed: int, out: Path) -> Receipt:
    """The receipt of one training, new or found finished."""
    made = load_recipe(recipe, [*overrides, f"seed={seed}"])
    if not isinstance(made, TrainRecipe):
        raise SystemExit(f"{recipe} is no training recipe")
    finished = train(made, out, Runtime("cpu"), make_ui(quiet=False, speaks=True))
    assert finished.receipt is not None
    return finished.receipt


def summarise(receipts: list[Receipt]) -> dict[str, Any]:
    """Mean and 95% t-interval over seeds, by guidance setting."""
    models = [receipt.models["teacher"] for receipt in receipts]
    table: dict[str, Any] = {"seconds": [receipt.training[0].seconds for receipt in receipts]}
    for number, point in enumerate(models[0].sweep):
        points = [model.sweep[number] for model in models]
        table[point.guidance] = {
            metric: t_interval([getattr(p, metric).value for p in points]).model_dump()
            for metric in ("fd", "class_agreement")
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--common", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar="NAME key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    table: dict[str, Any] = {}
    receipt = None
    for name, *overrides in asked.variant:
        receipts = [
            run(asked.recipe, [*asked.common, *overrides], seed, asked.runs / asked.out.stem / f"{name}-{seed}")
            for seed in range(asked.seeds)
        ]
        receipt = receipts[0]
        table[name] = {"overrides": overrides, **summarise(receipts)}
    assert receipt is not None
    protocol = receipt.protocol.model_dump(mode="json") if receipt.protocol else None
    found = {
        "recipe": asked.recipe,
        "common": asked.common,
        "seeds": asked.seeds,
        "environment": receipt.environment.model_dump(mode="json"),
        "protocol": protocol,
        "variants": table,
    }
    write_text(asked.out, json.dumps(found, indent=1, sort_keys=True) + "\n")
    for name, row in table.items():
        scales = [key for key in row if key not in ("overrides", "seconds")]
        print(
            f"{name:12s}",
            "  ".join(f"s={s}: {row[s]['fd']['value']:.2f}/{row[s]['class_agreement']['value']:.3f}" for s in scales),
        )


if __name__ == "__main__":
    main()
