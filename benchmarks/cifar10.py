"""DASH's headline on CIFAR-10, on whatever GPU there is and in whatever time: published networks, a stated budget.

    python benchmarks/cifar10.py --data npz:cifar10 --extractor ResNet56.pt        # again, until it says "all done"

One call works for at most ``--minutes`` and then stops; the same call goes on where the last one ended (exit code 75
until all is done). The stages: ``plan`` (how many images fit the minutes), ``arena`` (teacher, students in one pass,
10,000 images a model and setting, fidelity, latency), ``throughput`` (the ladder); ``results`` (one JSON, pictures) are
written after the arena and after the ladder.
docs/cifar10.md says where data and extractor come from.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cifar10_results import PAPER_IMAGES, collect, table
from machine import describe

from diffstill.data.sources import DataSplits, load_data
from diffstill.disk import write_text
from diffstill.engine.arm import Arm
from diffstill.engine.loop import Trainer
from diffstill.engine.runtime import Runtime
from diffstill.engine.settings import TrainSettings
from diffstill.engine.stream import BatchStream
from diffstill.errors import DiffstillError, InputError
from diffstill.jobs.build import build_arm
from diffstill.jobs.distill import blank_teacher, teacher_recipe
from diffstill.jobs.train import untrained
from diffstill.methods.base import Method
from diffstill.models.denoiser import Denoiser
from diffstill.recipe import DistillRecipe, load_recipe
from diffstill.report.arena import ArenaResult

RECIPE, LADDER = "dash-cifar10-arena", "throughput.json"
GO_ON = 75
"""Exit code of a call whose time ran out (EX_TEMPFAIL): type it again."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a diffstill command that was stopped and saved."""
GRACE = 60
"""Seconds that a stopped command gets to save itself."""
UNPLANNED = 1_280_000
"""Images of a recipe whose numbers are not known yet: whole batches of any usual size."""
SPARE = 0.9
"""Share of the time that is planned for: evaluation during training, checkpoints and the start are the rest."""
COMPILED = 10.0
"""Minutes of the teacher's training from which compiling it, in each call anew, is taken to earn its own time back."""
SMOKE = (
    "teacher.overrides.network.block_out_channels=[8, 8]",
    "teacher.overrides.network.layers_per_block=1",
    "teacher.overrides.network.norm_num_groups=4",
    "student.block_out_channels=[8, 8]",
    "student.norm_num_groups=4",
    "teacher.overrides.training.batch_size=8",
    "training.batch_size=8",
    "teacher.overrides.training.compile=false",
    "training.compile=false",
    "evaluation.samples=40",
    "evaluation.pairs=20",
    "evaluation.steps=2",
    "evaluation.guidance=[1, 2]",
    "evaluation.latency_batches=[1]",
)
"""Overrides that make everything tiny: does it run at all?"""


@dataclass
class Call:
    """One call of the script: its arguments and how much of its time is left."""

    args: argparse.Namespace
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.args.minutes * 60 - (time.monotonic() - self.began)

    @property
    def runs(self) -> Path:
        return Path(self.args.runs)

    def needs(self, seconds: float, made: Path) -> None:
        """Ends the call where too little of its time is left for a stage that has not made its file yet.

        Raises:
            SystemExit: with ``GO_ON``; never at the beginning of a call, which would be for ever.
        """
        if not made.exists() and self.left < min(seconds, self.args.minutes * 30):
            print("time is out; the same call goes on", flush=True)
            raise SystemExit(GO_ON)

    def command(self, *words: str) -> None:
        """Runs a command until it is done, or stops it when the time is out.

        Raises:
            SystemExit: with ``GO_ON`` where the time ran out, with the command's own code where it failed.
        """
        process = subprocess.Popen([sys.executable, *words])
        try:
            code = process.wait(timeout=max(1.0, self.left - GRACE))
        except subprocess.TimeoutExpired:
            code = STOPPED
        finally:  # whatever ends this call, no child of it goes on
            _end(process)
        if code in (STOPPED, -signal.SIGTERM):
            print("time is out; the same call goes on", flush=True)
            raise SystemExit(GO_ON)
        if code:
            raise SystemExit(code)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stops a command that still runs, and gives it time to save itself."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def throughput(call: Call) -> None:
    """The ladder of teacher training and of the DASH step, finished ladders and rungs kept."""
    out = call.runs / LADDER
    if not (out.exists() and json.loads(out.read_text(encoding="utf-8"))["complete"]):
        quick = ["--quick", "--nets", "digits", "--work", "train", "--no-sampling"] if call.args.smoke else []
        script = str(Path(__file__).with_name("throughput.py"))
        asked = [script, "--nets", "cifar", "--device", call.args.device, "--out", str(out), "--resume", *quick]
        call.command(*asked)


