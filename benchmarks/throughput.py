"""Measures the speed ladder of training steps and of sampling, as ratios within one run; see README.md beside this.

python benchmarks/throughput.py                          digits and CIFAR nets, in full
python benchmarks/throughput.py --nets digits --quick    does it run at all?
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ladder import Effort, Ladder, Result, climb
from machine import describe, load_average, slug
from machine import warnings as machine_warnings
from problem import NETS, Nets, Problem
from sampling import Plan, SamplingTimes, measure_sampling
from timing import Stopwatch

from diffstill.engine.runtime import Runtime

FORMAT = "diffstill-throughput/1"
UNSTEADY = 0.15
"""Spread of a rung's ratios, relative to their median, above which a warning is written."""


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    runtime = Runtime(args.device)
    device = runtime.device
    out = args.out or Path(__file__).parent / "results" / f"throughput-{slug(device)}.json"
    watch = Stopwatch(device, args.clock)
    machine, warned = describe(device), machine_warnings(device)
    for line in warned:
        print(f"warning: {line}", file=sys.stderr)
    began = time.monotonic()
    ladders: list[Ladder] = []
    sampled: list[SamplingTimes] = []

    def write(complete: bool) -> None:
        report = {
            "format": FORMAT,
            "complete": complete,
            "machine": machine | {"load_average_after": load_average()},
            "settings": _settings(args) | {"seconds": round(time.monotonic() - began, 1)},
            "warnings": [*warned, *_unsteady(ladders)],
            "ladders": [asdict(ladder) for ladder in ladders],
            "sampling": [asdict(times) for times in sampled],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for nets in args.nets:
        for batch in _batches(nets, args, device):
            for work in args.work:
                ladders.append(_ladder(Problem(nets, work, batch, device), runtime, watch, args))
                write(complete=False)  # a run that is cut short keeps what it has
        if "distil" in args.work and not args.no_sampling:
            sampled.append(_sampling(nets, device, watch, args.quick))
    write(complete=True)
    print(f"\nwritten: {out}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=_nets, default=list(NETS.values()), help="digits,cifar")
    parser.add_argument("--work", type=_works, default=["distil", "train"], help="distil,train")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--digits-batch", type=_numbers, help="batch sizes; default 64")
    parser.add_argument("--cifar-batch", type=_numbers, help="batch sizes; default 16 on a CPU, 64,256,512 on CUDA")
    parser.add_argument("--rounds", type=int, help="turns of each rung; default by the length of a step")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's own (OMP_NUM_THREADS)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds, on a busy machine")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (minutes on a CPU)")
    parser.add_argument("--no-sampling", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny batches, one round: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file; default results/throughput-<device>.json")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: use 1 or more")
    return args


def _nets(text: str) -> list[Nets]:
    return [NETS[name] for name in _words(text, NETS)]


def _works(text: str) -> list[str]:
    return _words(text, ("distil", "train"))


def _words(text: str, known: Iterable[str]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: use positive numbers")
    return numbers


def _batches(nets: Nets, args: argparse.Namespace, device: torch.device) -> tuple[int, ...]:
    asked: tuple[int, ...] | None = getattr(args, f"{nets.name}_batch")
    return asked or ((2,) if args.quick else nets.batches.get(device.type, (64,)))


def _effort(problem: Problem, args: argparse.Namespace) -> Effort:
    if args.quick:
        return Effort(args.rounds or 1, 0.0, compile=False)
    long = _long_steps(problem)
    # Compiling a network for training takes a CPU about as long as the rest of its ladder; once a pair is enough.
    compiles = not args.no_compile and (problem.device.type == "cuda" or problem.work == "distil")
    return Effort(args.rounds or (2 if long else 5), 0.0 if long else 0.4, compiles)


def _long_steps(problem: Problem) -> bool:
    return problem.device.type == "cpu" and problem.nets.name == "cifar"


def _ladder(problem: Problem, runtime: Runtime, watch: Stopwatch, args: argparse.Namespace) -> Ladder:
    title = "distillation" if problem.work == "distil" else "teacher training"
    print(f"\n{problem.nets.name} nets, {title} step, batch {problem.batch}: ratio over the straightforward loop")
    together = _long_steps(problem)
    ladder = climb(problem, runtime, watch, _effort(problem, args), host_together=together, say=_say)
    if ladder.aim is not None and ladder.library.ratio is not None and not args.quick:
        verdict = "reached" if ladder.library.ratio.median >= ladder.aim else "not reached"
        print(f"  aim {ladder.aim:g}x: {verdict}")
    return ladder


def _say(result: Result) -> None:
    if result.ratio is None:
        print(f"  {result.name:32s} skipped: {result.skipped}", flush=True)
        return
    mark = "optional" if result.optional else "kept" if result.kept else "" if not result.switches else "dropped"
    spread = f"{result.ratio.median:5.2f}x  [{result.ratio.low:.2f}, {result.ratio.high:.2f}]"
    print(f"  {result.name:32s} {spread}  {result.images_per_s:8.1f} images/s  {mark}", flush=True)


def _sampling(nets: Nets, device: torch.device, watch: Stopwatch, quick: bool) -> SamplingTimes:
    problem = Problem(nets, "distil", 1, device)
    if quick:
        plan = Plan(rounds=1, images=2, steps=2)
    elif _long_steps(problem):
        plan = Plan(rounds=2, images=8, steps=5)
    else:
        plan = Plan(rounds=4, images=250)
    times = measure_sampling(problem, watch, plan)
    how = f", scaled from {times.measured_images} images of {times.measured_steps} steps" if times.scaled else ""
    print(
        f"\n{nets.name} nets, seconds for 1,000 images ({times.steps} steps, guidance {times.guidance:g}{how}): "
        f"teacher {times.teacher_s_per_1000:.1f}, student {times.student_s_per_1000:.1f}, "
        f"ratio {times.ratio.median:.2f}x [{times.ratio.low:.2f}, {times.ratio.high:.2f}]"
    )
    return times


def _unsteady(ladders: list[Ladder]) -> Iterable[str]:
    for ladder in ladders:
        for result in (*ladder.rungs, ladder.library):
            spread = result.ratio
            if spread and (spread.high - spread.low) / spread.median > UNSTEADY:
                where = f"{ladder.nets} {ladder.work} batch {ladder.batch}, {result.name}"
                yield f"{where}: ratios spread from {spread.low:.2f} to {spread.high:.2f}"


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    plain = {key: value for key, value in vars(args).items() if key not in ("out", "nets")}
    return plain | {"nets": [nets.name for nets in args.nets]}


if __name__ == "__main__":
    raise SystemExit(main())
