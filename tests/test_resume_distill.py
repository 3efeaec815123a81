"""Whole jobs are exact too: ``distill`` and ``arena`` killed in any of their stages, and shared by two processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY

from diffstill.cli import main
from diffstill.engine.log import read_log

TEACHER = [
    "training.images: 384", "training.batch_size: 16", "training.warmup_images: 0", "training.log_every: 1",
    "training.checkpoint_every: 80", "network.block_out_channels: [8, 16]", "network.norm_num_groups: 4",
]  # fmt: skip
OVERRIDES = [
    "student.block_out_channels=[8, 8]", "student.norm_num_groups=4", "data.limit=100",
    "training.images=640", "training.batch_size=16", "training.warmup_images=0", "training.log_every=1",
    "training.checkpoint_every=80", "evaluation.samples=20", "evaluation.pairs=20", "evaluation.steps=2",
    "evaluation.guidance=[1, 2]", "--quiet",
]  # fmt: skip
PLAIN = ["distill", "digits-dash", f"teacher.overrides={{{', '.join(TEACHER)}}}", *OVERRIDES]
DROPOUT = f"teacher.overrides={{{', '.join([*TEACHER, 'network.dropout: 0.1'])}}}"
DISTILL = ["distill", "digits-dash", DROPOUT, *OVERRIDES, "student.dropout=0.1"]
ARENA = [
    "arena", "digits-arena", "--methods", "dash,scratch,conditional", "--seeds", "2", DROPOUT, *OVERRIDES,
    "student.dropout=0.1", "arena.equal_seconds=false", "training.images=320",
]  # fmt: skip
CLOCK = {"created", "seconds", "images_per_s", "latency", "environment"}
"""Keys of receipt.json and arena.json that tell of the clock or the machine."""
Moment = Callable[[float], bool]
"""Whether a job that was started at that time has come to where it is to be killed."""


def start(command: Sequence[str], errors: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """``diffstill COMMAND`` as it is typed, with what it prints in ``errors``."""
    with errors.open("ab") as file:
        line = [sys.executable, *launcher, "-m", "diffstill", *command]
        return subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(condition: Callable[[], bool], child: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    """Waits for a moment in the life of ``child``; fails where it ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "the job ended before the moment came"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def kill(child: subprocess.Popen[bytes]) -> None:
    """kill -9 of the child and of all that it started, at once."""
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for process in family:
        process.kill()
    assert child.wait() == -signal.SIGKILL
    psutil.wait_procs(family, timeout=60)


def saved(stage: Path) -> int:
    """Images at the newest checkpoint of a stage, 0 where there is none."""
    folder = stage / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def records(stage: Path, upto: float = float("inf")) -> list[dict[str, Any]]:
    log = stage / "log.jsonl"
    return [r for r in read_log(log) if r["images"] <= upto] if log.exists() else []


def losses(stage: Path) -> list[tuple[int, str, float]]:
    return [(r["images"], r["arm"], r["loss"]) for r in records(stage) if "loss" in r]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


def curriculum(model: Path) -> torch.Tensor:
    return load_file(model / "curriculum.safetensors")["logits"]


def document(path: Path) -> Any:
    """A result file without what the clock and the machine say in it."""
    return lasting(json.loads(path.read_text(encoding="utf-8")))


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if key not in CLOCK}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


def assert_same_weights(run: Path, whole: Path) -> None:
    for model in ("teacher", "model"):
        a, b = weights(run / model), weights(whole / model)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
        assert torch.equal(curriculum(run / model), curriculum(whole / model))


def assert_same_logs(run: Path, whole: Path, *stages: str) -> None:
    for stage in stages:
        assert losses(run / stage) == losses(whole / stage) != []


def made_since(began: float, path: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= began


def press_on(command: Sequence[str], stages: Sequence[Path], errors: Path, moment: Moment | None = None) -> None:
    """Types the command again: killed shortly after the moment, or left to its end. What was saved is not redone."""
    # The log's rates come from the clock: a record that was made again would not be the same.
    kept = {stage: (saved(stage), records(stage, saved(stage))) for stage in stages}
    began = time.time()
    child = start(command, errors)
    if moment is None:
        assert child.wait() == 0, errors.read_text()[-2000:]
    else:
        until(lambda: moment(began), child)
        time.sleep(random.uniform(0, 0.05))
        kill(child)
    for stage, (images, before) in kept.items():
        assert records(stage, images) == before


def test_a_signal_in_the_students_training_saves_and_the_next_run_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    # Logged and probed at every step, which changes no weight, so that there is a moment to catch.
    run, errors = tmp_path / "run", tmp_path / "err"
    command = ["distill", "digits-dash", *TINY, "training.log_every=1", "training.probe_every=32", "--quiet"]
    command += ["--out", str(run)]
    child = start(command, errors)
    until(lambda: bool(records(run)), child)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 143
    told = errors.read_text()
    assert told.count("\n") == 1
    assert "run the same command to go on" in told
    assert 0 < saved(run) < 256
    before = {stage: records(stage) for stage in (run / "stages" / "teacher", run)}
    assert main(command) == 0
    assert_same_weights(run, tiny_run)
    assert losses(run / "stages" / "teacher") == losses(tiny_run / "stages" / "teacher")
    for stage, kept in before.items():
        assert records(stage)[: len(kept)] == kept, "what had been saved was done again"
    assert document(run / "receipt.json")["models"] == document(tiny_run / "receipt.json")["models"]


@pytest.mark.slow
def test_a_distillation_killed_in_every_stage_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*DISTILL, "--out", str(whole)]) == 0
    teacher = run / "stages" / "teacher"
    moments: list[Moment] = [
        lambda began: len(records(teacher)) > 2,
        lambda began: saved(teacher) >= 160,
        lambda began: (run / "teacher").exists() or (run / ".teacher.writing").exists(),
        lambda began: len(records(run)) > 2,
        lambda began: saved(run) >= 160,
        # A checkpoint of two arms that is half written, if one is caught.
        lambda began: saved(run) >= 320 and (bool(list((run / "checkpoints").glob(".w*"))) or saved(run) >= 560),
        lambda began: (run / "model").exists() or (run / ".model.writing").exists(),
        lambda began: made_since(began, run / "model"),
        lambda began: made_since(began, run / "pictures" / "student-grid.png"),
    ]
    command = [*DISTILL, "--out", str(run)]
    for moment in moments:
        press_on(command, [teacher, run], tmp_path / "err", moment)
    assert not (run / "receipt.json").exists()
    press_on(command, [teacher, run], tmp_path / "err")
    assert_same_weights(run, whole)
    assert_same_logs(run, whole, "stages/teacher", ".")
    assert document(run / "receipt.json") == document(whole / "receipt.json")