def plan(call: Call) -> dict[str, Any]:
    """How many images of training fit: measured now, on this device, with the very arms; kept for later calls."""
    file, asked = call.runs / "plan.json", _asked(call.args)
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key, value in asked.items() if known["asked"].get(key) != value]
        if differing:
            key = differing[0]
            mend = "use the same arguments, or another --runs"
            raise InputError(key, asked[key], mend, problem=f"is not what {call.runs} was begun with")
        return known
    runtime = Runtime(call.args.device)
    recipe = load_recipe(RECIPE, overrides(call.args, dict.fromkeys(PAPER_IMAGES, UNPLANNED)))
    assert isinstance(recipe, DistillRecipe)
    upstream = teacher_recipe(recipe)
    assert upstream is not None
    data = load_data(recipe.data)
    measured = rates(recipe, data, runtime, call.args.rate_seconds)
    minutes = {"teacher": call.args.teacher_minutes, "student": call.args.student_minutes}
    batch = {"teacher": upstream.training.batch_size, "student": recipe.training.batch_size}
    images = {role: budget(rate, minutes[role], batch[role], PAPER_IMAGES[role]) for role, rate in measured.items()}
    _release(runtime)
    made = {"asked": asked, "images_per_s": measured, "minutes": minutes, "images": images}
    made |= {"machine": describe(runtime.device)}
    write_text(file, json.dumps(made, indent=1, sort_keys=True) + "\n")
    return made


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same in every call."""
    names = ("data", "teacher_minutes", "student_minutes", "samples", "seeds", "smoke", "overrides")
    device = torch.cuda.get_device_name() if _on_gpu(args) else "cpu"
    return {name: getattr(args, name) for name in names} | {"extractor": str(args.extractor), "device": device}


def _on_gpu(args: argparse.Namespace) -> bool:
    return torch.cuda.is_available() and bool(args.device != "cpu")


def budget(rate: float, minutes: float, batch: int, most: int) -> int:
    """Images, in whole batches, that ``minutes`` are enough for at ``rate`` images/s; one batch at least."""
    images = min(rate * minutes * 60 * SPARE, most)
    return max(1, int(images) // batch) * batch


def rates(recipe: DistillRecipe, data: DataSplits, runtime: Runtime, seconds: float) -> dict[str, float]:
    """Images/s of the teacher's training, and of all the arms together in one pass, as the arena runs them."""
    upstream = teacher_recipe(recipe)
    assert upstream is not None
    blank = blank_teacher(recipe, data)
    arms = {name: build_arm(recipe, spec, blank, recipe.seed) for name, spec in recipe.arena.arms.items()}
    eager = recipe.training.model_copy(update={"compile": False})
    return {
        "teacher": _rate({"teacher": untrained(upstream, data)}, upstream.training, None, data, runtime, seconds),
        "student": _rate(arms, eager, blank.denoiser, data, runtime, seconds),
    }


def _release(runtime: Runtime) -> None:
    """Gives the device's memory back: the arena is a process of its own."""
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def _rate(
    methods: dict[str, Method],
    settings: TrainSettings,
    teacher: Denoiser | None,
    data: DataSplits,
    runtime: Runtime,
    seconds: float,
) -> float:
    """Steps for ``seconds`` after the first few (allocation, autotuning, compilation)."""
    schedule = next(iter(methods.values())).schedule
    stream = BatchStream(data.train, schedule, batch_size=settings.batch_size, seed=0, device=runtime.device)
    arms = [Arm(name, method, settings, runtime) for name, method in methods.items()]
    with tempfile.TemporaryDirectory() as folder:
        # Students are timed in the arena, which waits for the device around each arm.
        trainer = Trainer(arms, stream, settings, runtime, Path(folder), teacher=teacher, timed=teacher is not None)
        for _ in range(3):
            trainer.step()
        runtime.synchronize()
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < seconds or steps == 0:
            trainer.step()
            runtime.synchronize()
            steps += 1
        return steps * settings.batch_size / (time.monotonic() - began)


