"""The training loop: divergence, several arms, exact resume, signals, alarm, log, devices and the compiler."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import DASH, assert_same, losses, names, one_line
from torch import nn

from diffstill.checks.bench import BATCH, Bench, tiny_denoiser
from diffstill.engine.arm import Arm
from diffstill.engine.log import RunLog, read_log
from diffstill.engine.loop import Progress, Trainer
from diffstill.engine.settings import TrainSettings
from diffstill.engine.state import load_latest
from diffstill.errors import InputError, Interrupted, RunFailed
from diffstill.evaluation.guidance_fidelity import FidelityProbe
from diffstill.methods import METHODS, Batch, Losses, TeacherOutputs
from diffstill.methods.dash import Dash

# Divergence


class Diverging(Dash):
    """A real method that breaks when ``after`` images have been seen: in its loss, or in its gradient alone."""

    name = "diverging"
    after = 24
    gradient_alone = False

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        found = super().loss(batch, teacher)
        if batch.images_seen < self.after:
            return found
        if self.gradient_alone:
            # sqrt at 0 has an infinite slope, and 0 times infinity is NaN: the value is untouched.
            return Losses(found.total + (0 * found.total).sqrt(), found.parts)
        return Losses(found.total * float("nan"), found.parts)


class DivergingGradient(Diverging):
    name = "diverging-gradient"
    gradient_alone = True


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_a_loss_that_is_nan_ends_the_run_and_names_the_last_good_checkpoint(tmp_path: Path, log_every: int) -> None:
    trainer = Bench(Diverging).trainer(tmp_path, steps=8, checkpoint_every=8, log_every=log_every)
    with pytest.raises(RunFailed) as caught:
        trainer.run()
    told = one_line(caught.value)
    assert "NaN or infinite" in told
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / '000000000024'}" in told
    assert "lower training.lr" in told
    found, _ = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.images_seen == 24
    assert all(bool(value.isfinite().all()) for value in found.tensors["arm"].values())
    assert [r["event"] for r in read_log(tmp_path / "log.jsonl") if "event" in r][-1] == "diverged"


def test_before_any_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no checkpoint had been saved"):
        Bench(Diverging).trainer(tmp_path, steps=8).run()
    assert load_latest(tmp_path / "checkpoints") == (None, [])


def test_weights_that_are_nan_are_never_saved_though_the_loss_was_fine(tmp_path: Path) -> None:
    """The update of step 4 makes the weights NaN; its loss is finite, and so would be the log."""
    trainer = Bench(DivergingGradient).trainer(tmp_path, steps=8, checkpoint_every=8, log_every=100)
    with pytest.raises(RunFailed, match="000000000024"):
        trainer.run()
    found, _ = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert all(bool(value.isfinite().all()) for value in found.tensors["arm"].values())


# Several arms


def two_arms(folder: Path, other: type[Dash] = Dash, die_at: int | None = None, **settings: Any) -> Trainer:
    """``arm``, and ``short``, which stops after half of the images."""
    bench = Bench(other)
    chosen = TrainSettings(
        images=8 * BATCH, batch_size=BATCH, lr=1e-3, compile=False, **{"log_every": 1, **settings}
    )  # fmt: skip

    def told(progress: Progress) -> None:
        if die_at is not None and progress.images_seen >= die_at * BATCH:
            raise KeyboardInterrupt

    arms = [
        Arm("arm", DASH.method(0.1), chosen, DASH.runtime),
        Arm("short", bench.method(0.1), chosen, DASH.runtime, images=4 * BATCH),
    ]
    return Trainer(
        arms, DASH.stream(), chosen, DASH.runtime, folder, teacher=DASH.teacher(), on_progress=told, timed=True
    )


@pytest.mark.parametrize(
    ("spent", "told"),
    [
        ([10.0], 10.0),
        ([10.0, 2.0], 4.0),  # the first allocates and tunes: it counts as the second
        ([10.0, 2.0, 3.0], 7.0),
        ([1.0, 2.0, 3.0], 6.0),
    ],
)
def test_the_first_step_of_a_process_counts_as_the_second(
    spent: list[float], told: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = two_arms(tmp_path)
    # Of a step: the teacher, the first arm, the second arm; each from one tick to the next.
    clock = accumulate(chain.from_iterable((0.0, 0.0, 0.0, first, 0.0, 1.0) for first in spent))
    monkeypatch.setattr(trainer, "_tick", lambda: next(clock))
    for _ in spent:
        trainer.step()
    assert [arm.seconds for arm in trainer.arms] == [told, len(spent)]


@pytest.mark.parametrize("killed_at", [3, 6])
def test_a_run_of_two_arms_resumes_bit_exactly(tmp_path: Path, killed_at: int) -> None:
    every = {"checkpoint_every": 16, "log_every": 3}  # half-finished averages have to survive, too
    whole = two_arms(tmp_path / "whole", **every)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        two_arms(tmp_path / "cut", die_at=killed_at, **every).run()
    left, _ = load_latest(tmp_path / "cut" / "checkpoints")
    assert left is not None
    assert left.images_seen == 16 * ((killed_at - 1) // 2)
    again = two_arms(tmp_path / "cut", **every)
    again.run()
    for a, b in zip(whole.arms, again.arms, strict=True):
        assert_same(a.tensors(), b.tensors())
        assert losses(tmp_path / "whole", a.name) == losses(tmp_path / "cut", a.name)
        assert b.seconds > 0
    assert [images for images, _ in losses(tmp_path / "cut", "short")] == [24, 48]
    assert [images for images, _ in losses(tmp_path / "cut", "arm")] == [24, 48, 64]


def test_an_arm_trains_alike_alone_and_in_company(tmp_path: Path) -> None:
    together = two_arms(tmp_path / "two")
    together.run()
    chosen = together.settings
    alone = Trainer(
        [Arm("arm", DASH.method(0.1), chosen, DASH.runtime)],
        DASH.stream(), chosen, DASH.runtime, tmp_path / "one", teacher=DASH.teacher(),
    )  # fmt: skip
    alone.run()
    assert_same(alone.arms[0].tensors(), together.arms[0].tensors())


@pytest.mark.parametrize("log_every", [1, 100])
def test_one_arm_that_diverges_does_not_stop_the_other(tmp_path: Path, log_every: int) -> None:
    class Early(Diverging):
        after = 8

    trainer = two_arms(tmp_path, Early, checkpoint_every=16, log_every=log_every)
    trainer.run()
    good, bad = trainer.arms
    assert good.failed is None
    assert bad.failed is not None
    assert trainer.warnings == [bad.failed]
    assert "short: the loss or a weight became NaN" in bad.failed
    events = [r for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "diverged"]
    assert [r["arm"] for r in events] == ["short"]
    alone = two_arms(tmp_path / "alone")
    alone.run()
    for name, value in alone.arms[0].tensors().items():
        if not name.startswith("sum/"):
            assert torch.equal(value, good.tensors()[name]), name


def test_a_checkpoint_of_other_networks_is_refused_in_one_line(tmp_path: Path) -> None:
    DASH.trainer(tmp_path).run()
    other = Bench(Dash, None, student=tiny_denoiser((8, 12), 0)).trainer(tmp_path, steps=12)
    with pytest.raises(InputError, match="run: 'arm' has a checkpoint of other networks") as caught:
        other.run()
    assert "--fresh" in one_line(caught.value)


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    first = DASH.trainer(tmp_path)
    first.run()
    log = (tmp_path / "log.jsonl").read_bytes()
    again = DASH.trainer(tmp_path)
    again.run()
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert_same(again.arms[0].tensors(), first.arms[0].tensors())


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_saves_and_resumes_exactly(tmp_path: Path, signum: int, code: int) -> None:
    whole = DASH.trainer(tmp_path / "whole", dropout=0.1)
    whole.run()
    before = signal.getsignal(signum)
    cut = DASH.trainer(tmp_path / "cut", dropout=0.1)

    def told(progress: Progress) -> None:
        if progress.images_seen == 24:
            os.kill(os.getpid(), signum)

    cut.on_progress = told
    with pytest.raises(Interrupted, match="stopped by a signal at 24 images; saved") as caught:
        cut.run()
    assert caught.value.exit_code == code
    one_line(caught.value)
    assert signal.getsignal(signum) is before
    assert names(tmp_path / "cut" / "checkpoints") == ["000000000024"]
    again = DASH.trainer(tmp_path / "cut", dropout=0.1)
    again.run()
    assert_same(again.arms[0].tensors(), whole.arms[0].tensors())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    trainer = DASH.trainer(tmp_path)

    def told(progress: Progress) -> None:
        if progress.images_seen == 16:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer.on_progress = told
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert load_latest(tmp_path / "checkpoints") == (None, [])


def test_a_signal_in_the_last_step_ends_what_comes_after_the_training(tmp_path: Path) -> None:
    trainer = DASH.trainer(tmp_path)
    trainer.on_progress = lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.images_seen == 48 else None
    with pytest.raises(Interrupted, match="stopped by a signal at 48 images; saved"):
        trainer.run()
    again = DASH.trainer(tmp_path)
    again.run()
    assert again.images_seen == 48
    saved_at_last = DASH.trainer(tmp_path / "late")
    save = saved_at_last.save
    saved_at_last.save = lambda: (os.kill(os.getpid(), signal.SIGTERM), save())[1]  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped by a signal at 48 images; saved"):
        saved_at_last.run()


# The collapse alarm


def collapsed(folder: Path, gap: float, probe: Any = None, **settings: Any) -> Trainer:
    """A student whose labels all read the same row (``gap`` 0), hardly trained; watched by the real probe."""
    trainer = DASH.trainer(folder, probe_every=8, lr=1e-9, lr_min=0, weight_decay=0, **settings)
    arm = trainer.arms[0]
    teacher = arm.method.teacher
    assert teacher is not None
    if probe is None:
        for network in (arm.method.student.network, arm.ema["student"].network):
            rows = network.class_embedding.weight
            with torch.no_grad():
                rows.copy_(rows[:1] + gap * (rows - rows[:1]))
    trainer.probe = probe or FidelityProbe(teacher, DASH.data, pairs=20)
    return trainer


def test_the_alarm_fires_once_in_the_second_half_when_the_gap_is_gone(tmp_path: Path) -> None:
    trainer = collapsed(tmp_path, 0.0)
    trainer.run()
    probes = [r for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "probe"]
    assert [r["images"] for r in probes] == [8, 16, 24, 32, 40, 48]
    assert all(r["ratio"] < 0.01 for r in probes)
    (line,) = trainer.warnings
    assert line == "arm: guidance has collapsed (gap ratio 0.00 < 0.5 at 24 images)"
    alarms = [r["images"] for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "collapse_alarm"]
    assert alarms == [24]
    assert trainer.arms[0].alarm
    again = DASH.trainer(tmp_path, lr=1e-9, lr_min=0)
    again.run()
    assert again.arms[0].alarm
    assert again.warnings == trainer.warnings


def test_no_alarm_while_the_gap_is_alive(tmp_path: Path) -> None:
    trainer = collapsed(tmp_path, 20.0)
    trainer.run()
    probes = [r for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "probe"]
    assert all(r["ratio"] > 0.5 for r in probes)
    assert trainer.warnings == []
    assert not trainer.arms[0].alarm


def test_students_without_a_dial_are_not_probed(tmp_path: Path) -> None:
    def never(student: Any) -> Mapping[str, float]:
        raise AssertionError("probed")

    trainer = Bench(METHODS["single-head"]).trainer(tmp_path, steps=2, probe_every=8)
    trainer.probe = never
    trainer.run()


# The log


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for images in (8, 16, 24):
        log.write(images=images, loss=1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"images": 32, "lo')
    assert [r["images"] for r in read_log(tmp_path / "log.jsonl")] == [8, 16, 24]
    log.rewind(16)
    assert [r["images"] for r in read_log(tmp_path / "log.jsonl")] == [8, 16]
    assert names(tmp_path) == ["log.jsonl"]
    log.write(images=24, loss=float(2))
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3
    RunLog(None).write(images=1)
    RunLog(None).rewind(0)


def test_means_are_over_the_steps_since_the_last_record(tmp_path: Path) -> None:
    every, third = DASH.trainer(tmp_path / "1"), DASH.trainer(tmp_path / "3", log_every=3)
    every.run()
    third.run()
    one = [value for _, value in losses(tmp_path / "1")]
    three = losses(tmp_path / "3")
    assert [images for images, _ in three] == [24, 48]
    assert [value for _, value in three] == pytest.approx([sum(one[:3]) / 3, sum(one[3:]) / 3], rel=1e-6)


# Devices and the compiler


class Moved(nn.Module):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Any] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(args[0])
        return super().to(*args, **kwargs)


def test_what_a_method_holds_frozen_goes_to_the_device(tmp_path: Path) -> None:
    method = DASH.method()
    method.frozen["helper"] = helper = Moved()
    Arm("arm", method, TrainSettings(images=8, batch_size=8), DASH.runtime)
    assert helper.sent == [DASH.runtime.device]
    assert set(method.frozen) == {"curriculum", "helper"}
