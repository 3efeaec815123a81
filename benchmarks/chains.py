"""A chain recipe over several seeds, in one file of figures: what the tables of docs/guided.md and others are made of.

    python benchmarks/chains.py cascade-digits-grid --seeds 3 --out benchmarks/results/cascade-digits-grid.json

Each seed is a chain of its own, its teacher included, under --runs; nothing that is there already is done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffstill.console import make_ui
from diffstill.disk import write_text
from diffstill.engine.runtime import Runtime
from diffstill.evaluation.intervals import t_interval
from diffstill.evaluation.results import ModelEvaluation
from diffstill.jobs.chain import chain
from diffstill.recipe import ChainRecipe, load_recipe, resolved
from diffstill.report.frontier import gap_error
from diffstill.report.receipt import Receipt

POINT = ("fd", "fd_pixels", "kid", "class_agreement", "response", "precision", "recall")
"""Quantities of a sweep's point that are kept."""
FEW = ("diversity", "diversity_share", "memorised", "nearest_ratio", "source_fd")
"""And of its figures about few images."""


def run(name: str, overrides: Sequence[str], seed: int, out: Path) -> Receipt:
    """The receipt of one seed's chain, new or found finished."""
    recipe = load_recipe(name, [*overrides, f"seed={seed}"])
    assert isinstance(recipe, ChainRecipe), f"{name} is no chain"
    if (out / "receipt.json").exists() and (held := Receipt.load(out)).recipe == resolved(recipe):
        return held
    runtime, ui = Runtime("cpu"), make_ui(quiet=False, speaks=True)
    finished = chain(recipe, out, runtime, ui)
    assert finished.receipt is not None
    return finished.receipt


def figures(model: ModelEvaluation, first: ModelEvaluation) -> dict[str, float | None]:
    """Every figure of one model by name; ``first`` is the chain's first model, of the same seed."""
    found: dict[str, float | None] = {}
    for point in model.sweep:
        few = {name: getattr(point.few_shot, name) for name in FEW} if point.few_shot is not None else {}
        for quantity, estimate in {**{name: getattr(point, name) for name in POINT}, **few}.items():
            found[f"s={point.guidance} {quantity}"] = estimate.value if estimate is not None else None
    best, under = (m.best.fd.value if m.best else None for m in (model, first))
    found["best fd"] = best
    found["best fd / first"] = best / under if best is not None and under else None
    if model.fidelity is not None:
        for part in ("ratio", "cosine", "gap_mse", "cond_mse", "null_mse"):
            found[part] = getattr(model.fidelity.overall, part).value
        error = gap_error(model)
        found["gap error"] = error.value if error is not None else None
    return found


def summary(receipts: Sequence[Receipt]) -> dict[str, dict[str, Any]]:
    """Model -> what it is and, by figure, the seeds' values with their mean and 95% t-interval."""
    found: dict[str, dict[str, Any]] = {}
    measured = [{**r.models, **r.baselines} for r in receipts]
    for name, model in measured[0].items():
        seeds = [figures(each[name], next(iter(each.values()))) for each in measured]
        trained = next((t for t in receipts[0].training if t.name == name), None)
        found[name] = {
            "method": model.method,
            "steps": model.steps,
            "parameters": model.cost.parameters if model.cost else None,
            "nfe": model.cost.nfe if model.cost else None,
            "flops_image": model.cost.flops_image if model.cost else None,
            "images": trained.images_seen if trained else None,
            "seconds": trained.seconds if trained else None,
            "latency_s": {str(time.batch): time.median_s for time in model.cost.latency} if model.cost else None,
            "figures": {
                figure: {
                    "seeds": (values := [one.get(figure) for one in seeds]),
                    "mean": t_interval(values).model_dump(exclude={"level"}),
                }
                for figure in seeds[0]
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, nargs="+", help="data.split_seed of each seed, for other images each")
    parser.add_argument("--runs", type=Path, default=Path("runs/chains"))
    parser.add_argument("--out", type=Path, help="the JSON; default: under --runs, named after the recipe")
    asked = parser.parse_args()
    if asked.splits is not None and len(asked.splits) != asked.seeds:
        parser.error(f"--splits: {len(asked.splits)} of them for {asked.seeds} seeds; give one a seed")
    receipts = []
    for seed in range(asked.seeds):
        own = [f"data.split_seed={asked.splits[seed]}"] if asked.splits else []
        folder = asked.runs / f"{asked.recipe}-{seed}"
        receipts.append(run(asked.recipe, [*asked.overrides, *own], seed, folder))
    told = receipts[0]
    written = {
        "recipe": asked.recipe,
        "overrides": asked.overrides,
        "seeds": asked.seeds,
        "splits": asked.splits,
        "environment": told.environment.model_dump(mode="json"),
        "protocol": told.protocol.model_dump(mode="json") if told.protocol else None,
        "models": summary(receipts),
    }
    out = asked.out or asked.runs / f"{asked.recipe}.json"
    write_text(out, json.dumps(written, indent=1, sort_keys=True) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