@pytest.mark.slow
def test_an_arena_killed_in_every_stage_ends_in_the_same_results(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*ARENA, "--out", str(whole)]) == 0
    measured = run / "evaluations"
    moments: list[Moment] = [
        lambda began: saved(run / "stages" / "teacher") >= 160,
        lambda began: saved(run / "seed-0") >= 160,
        lambda began: (measured / "seed-0-scratch.json").exists(),
        lambda began: saved(run / "seed-1") >= 80,
        lambda began: (measured / "seed-1-dash.json").exists(),
    ]
    command = [*ARENA, "--out", str(run)]
    stages = [run / "stages" / "teacher", run / "seed-0", run / "seed-1"]
    for moment in moments:
        press_on(command, stages, tmp_path / "err", moment)
    before = {path: path.stat().st_mtime_ns for path in measured.iterdir()}
    assert {"seed-0-dash.json", "seed-0-conditional.json", "seed-1-dash.json"} <= {path.name for path in before}
    assert not (run / "arena.json").exists()
    press_on(command, stages, tmp_path / "err")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished evaluation was made again"
    assert document(run / "arena.json") == document(whole / "arena.json")
    assert_same_logs(run, whole, "stages/teacher", "seed-0", "seed-1")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Distance of all weights together, as a share of their norm."""
    assert a.keys() == b.keys()
    distance = sum(float((a[key] - b[key]).square().sum()) for key in a)
    return (distance / sum(float(value.square().sum()) for value in b.values())) ** 0.5


def assert_close(run: Path, whole: Path) -> None:
    """Equal to float tolerance: what is logged, and what is trained."""
    for stage in ("stages/teacher", "."):
        a, b = losses(run / stage), losses(whole / stage)
        assert [where for *where, _ in a] == [where for *where, _ in b] != []
        assert [loss for *_, loss in a] == pytest.approx([loss for *_, loss in b], rel=1e-4)
    # Adam turns rounding into whole steps where a gradient is nearly zero, so single weights may differ more.
    for model in ("teacher", "model"):
        assert apart(weights(run / model), weights(whole / model)) < 0.01
        assert apart({"logits": curriculum(run / model)}, {"logits": curriculum(whole / model)}) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "method"),
    [
        ("curriculum", ["method.curriculum=learn"]),
        ("projector", ["method={name: fitnets, scale: 2}", "beside={}"]),
    ],
)
def test_two_processes_distil_as_one_does_and_resume_into_one(tmp_path: Path, role: str, method: list[str]) -> None:
    """With a second trained role beside the student, in a DistributedDataParallel of its own."""
    command = [*PLAIN, *method, "training.images=320", "training.micro_batch=4", "training.teacher_precision=fp32"]
    one, two, cut = tmp_path / "one", tmp_path / "two", tmp_path / "cut"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert main([*command, "--out", str(one)]) == 0
    child = start([*command, "--out", str(two)], tmp_path / "err", torchrun)
    assert child.wait() == 0, (tmp_path / "err").read_text()[-2000:]
    assert_close(two, one)
    child = start([*command, "--out", str(cut)], tmp_path / "err", torchrun)
    until(lambda: saved(cut) >= 160, child)
    kill(child)
    assert saved(cut) < 320
    checkpoint = load_file(cut / "checkpoints" / f"{saved(cut):012d}" / "digits-dash.safetensors")
    assert any(key.startswith(f"role/{role}/") for key in checkpoint)
    begun = records(cut, saved(cut))
    assert main([*command, "--out", str(cut)]) == 0
    assert records(cut)[: len(begun)] == begun, "what two processes had done was done again"
    assert_close(cut, one)
    trained = json.loads((cut / "receipt.json").read_text(encoding="utf-8"))["training"]
    assert [stage["images_seen"] for stage in trained] == [384, 320]
