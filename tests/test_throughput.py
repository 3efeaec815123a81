"""The benchmark's straightforward loop does the library's own work, so that its ratios compare like with like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import throughput
import torch
from ladder import (
    Effort,
    Rung,
    unavailable,
)
from problem import DIGITS, Problem, Work
from product import LibraryStep
from step import Draw, PngFiles, Step, Switches
from timing import Stopwatch
from torch import Tensor, nn

from diffstill.engine.runtime import Runtime

CPU = torch.device("cpu")
FAST = Switches(batched=True, foreach_ema=True, fused=True, resident=True, no_sync=True, channels_last=True)


def _library(problem: Problem, folder: Path) -> LibraryStep:
    return LibraryStep(problem, Runtime("cpu"), folder, precision="fp32", teacher_precision="fp32", compile=False)


def _weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("work", ["distil", "train"])
@pytest.mark.parametrize("on", [Switches(), FAST], ids=["straightforward", "fast"])
def test_the_hand_written_step_is_the_librarys(work: Work, on: Switches, tmp_path: Path) -> None:
    """Loss, updated weights and EMA after the first step, float32."""
    problem = Problem(DIGITS, work, 8, CPU)
    library, step = _library(problem, tmp_path), Step(problem, on)
    before = _weights(step.network)
    torch.testing.assert_close(before, _weights(library.arm.method.student.network))

    batch = library.batch()
    drawn = Draw.of(batch)
    truth = library.loss_on(batch)
    assert step.loss_on(batch) == pytest.approx(truth, rel=1e-5)
    step.learn(drawn, step.teach(drawn))
    library()

    mine, theirs = _weights(step.network), _weights(library.arm.method.student.network)
    # Adam's first step is lr times the gradient's sign. Where the gradient is zero but for rounding (the bias of an
    # attention's keys) that sign is noise, so a few entries may differ; all others agree.
    apart = (mine - theirs).abs() > 1e-5
    assert (mine - before).abs().median() > 1e-4
    assert apart.float().mean() < 2e-3
    ema, other = _weights(step.ema), _weights(library.arm.ema["student"].network)
    torch.testing.assert_close(ema[~apart], other[~apart], rtol=0, atol=1e-5)
    assert float((ema - before).norm()) == pytest.approx(float((other - before).norm()), rel=1e-3)
    logged = step.sums if on.no_sync else step.logged
    for name in set(logged) & {"loss", "imitation", "null", "anchor", "grad_norm"}:
        assert float(logged[name]) == pytest.approx(float(library.arm.sums[name]), rel=1e-4), name


def test_png_loader_gives_the_pixels() -> None:
    data = Problem(DIGITS, "distil", 4, CPU, images=6).data
    decoded, label = PngFiles(data)[5]
    torch.testing.assert_close(decoded, data.images[5].float() / 127.5 - 1)
    assert label == int(data.labels[5])


def test_reuse_asks_the_teacher_once_in_r_updates() -> None:
    step = Step(Problem(DIGITS, "distil", 2, CPU, images=8), Switches(reuse=2))
    seen = []
    for _ in range(4):
        step()
        seen.append(step.taught)
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[1] is not seen[2]


class _Work:
    """Sleeps by a scripted clock: every call takes the next of ``times``."""

    def __init__(self, clock: list[float], times: list[float]) -> None:
        self.clock, self.times = clock, times

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self) -> None:
        self.clock[0] += self.times.pop(0)


def test_ratios_take_the_mean_of_both_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    watch = Stopwatch(CPU)
    monkeypatch.setattr(watch, "_now", lambda: clock[0])
    baseline, rung = _Work(clock, [4.0, 6.0, 10.0]), _Work(clock, [99.0, 2.0, 4.0])
    rounds = watch.against(baseline, rung, rounds=2, count=1, warm=1)
    assert [(r.baseline_s, r.seconds, r.ratio) for r in rounds] == [(5.0, 2.0, 2.5), (8.0, 4.0, 2.0)]


def test_what_a_machine_lacks_is_skipped_with_its_reason() -> None:
    bare, effort = torch.device("mps"), Effort(1, 0.0)
    assert unavailable(Rung("a", {"bf16": True}), bare, effort) == "the device has no native bf16"
    assert unavailable(Rung("b", {"teacher_compile": "default"}), bare, effort) == "no C++ compiler"
    assert unavailable(Rung("c", {"compile": "default"}), CPU, Effort(1, 0.0, compile=False)) == "switched off"
    assert unavailable(Rung("d", {"fused": True}), bare, effort) is None


@pytest.mark.parametrize("argv", [["--nets", "mnist"], ["--rounds", "0"], ["--digits-batch", "0"], ["--work", "x"]])
def test_bad_arguments_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        throughput.main(argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_quick_run_writes_the_whole_report(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    assert throughput.main(["--nets", "digits", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["format"] == throughput.FORMAT
    assert report["complete"] is True
    assert {"cpu", "cores", "threads", "bf16_native", "packages"} <= set(report["machine"])
    assert [(ladder["nets"], ladder["work"]) for ladder in report["ladders"]] == [
        ("digits", "distil"),
        ("digits", "train"),
    ]
    for ladder in report["ladders"]:
        for rung in (*ladder["rungs"], ladder["library"]):
            assert rung["skipped"] or (rung["ratio"]["median"] > 0 and rung["rounds"]), rung["name"]
            exact = rung["switches"] and not (rung["switches"]["bf16"] or rung["switches"]["teacher_bf16"])
            assert rung["skipped"] or not exact or rung["loss_difference"] < 1e-4, rung["name"]
        assert all(not rung["kept"] for rung in ladder["rungs"] if rung["optional"] or rung["skipped"])
    assert report["sampling"][0]["scaled"] is True
