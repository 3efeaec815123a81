"""The benchmark's straightforward loop does the library's own work, so that its ratios compare like with like."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import machine
import pytest
import throughput
import torch
from ladder import Begun, Bench, Effort, Result, Rung, unavailable
from problem import CIFAR, DIGITS, Problem, Work
from product import LibraryStep
from step import Draw, Flops, PngFiles, Step, Switches, step_flops
from timing import Round, Spread, Stopwatch
from torch import Tensor, nn

from diffstill.engine.runtime import Runtime, native_bf16
from diffstill.evaluation.cost import count_flops
from diffstill.models.denoiser import Denoiser

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


@pytest.mark.parametrize("work", ["distil", "train"])
def test_flops_of_a_step_are_those_of_its_passes(work: Work) -> None:
    """Three forwards' worth for each branch that is trained, less the gradients of inputs that nobody needs; the
    teacher's two forwards."""
    problem = Problem(DIGITS, work, 3, CPU)
    network: Any = problem.trained()

    def forward(network: nn.Module) -> float:
        return count_flops(Denoiser(network, problem.schedule, 10, DIGITS.sample_shape))

    pixels = DIGITS.sample_shape[1] * DIGITS.sample_shape[2]
    unneeded = 2 * network.conv_in.weight.numel() * pixels + 2 * network.time_embedding.linear_1.weight.numel()
    branches = 2 if work == "distil" else 1
    found = step_flops(problem)
    assert found.trained == 3 * branches * (3 * forward(network) - unneeded)
    assert found.teacher == (3 * 2 * forward(problem.teacher()) if work == "distil" else 0)
    assert found.step == found.trained + found.teacher


def test_utilisation_is_of_the_rate_of_the_dtype_that_does_most() -> None:
    flops = Flops(trained=4e9, teacher=8e9)
    assert flops.dtype(bf16=False, teacher_bf16=False) == "fp32"
    assert flops.dtype(bf16=True, teacher_bf16=True) == "bf16"
    assert flops.dtype(bf16=False, teacher_bf16=True) == "bf16"
    assert flops.dtype(bf16=True, teacher_bf16=False) == "fp32"
    assert flops.reusing(4) == Flops(4e9, 2e9)
    assert flops.reusing(4).dtype(bf16=True, teacher_bf16=False) == "bf16"
    bench = Bench(Runtime("cpu"), Stopwatch(CPU), {"fp32": 48e9, "bf16": None})
    assert bench.utilisation(flops.step, 0.5, "fp32") == 0.5
    assert bench.utilisation(flops.step, 0.5, "bf16") is None


def test_the_librarys_dtypes_are_what_its_settings_resolve_to(tmp_path: Path) -> None:
    problem = Problem(DIGITS, "distil", 2, CPU)
    mixed = LibraryStep(problem, Runtime("cpu"), tmp_path, precision="fp32", teacher_precision="bf16", compile=False)
    assert (mixed.bf16, mixed.teacher_bf16) == (False, True)
    auto = LibraryStep(problem, Runtime("cpu"), tmp_path, compile=False)
    assert (auto.bf16, auto.teacher_bf16) == (False, native_bf16(CPU))  # digits are small, see Runtime.dtype


def test_matrix_rate_by_a_scripted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product takes a second of this clock, however large."""
    ticks, watch = count(), Stopwatch(CPU)
    monkeypatch.setattr(watch, "_now", lambda: float(next(ticks)))
    rates = machine.matrix_rate(CPU, watch, least_s=1.0)
    assert rates == {"fp32": 2 * 256**3, "bf16": 2 * 256**3 if native_bf16(CPU) else None}
    monkeypatch.setattr(machine, "LARGEST", 512)
    assert machine.matrix_rate(CPU, watch, least_s=2.0)["fp32"] == 2.0 * 512**3


def test_peak_memory_leaves_out_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator of CUDA by its contract: torch's calls are stood in for, as no GPU may be here."""
    live, peak, pool = [700], [5000], (7, 1)
    segments = [
        {"total_size": 4000, "allocated_size": 700, "segment_pool_id": (0, 0)},
        {"total_size": 900, "allocated_size": 300, "segment_pool_id": pool},
    ]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: live[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, live[0]))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    cuda = torch.device("cuda")
    resident = machine.held_memory(cuda)
    assert resident == 700 + 600
    segments.append({"total_size": 2_000_000, "allocated_size": 0, "segment_pool_id": pool})
    assert machine.peak_memory_mb(cuda, lambda: peak.__setitem__(0, 1_000_700), resident) == 3.0


def test_no_peak_memory_where_it_is_not_told() -> None:
    assert machine.held_memory(CPU) == 0
    assert machine.peak_memory_mb(CPU, pytest.fail, 0) is None


def test_aims_of_the_distillation_step() -> None:
    cuda, mps = torch.device("cuda"), torch.device("mps")
    assert [Problem(CIFAR, "distil", batch, cuda).aim for batch in (64, 256, 512)] == [4.0, 2.5, None]
    assert [Problem(nets, "distil", 64, CPU).aim for nets in (DIGITS, CIFAR)] == [1.3, 1.8]
    assert Problem(CIFAR, "train", 64, cuda).aim is Problem(CIFAR, "distil", 64, mps).aim is None


def test_a_rung_is_one_line_with_what_is_known() -> None:
    rung = Result("EMA, optimizer, data, syncs xxxxx", {"bf16": True}, optional=True)
    rung.ratio, rung.images_per_s = Spread(10.5, 10.25, 11.75), 98765.4
    bare = throughput.line(rung)
    assert "10.50x  [10.25, 11.75]" in bare
    assert bare.endswith("optional")
    assert "MB" not in bare
    assert "%" not in bare
    rung.peak_memory_mb, rung.utilisation, rung.dtype = 123456.7, 0.1234, "bf16"
    assert "123457 MB" in throughput.line(rung)
    assert "12.3% of bf16" in throughput.line(rung)
    assert len(throughput.line(rung)) < 120
    assert len(throughput.line(Result("x", skipped="failed: " + "y" * 200))) < 120


def test_what_stands_is_what_was_kept_last() -> None:
    begun = Begun("digits", "train", 64, 1)
    assert begun.standing() == (Switches(), 1.0)
    for rung, kept, ratio in (("fused", True, 1.2), ("resident", True, 1.4), ("bf16", False, 0.7)):
        on = asdict(begun.standing()[0]) | {rung: True}
        begun.rungs.append(Result(rung, on, kept=kept, ratio=Spread(ratio, ratio, ratio)))
    begun.rungs.append(Result("compile", {}, skipped="no C++ compiler"))
    assert begun.standing() == (Switches(fused=True, resident=True), 1.4)
    begun.rungs[0].rounds.append(Round(1.0, 2.0, 0.5))
    assert Begun.of(json.loads(json.dumps(asdict(begun)))) == begun
