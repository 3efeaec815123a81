"""What one image and a thousand take, of the first and of later stages of a chain: real runs, nothing scaled.

    python benchmarks/latency.py runs/cascade-digits teacher small steps-4 --out benchmarks/results/cascade-latency.json

The machine must be quiet; all its cores are used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffstill.disk import write_text
from diffstill.evaluation.cost import measure_cost
from diffstill.models.folder import load_model
from diffstill.report.receipt import environment

STEPS = 50
"""Of a model that has more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    marks = [json.loads(path.read_text()) | {"home": path.parent} for path in asked.run.glob("stages/*/stage.json")]
    homes = {mark["name"]: mark["home"] for mark in sorted(marks, key=lambda mark: mark["home"].stat().st_mtime)}
    found = {}
    for stage in asked.stages:
        model = load_model(homes[stage] / "model").denoiser
        cost = measure_cost(model, steps=min(STEPS, model.schedule.T), batches=(1, 1000))
        found[stage] = cost.model_dump(mode="json")
        print(stage, *(f"{item.batch}: {item.median_s:.3g} s" for item in cost.latency))
    told = {"environment": environment("cpu").model_dump(mode="json"), "guidance": 2, "models": found}
    write_text(asked.out, json.dumps(told, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