def overrides(args: argparse.Namespace, images: dict[str, int]) -> list[str]:
    """What the recipe is told: the data, the extractor, the budget. Warm-up is a tenth of the training at most."""
    found = [
        f"data.source={args.data}",
        f"evaluation.extractor=torchscript:{args.extractor}",
        f"evaluation.samples={args.samples}",
        f"teacher.overrides.training.images={images['teacher']}",
        f"teacher.overrides.training.warmup_images={min(128_000, images['teacher'] // 10)}",
        # Told, not left to the number of steps: the plan was timed with it, and a shorter training has to be the same.
        f"teacher.overrides.training.compile={str(_on_gpu(args) and args.teacher_minutes >= COMPILED).lower()}",
        f"training.images={images['student']}",
        f"training.warmup_images={min(128_000, images['student'] // 10)}",
    ]
    return [*found, *(SMOKE if args.smoke else ()), *args.overrides]


def arena(call: Call, planned: dict[str, Any]) -> Path:
    """Teacher, students, samples, figures: one command that goes on by itself."""
    out = call.runs / "arena"
    if not (out / "arena.json").exists():
        words = ["-m", "diffstill", "arena", RECIPE, *overrides(call.args, planned["images"])]
        call.command(*words, "--seeds", str(call.args.seeds), "--device", call.args.device, "--out", str(out))
    return out


def results(call: Call, planned: dict[str, Any], arena_dir: Path) -> None:
    """The JSON and the pictures that are committed, with what there is of the ladder; the table on the screen."""
    file = call.runs / LADDER
    ladder = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"complete": False, "ladders": []}
    found = collect(ArenaResult.load(arena_dir), ladder, planned, smoke=call.args.smoke)
    write_text(call.args.out / "cifar10.json", json.dumps(found, indent=1, sort_keys=True) + "\n")
    for picture in sorted((arena_dir / "pictures").glob("*-grid.png")):
        shutil.copy(picture, call.args.out / picture.name)
    print(table(found), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(GO_ON))
    try:
        return _stages(Call(args))
    except DiffstillError as error:
        print(f"cifar10: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)


def _stages(call: Call) -> int:
    call.runs.mkdir(parents=True, exist_ok=True)
    planned = plan(call)
    call.needs(GRACE, call.runs / "arena" / "arena.json")
    made = arena(call, planned)
    results(call, planned, made)  # the models are worth having where the ladder is not waited for
    call.needs(GRACE, call.runs / LADDER)
    throughput(call)
    results(call, planned, made)
    print(f"all done: {call.args.out}; samples for the real FID: {made / 'samples'} (docs/cifar10.md)")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"further overrides of {RECIPE}")
    parser.add_argument("--data", default="hub:uoft-cs/cifar10", help="CIFAR-10: a source as in docs/data.md")
    parser.add_argument("--extractor", type=Path, required=True, help="TorchScript of a CIFAR-10 classifier")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call; the next one goes on")
    parser.add_argument("--teacher-minutes", type=float, default=60.0, help="of the teacher's training, all calls")
    parser.add_argument("--student-minutes", type=float, default=60.0, help="of the students' one pass, all calls")
    parser.add_argument("--samples", type=int, default=10_000, help="images a model and guidance setting")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of the students")
    parser.add_argument("--rate-seconds", type=float, default=10.0, help="of measuring what fits")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--runs", type=Path, help="where everything is worked on; default runs/cifar10")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/cifar10; of a smoke run, under --runs")
    parser.add_argument("--smoke", action="store_true", help="tiny networks and numbers: does it run at all?")
    args = parser.parse_args(argv)
    args.runs = args.runs or Path("runs/cifar10-smoke" if args.smoke else "runs/cifar10")
    args.out = args.out or (args.runs / "results" if args.smoke else Path(__file__).parent / "results" / "cifar10")
    for name in ("minutes", "teacher_minutes", "student_minutes", "rate_seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name):g}: use more than 0")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
