"""What each way from ten images to a generator costs to train: seconds and memory, as ratios in one run.

    python benchmarks/few_shot_cost.py --out benchmarks/results/few-shot-cost.json

Every way is a process of its own, so that its peak of resident memory is its own; the ways take turns, and a round
compares each with the plain one (fine-tuning) of the same round. Weights are random: what a step costs does not depend
on them. The machine must be quiet; ``--clock cpu`` with one thread counts the process's own seconds where it
is not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe, warnings
from timing import Clock, Spread

from diffstill.data.sources import load_data
from diffstill.disk import write_text
from diffstill.engine.arm import Arm
from diffstill.engine.loop import Trainer
from diffstill.engine.runtime import Runtime
from diffstill.engine.stream import BatchStream
from diffstill.jobs.build import build_arm
from diffstill.jobs.distill import blank_teacher
from diffstill.recipe import ArmSpec, DistillRecipe, load_recipe

PLAIN = "fine-tuning"
DMD2 = ("method.target_teacher=none", "method.target_weight=0")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    PLAIN: ("digits-finetune", ()),
    "DMD2, one step": ("digits-unidad-single-head", DMD2),
    "matching alone, one step": ("digits-dmd-only", ()),
    "GAN alone, one step": ("digits-gan-only", ()),
    "Uni-DAD without target teacher, one step": ("digits-unidad-no-target-teacher", ()),
    "Uni-DAD with a single head, one step": ("digits-unidad-single-head", ()),
    "Uni-DAD, one step": ("digits-unidad", ()),
    "DMD2, three steps": ("digits-unidad-single-head", (*DMD2, "method.steps=3")),
    "Uni-DAD, three steps": ("digits-unidad", ("method.steps=3",)),
}
"""Way -> recipe, overrides."""


@dataclass(frozen=True)
class Turn:
    """One way in one process."""

    step_s: float
    images: int
    """Of the recipe's whole training."""
    batch: int
    peak_mb: float
    """Peak of resident memory over what was held before the networks were built, 10^6 bytes; CUDA: peak allocated."""


def measure(way: str, device: str, steps: int, warm: int, clock: Clock) -> Turn:
    """A training of ``warm`` steps that are not timed and ``steps`` that are."""
    name, overrides = WAYS[way]
    recipe = load_recipe(name, list(overrides))
    assert isinstance(recipe, DistillRecipe)
    runtime, data, settings = Runtime(device), load_data(recipe.data), recipe.training
    now = time.perf_counter if clock == "wall" else time.process_time
    held = _resident()
    teacher = blank_teacher(recipe, data)
    method = build_arm(recipe, ArmSpec(method=recipe.method), teacher, 0)
    arm = Arm("arm", method, settings, runtime)
    stream = BatchStream(data.train, method.schedule, batch_size=settings.batch_size, seed=0, device=runtime.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer([arm], stream, settings, runtime, Path(folder), teacher=teacher.denoiser)
        for _ in range(warm):
            trainer.step()
        runtime.synchronize()
        began = now()
        for _ in range(steps):
            trainer.step()
        runtime.synchronize()
        seconds = now() - began
    cuda = runtime.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Turn(seconds / steps, settings.images, settings.batch_size, (peak - (0 if cuda else held)) / 1e6)


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def summary(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Way -> its ratios to the plain way, round by round, and what its recipe's whole training takes."""
    found = {}
    for way, mine in turns.items():
        pairs = list(zip(mine, turns[PLAIN], strict=True))
        step = statistics.median(turn.step_s for turn in mine)
        found[way] = {
            "step_s": step,
            "steps": mine[0].images // mine[0].batch,
            "training_s": step * mine[0].images / mine[0].batch,
            "peak_mb": statistics.median(turn.peak_mb for turn in mine),
            "step / plain": asdict(Spread.of([a.step_s / b.step_s for a, b in pairs])),
            "memory / plain": asdict(Spread.of([a.peak_mb / b.peak_mb for a, b in pairs])),
            "rounds": [asdict(turn) for turn in mine],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="timed steps a turn; a multiple of student_every")
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--way", choices=list(WAYS), help="one turn of one way, as JSON on the screen")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.way is not None:
        print(json.dumps(asdict(measure(asked.way, asked.device, asked.steps, asked.warm, asked.clock))))
        return
    if asked.out is None:
        parser.error("--out: name the file to write")
    device = Runtime(asked.device).device
    found = {"machine": describe(device), "warnings": warnings(device), "steps": asked.steps, "clock": asked.clock}
    turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
    same = ["--steps", str(asked.steps), "--warm", str(asked.warm), "--device", device.type]
    same += ["--clock", asked.clock]
    for _ in range(asked.rounds):
        for way in WAYS:
            words = [sys.executable, __file__, "--way", way, *same]
            told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            turn = Turn(**json.loads(told))
            turns[way].append(turn)
            print(f"{way:45s} {turn.step_s * 1e3:7.1f} ms a step, {turn.peak_mb:6.0f} MB", flush=True)
    found["ways"] = summary(turns)
    write_text(asked.out, json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
