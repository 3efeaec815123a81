"""What happens when things go wrong in a real run: signals, kill -9, NaN, damaged checkpoints, several processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Nursery, until
from safetensors.torch import load_file

from diffstill.cli import main
from diffstill.engine.log import read_log

TRAIN = [
    "train", "digits-teacher", "network.block_out_channels=[8, 8]", "network.norm_num_groups=4",
    "network.dropout=0.1", "data.limit=100",
    "training.batch_size=16", "training.warmup_images=0", "training.log_every=1", "training.images=640",
    "training.checkpoint_every=16", "evaluation.samples=20", "evaluation.pairs=20", "evaluation.steps=2",
    "evaluation.guidance=[1]", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["images"], r["loss"]) for r in read_log(run / "log.jsonl") if "loss" in r]


def checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that all others must equal."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TRAIN, "--out", str(run)]) == 0
    return run


def assert_same(run: Path, whole: Path) -> None:
    """Bit-identical weights, and a log that reads as one run."""
    a, b = weights(run), weights(whole)
    assert a.keys() == b.keys()
    assert all(bool((a[key] == b[key]).all()) for key in a)
    assert losses(run) == losses(whole)
    assert [images for images, _ in losses(run)] == list(range(16, 16 * len(losses(whole)) + 1, 16))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_next_run_goes_on(
    whole: Path, nursery: Nursery, tmp_path: Path, signum: int, code: int
) -> None:
    run = tmp_path / "run"
    command = [*TRAIN, "training.checkpoint_every=null"]
    child = nursery.start([*command, "--out", str(run)], tmp_path / "err")
    until(lambda: (run / "log.jsonl").exists())
    os.kill(child, signum)
    assert nursery.wait() == code
    told = (tmp_path / "err").read_text()
    assert told.count("\n") == 1
    assert "run the same command to go on" in told
    assert len(checkpoints(run)) == 1
    assert int(checkpoints(run)[0].name) < 640
    assert main([*command, "--out", str(run)]) == 0
    assert_same(run, whole)


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bits(nursery: Nursery, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    longer = [*TRAIN, f"training.images={16 * 640}"]
    assert main([*longer, "--out", str(whole)]) == 0
    command = [*longer, "--out", str(run)]
    chance = random.Random(0)
    kills, torn = 0, 0
    while kills < 20:
        child = nursery.start(command, tmp_path / "err")
        if kills % 2:
            # Every other kill waits for the moment in which a checkpoint is being written.
            end = time.monotonic() + 60
            while not list((run / "checkpoints").glob(".writing-*")) and time.monotonic() < end:
                assert not (run / "receipt.json").exists(), "the run ended before twenty kills: lengthen it"
        else:
            time.sleep(chance.uniform(0.05, 1.2))
        os.kill(child, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        kills += 1
        torn += bool(list((run / "checkpoints").glob(".writing-*")))
    assert torn >= 3, "too few kills fell into the writing of a checkpoint to prove anything"
    assert main(command) == 0
    assert_same(run, whole)


def test_a_damaged_checkpoint_is_passed_over_and_said(
    whole: Path, nursery: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    child = nursery.start([*TRAIN, "--out", str(run)], tmp_path / "err")
    until(lambda: len(checkpoints(run)) == 2)
    os.kill(child, signal.SIGKILL)
    nursery.wait()
    newest = next(checkpoints(run)[-1].glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main([a for a in TRAIN if a != "--quiet"] + ["--out", str(run)]) == 0
    assert "is damaged and was passed over" in capsys.readouterr().err
    assert_same(run, whole)


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    wild = ["training.lr=1e18", "training.warmup_images=160", "training.grad_clip=null", "--out", str(run)]
    assert main([*TRAIN, *wild]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "NaN or infinite" in told
    assert "last good checkpoint" in told
    for path in checkpoints(run):
        for name, tensor in load_file(next(path.glob("*.safetensors"))).items():
            if name.startswith("sum/loss"):
                assert bool(tensor.isfinite().all())


def torchrun(processes: int, command: list[str], port: int) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, "-m", "diffstill", *command], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_into_one(tmp_path: Path) -> None:
    # Network dropout is drawn process by process, so the comparison is made without it.
    command = [*TRAIN, "network.dropout=0", "training.images=320", "training.checkpoint_every=160"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*command, "--out", str(one)]) == 0
    done = torchrun(2, [*command, "--out", str(two)], 29511)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = dict(losses(one)), dict(losses(two))
    assert a.keys() == b.keys()
    assert all(abs(a[k] - b[k]) < 1e-4 * max(1.0, abs(a[k])) for k in a), (a, b)
    # Adam turns rounding into whole steps where a gradient is nearly zero, so single weights may differ more.
    mine, theirs = weights(one), weights(two)
    apart = sum(float((mine[key] - theirs[key]).square().sum()) for key in mine)
    assert apart < 0.01**2 * sum(float(value.square().sum()) for value in mine.values())
    # What two processes began, one ends: cut the run back to its middle checkpoint.
    shutil.rmtree(checkpoints(two)[-1])
    assert int(checkpoints(two)[-1].name) == 160
    for made in ("receipt.json", "report.html"):
        (two / made).unlink()
    assert main([*command, "--out", str(two)]) == 0
    again = dict(losses(two))
    assert all(abs(a[k] - again[k]) < 1e-4 * max(1.0, abs(a[k])) for k in a)
    assert json.loads((two / "receipt.json").read_text())["training"][0]["images_seen"] == 320
