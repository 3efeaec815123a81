"""Measures the speed ladder of training steps and of sampling, as ratios within one run; see README.md beside this.

python benchmarks/throughput.py                          digits and CIFAR nets, in full
python benchmarks/throughput.py --nets digits --quick    does it run at all?
python benchmarks/throughput.py --resume                 goes on where the same command was killed
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ladder import Begun, Bench, Effort, Ladder, Result, climb
from machine import describe, load_average, matrix_rate, slug
from machine import warnings as machine_warnings
from problem import NETS, Nets, Problem
from sampling import Plan, SamplingTimes, measure_sampling
from timing import Spread, Stopwatch

from diffstill.disk import write_text
from diffstill.engine.runtime import Runtime

FORMAT = "diffstill-throughput/1"
UNSTEADY = 0.15
"""Spread of a rung's ratios, relative to their median, above which a warning is written."""
WIDTH = 119
"""Characters of a printed line at most."""
FREE = ("out", "resume", "device", "seconds")
"""Settings that a resumed run may have otherwise; of the device it is the name that counts."""


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = _arguments(parser, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    runtime = Runtime(args.device)
    device = runtime.device
    out = args.out or Path(__file__).parent / "results" / f"throughput-{slug(device)}.json"
    report = Report(out, describe(device), _settings(args), machine_warnings(device))
    if args.resume and out.exists():
        refused = report.resume()
        if refused:
            parser.error(f"--resume {out}: {refused}")
        if report.complete:
            print(f"complete already: {out}")
            return 0
    for line in report.warned:
        print(f"warning: {line}", file=sys.stderr)
    watch = Stopwatch(device, args.clock)
    if "matrix_rate" not in report.machine:
        report.machine["matrix_rate"] = matrix_rate(device, watch, **({"least_s": 0.002} if args.quick else {}))
    bench = Bench(runtime, watch, report.machine["matrix_rate"], report.process)
    for nets in args.nets:
        for batch in _batches(nets, args, device):
            for work in args.work:
                _ladder(Problem(nets, work, batch, device), bench, args, report)
        if "distil" in args.work and not args.no_sampling and not report.has_sampled(nets):
            report.sampled.append(_sampling(nets, device, watch, args.quick))
            report.write()
    report.write(complete=True)
    print(f"\nwritten: {out}")
    return 0


class Report:
    """The JSON file as it grows. It is written whole after every rung, so that a run may be killed at any time."""

    def __init__(self, out: Path, machine: dict[str, Any], settings: dict[str, Any], warned: list[str]) -> None:
        self.out, self.machine, self.warned = out, machine, warned
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.ladders: list[Ladder] = []
        self.begun: Begun | None = None
        self.sampled: list[SamplingTimes] = []
        self.process = 1
        self.complete = False
        self._began = time.monotonic()

    def resume(self) -> str | None:
        """Takes over what the file holds, or says in a line why it is not a beginning of this very run."""
        try:
            found = json.loads(self.out.read_text(encoding="utf-8"))
            theirs = _identity(found["format"], found["machine"], found["settings"])
            for name, mine in _identity(FORMAT, self.machine, self.settings).items():
                if theirs.get(name) != mine:
                    return f"{name} is {theirs.get(name)!r} in the file and {mine!r} here; use another --out"
            self.ladders = [Ladder.of(plain) for plain in found["ladders"]]
            self.begun = Begun.of(found["unfinished"]) if found.get("unfinished") else None
            self.sampled = [SamplingTimes.of(plain) for plain in found["sampling"]]
            self.warned = list(dict.fromkeys([*found["warnings"], *self.warned]))
            self._began -= found["settings"]["seconds"]
            self.process, self.complete = found.get("processes", 1) + 1, found["complete"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"no report of this benchmark ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
        self.machine = found["machine"]  # with the rates by which its figures were made
        return None

    def has_ladder(self, problem: Problem) -> bool:
        return any(_is_of(ladder, problem) for ladder in self.ladders)

    def has_sampled(self, nets: Nets) -> bool:
        return any(times.nets == nets.name for times in self.sampled)

    def begun_on(self, problem: Problem) -> Begun | None:
        """The rungs that an earlier process measured of this problem."""
        return self.begun if self.begun and _is_of(self.begun, problem) else None

    def keep(self, begun: Begun) -> None:
        self.begun = begun
        self.write()

    def add(self, ladder: Ladder) -> None:
        self.ladders.append(ladder)
        self.begun = None
        self.write()

    def write(self, complete: bool = False) -> None:
        report = {
            "format": FORMAT,
            "complete": complete,
            "machine": self.machine | {"load_average_after": load_average()},
            "settings": self.settings | {"seconds": round(time.monotonic() - self._began, 1)},
            "processes": self.process,
            "warnings": list(dict.fromkeys([*self.warned, *_unsteady(self.ladders)])),
            "ladders": [asdict(ladder) for ladder in self.ladders],
            "unfinished": asdict(self.begun) if self.begun else None,
            "sampling": [asdict(times) for times in self.sampled],
        }
        write_text(self.out, json.dumps(report, indent=1) + "\n")


def _is_of(made: Ladder | Begun, problem: Problem) -> bool:
    return (made.nets, made.work, made.batch) == (problem.nets.name, problem.work, problem.batch)


def _identity(form: str, machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What two processes must share for their figures to stand in one file."""
    # Ratios on a GPU may come from several machines of a kind; on a CPU the machine is the device.
    parts = ("device", "cpu", "cores", "threads") if machine["device"] == "cpu" else ("device",)
    flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items() if name not in FREE}
    return {"format": form} | {part: machine[part] for part in parts} | machine["packages"] | flags


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--library-only", action="store_true", help="no rungs by hand: the figures that the aims ask")
    parser.add_argument("--no-sampling", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny batches, one round: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file; default results/throughput-<device>.json")
    parser.add_argument("--resume", action="store_true", help="go on with the JSON file of a killed run, if any")
    return parser


def _arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
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
        return Effort(args.rounds or 1, 0.0, compile=False, by_hand=not args.library_only)
    long = _long_steps(problem)
    # Compiling a network for training takes a CPU about as long as the rest of its ladder; once a pair is enough.
    compiles = not args.no_compile and (problem.device.type == "cuda" or problem.work == "distil")
    return Effort(args.rounds or (2 if long else 5), 0.0 if long else 0.4, compiles, by_hand=not args.library_only)


def _long_steps(problem: Problem) -> bool:
    return problem.device.type == "cpu" and problem.nets.name == "cifar"


def _ladder(problem: Problem, bench: Bench, args: argparse.Namespace, report: Report) -> None:
    """Measures what the report lacks of a ladder."""
    if report.has_ladder(problem):
        return
    title = "distillation" if problem.work == "distil" else "teacher training"
    print(f"\n{problem.nets.name} nets, {title} step, batch {problem.batch}: ratio over the straightforward loop")
    begun = report.begun_on(problem)
    if begun:
        print(f"  the file holds {len(begun.rungs)} rungs, the last is {begun.rungs[-1].name!r}", flush=True)
    together, effort = _long_steps(problem), _effort(problem, args)
    try:
        ladder = climb(problem, bench, effort, host_together=together, begun=begun, keep=report.keep, say=_say)
    except torch.OutOfMemoryError:  # of a rung it is told there; here the straightforward loop itself does not fit
        report.warned.append(
            f"{problem.nets.name} {problem.work} batch {problem.batch}: not measured, no memory for it"
        )
        print(f"  {report.warned[-1]}", flush=True)
        return
    report.add(ladder)
    print(_baseline_line(ladder), flush=True)
    if ladder.aim is not None and ladder.library.ratio is not None and not args.quick:
        verdict = "reached" if ladder.library.ratio.median >= ladder.aim else "not reached"
        print(f"  aim {ladder.aim:g}x: {verdict}")


def _say(result: Result) -> None:
    print(line(result), flush=True)


def line(result: Result) -> str:
    """A rung as the table shows it: memory and utilisation only where they are known."""
    if result.ratio is None:
        return f"  {result.name:32s} skipped: {result.skipped}"[:WIDTH]
    mark = "optional" if result.optional else "kept" if result.kept else "" if not result.switches else "dropped"
    figures = _figures(result.ratio, result.images_per_s, result.peak_memory_mb, result.utilisation, result.dtype)
    return f"  {result.name:32s} {figures}  {mark}".rstrip()


def _baseline_line(ladder: Ladder) -> str:
    images = ladder.batch / ladder.baseline_step_s
    memory, utilisation = ladder.baseline_peak_memory_mb, ladder.baseline_utilisation
    figures = _figures(Spread(1.0, 1.0, 1.0), images, memory, utilisation, "fp32")
    return f"  {'straightforward loop':32s} {figures}".rstrip()


def _figures(
    ratio: Spread, images: float | None, memory: float | None, utilisation: float | None, dtype: str | None
) -> str:
    parts = [f"{ratio.median:5.2f}x  [{ratio.low:.2f}, {ratio.high:.2f}]", f"{images or 0:8.1f} images/s"]
    if memory is not None:
        parts.append(f"{memory:7.0f} MB")
    if utilisation is not None:
        parts.append(f"{utilisation:6.1%} of {dtype}")
    return "  ".join(parts)


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


def _unsteady(ladders: list[Ladder]) -> Iterator[str]:
    for ladder in ladders:
        for result in (*ladder.rungs, ladder.library):
            spread = result.ratio
            if spread and (spread.high - spread.low) / spread.median > UNSTEADY:
                where = f"{ladder.nets} {ladder.work} batch {ladder.batch}, {result.name}"
                yield f"{where}: ratios spread from {spread.low:.2f} to {spread.high:.2f}"


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    plain = {key: value for key, value in vars(args).items() if key not in ("out", "nets", "resume")}
    return plain | {"nets": [nets.name for nets in args.nets]}


if __name__ == "__main__":
    raise SystemExit(main())
