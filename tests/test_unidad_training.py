"""Uni-DAD in the real trainer: cadence, clocks, what stays, resume, calibration, divergence (unidad.md 2)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same, one_line
from few_steps import Roles, differing, source, weights

from diffstill.checks import check_method, training
from diffstill.checks.bench import BATCH
from diffstill.data.dataset import ImageData
from diffstill.engine.arm import Arm
from diffstill.engine.log import read_log
from diffstill.engine.state import load_latest
from diffstill.errors import RunFailed

ALONE: dict[str, Any] = {"gan": "none", "target_teacher": "none"}


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(folder / "log.jsonl") if "loss" in record]


def updates(arm: Arm) -> dict[str, set[int]]:
    """Phase -> the numbers of updates that its optimizer counts."""
    return {
        name: {int(state["step"]) for state in optimizer.state.values()} for name, optimizer in arm.optimizers.items()
    }


# --------------------------------------------------------------------------------------------------------- cadence


@pytest.mark.parametrize(
    ("steps", "every", "target_every"), [(7, 3, None), (6, 3, 2), (4, 1, 3), (5, 5, None), (6, 5, 1)]
)
def test_phases_run_as_often_as_they_should(tmp_path: Path, steps: int, every: int, target_every: int | None) -> None:
    """ceil(N / r) student updates, N of the critic, the target teacher's by its own cadence."""
    bench = Roles(source(), steps=1, student_every=every, target_every=target_every)
    trainer = bench.trainer(tmp_path, steps=steps)
    trainer.run()
    arm = trainer.arms[0]
    target = target_every or every
    count = {"student": math.ceil(steps / every), "critic": steps, "target": math.ceil(steps / target)}
    assert updates(arm) == {name: {number} for name, number in count.items()}
    assert {role: ema.updates for role, ema in arm.ema.items()} == {"student": count["student"]}
    found = records(tmp_path)
    for phase, rate in (("student", every), ("critic", 1), ("target", target)):
        assert [n for n, record in enumerate(found) if f"{phase}_loss" in record] == list(range(0, steps, rate))


def test_a_step_is_student_then_critic_then_target(tmp_path: Path) -> None:
    """The student is judged by the critic before this step's update, and the critic learns from the images that the
    student made before its own."""
    bench = Roles(source(), steps=2, student_every=2)
    method: Any = bench.method()
    assert [phase.name for phase in method.phases] == ["student", "critic", "target"]
    batch = bench.batch()
    first = {name: method.phase_loss(name, batch, None).parts for name in ("student", "critic", "target")}
    bench.trainer(tmp_path, steps=2, lr=1e-2).run()
    found = records(tmp_path)[0]
    assert found["dmd"] == 0, "all networks are the teacher, as long as none was updated"
    for name, part in (("student", "gan"), ("critic", "critic"), ("critic", "gan_critic"), ("target", "target")):
        assert found[part] == pytest.approx(float(first[name][part]), rel=1e-5)


@pytest.mark.parametrize(("every", "steps"), [(1, 3), (2, 3), (3, 1)])
def test_a_step_draws_the_students_images_once(tmp_path: Path, every: int, steps: int) -> None:
    bench = Roles(source(), steps=steps, student_every=every)
    trainer = bench.trainer(tmp_path, steps=4)
    method: Any = trainer.arms[0].method
    passes: list[bool] = []
    method.student.network.register_forward_pre_hook(lambda module, args: passes.append(torch.is_grad_enabled()))
    trainer.run()
    assert passes == [step % every == 0 for step in range(4) for _ in range(steps)]


def test_every_phase_warms_up_and_decays_by_its_own_updates(tmp_path: Path) -> None:
    bench = Roles(source(), steps=1, student_every=3, critic_lr_scale=2.0, heads_lr_scale=5.0, target_lr_scale=0.5)
    trainer = bench.trainer(tmp_path, steps=13, lr=1e-3, lr_min=0.0, warmup_images=2 * BATCH, decay="linear")
    arm = trainer.arms[0]
    rates: dict[str, list[list[float]]] = {name: [] for name in arm.phases}
    for step in range(13):
        trainer.step()
        for name, phase in arm.phases.items():
            if step % phase.every == 0:
                rates[name].append([group["lr"] for group in arm.optimizers[name].param_groups])

    def clock(count: int) -> list[float]:
        return [1e-3 * ((k + 1) / 3 if k < 2 else (count - k) / (count - 2)) for k in range(count)]

    assert [rate for (rate,) in rates["student"]] == pytest.approx(clock(5))
    assert [rate for (rate,) in rates["target"]] == pytest.approx([0.5 * rate for rate in clock(5)])
    assert [rate for rate, _ in rates["critic"]] == pytest.approx([2 * rate for rate in clock(13)])
    assert [rate for _, rate in rates["critic"]] == pytest.approx([5 * rate for rate in clock(13)])


def test_accumulation_counts_updates_and_changes_none(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "student_every": 2, "gan_share": 0.5, "calibration": 2}
    ends = []
    for size in (None, 2):
        trainer = Roles(source(), **options).trainer(tmp_path / str(size), micro_batch=size, log_every=3)
        trainer.run()
        ends.append((updates(trainer.arms[0]), trainer.arms[0].tensors(), records(tmp_path / str(size))))
    assert ends[0][0] == ends[1][0] == {"student": {3}, "critic": {6}, "target": {3}}
    (dmd, gan, count), (other_dmd, other_gan, other_count) = (end[1].pop("memory/norms") for end in ends)
    assert count == other_count == 2
    torch.testing.assert_close(dmd, other_dmd, rtol=1e-2, atol=0)
    torch.testing.assert_close(gan, other_gan, rtol=1e-2, atol=0)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-2, atol=1e-4, msg=name)
    for whole, parts in zip(ends[0][2], ends[1][2], strict=True):
        assert whole.keys() == parts.keys()
        for part in ("critic", "target", "gan", "pixel"):
            assert whole[part] == pytest.approx(parts[part], rel=1e-2)
        for part in ("dmd_norm", "gan_norm"):  # root mean squares of halves, whose mean lies below that of the whole
            assert whole[part] == pytest.approx(parts[part], rel=0.1)


# ------------------------------------------------------------------------------------------------------ what stays


def test_teachers_stay_as_they_were_and_in_no_optimizer(tmp_path: Path) -> None:
    teacher = source()
    bench = Roles(teacher, {"target_teacher": differing(teacher, 3)}, target_teacher="frozen", student_every=1)
    trainer = bench.trainer(tmp_path)
    arm = trainer.arms[0]
    method: Any = arm.method
    frozen = {"teacher": method.teacher, "target_teacher": method._target}
    before = {name: weights(model) for name, model in frozen.items()}
    trained = {id(p) for o in arm.optimizers.values() for group in o.param_groups for p in group["params"]}
    trainer.run()
    for name, model in frozen.items():
        assert_same(weights(model), before[name])
        assert not {id(p) for p in model.network.parameters()} & trained
        assert not model.network.training
    assert list(arm.optimizers) == ["student", "critic"]
    assert not [key for key in arm.tensors() if "target" in key]
    roles = [set(phase.roles) for phase in method.phases]
    assert roles == [{"student"}, {"critic", "heads"}]
    assert trained == {id(p) for role in ("student", "critic", "heads") for p in method.roles[role].parameters()}


def test_every_role_is_trained(tmp_path: Path) -> None:
    trainer = Roles(source(), student_every=2).trainer(tmp_path)
    method: Any = trainer.arms[0].method
    before = {role: weights(network) for role, network in method.roles.items()}
    trainer.run()
    for role, network in method.roles.items():
        moved = [name for name, value in weights(network).items() if not torch.equal(value, before[role][name])]
        assert len(moved) == len(before[role]), role


def other_images(bench: Roles) -> ImageData:
    """As many other images of the same labels."""
    return replace(bench.data, images=bench.data.images.flip(0, 3))


@pytest.mark.parametrize(
    ("options", "matters"), [({}, False), ({"gan": "bce"}, True), ({"target_teacher": "online"}, True)]
)
def test_the_few_images_reach_the_student_by_gan_and_target_teacher_alone(
    tmp_path: Path, options: dict[str, Any], matters: bool
) -> None:
    """T15: without both, other images make the same student, bit for bit."""
    ends = []
    for name in ("one", "two"):
        bench = Roles(source(), steps=2, student_every=1, **{**ALONE, **options})
        if name == "two":
            bench.__dict__["data"] = other_images(bench)
        trainer = bench.trainer(tmp_path / name)
        trainer.run()
        ends.append(weights(trainer.arms[0].method.roles["student"]))
    assert any(not torch.equal(value, ends[1][key]) for key, value in ends[0].items()) == matters


def test_fewer_images_than_the_batch_are_enough(tmp_path: Path) -> None:
    """T18: of three images, every batch of eight has each at least twice."""
    bench = Roles(source(), steps=2, student_every=2)
    data = bench.data
    bench.__dict__["data"] = replace(data, images=data.images[:3], labels=data.labels[:3])
    counts = bench.batch(8).x0.flatten(1).unique(dim=0, return_counts=True)[1]
    assert (len(counts), int(counts.min())) == (3, 2)
    trainer = bench.trainer(tmp_path)
    trainer.run()
    assert len(records(tmp_path)) == 6
    assert trainer.arms[0].finite()


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_was_cut_goes_on_bit_for_bit(dropout: float) -> None:
    """Cut in the middle of a calibration, with half-kept means and all three optimizers."""
    bench = Roles(source(), steps=2, student_every=2, gan_share=0.5, calibration=2, gradient="random")
    try:
        training.resume(bench, dropout)
    except training.NotApplicable:
        pytest.fail("the networks have no dropout")


def test_a_checkpoint_holds_what_the_method_remembers(tmp_path: Path) -> None:
    bench = Roles(source(), steps=1, student_every=1, gan_share=0.5, calibration=2)
    trainer = bench.trainer(tmp_path)
    trainer.run()
    arm = trainer.arms[0]
    kept = {key: value for key, value in arm.tensors().items() if key.startswith("memory/")}
    assert set(kept) == {"memory/norms", "memory/pixel"}
    assert all(bool((value > 0).all()) for value in kept.values())
    again = bench.trainer(tmp_path)
    again.run()
    assert_same(again.arms[0].method.memory, arm.method.memory)


# ----------------------------------------------------------------------------------------------------- calibration


def test_the_gans_weight_is_calibrated_to_its_share(tmp_path: Path) -> None:
    """``share sqrt(S_dmd / S_gan)`` over the first updates whose matching moves the student; the first, at which
    all networks are the teacher, does not count."""
    options: dict[str, Any] = {"gan_share": 0.4, "gan_weight": 0.02, "calibration": 3, "dmd_weight": 2.0}
    bench = Roles(source(), steps=1, student_every=2, **options)
    bench.trainer(tmp_path, steps=14).run()
    found = [record for record in records(tmp_path) if "gan_weight" in record]
    assert found[0]["dmd_norm"] == 0
    counted = found[1:4]
    assert all(record["dmd_norm"] > 0 for record in counted)
    ratio = sum((2 * r["dmd_norm"]) ** 2 for r in counted) / sum(r["gan_norm"] ** 2 for r in counted)
    assert [r["gan_weight"] for r in found[:4]] == pytest.approx([0.02] * 4)
    assert [r["gan_weight"] for r in found[4:]] == pytest.approx([0.4 * ratio**0.5] * 3, rel=1e-4)
    plain = Roles(source(), steps=1, student_every=2, gan_weight=0.02)
    plain.trainer(tmp_path / "plain", steps=6).run()
    assert [r["gan_weight"] for r in records(tmp_path / "plain") if "gan_weight" in r] == pytest.approx([0.02] * 3)


def test_the_share_can_be_held_to_the_end(tmp_path: Path) -> None:
    """Over the last updates, each of which counts 2/3 of the next: the weight follows a discriminator that sharpens."""
    options: dict[str, Any] = {"gan_share": 0.4, "gan_weight": 0.02, "calibration": 3, "calibrate": "always"}
    Roles(source(), steps=1, student_every=2, **options).trainer(tmp_path, steps=20).run()
    found = [record for record in records(tmp_path) if "gan_weight" in record]
    dmd = gan = 0.0
    for number, record in enumerate(found):
        expected = 0.4 * (dmd / gan) ** 0.5 if number > 3 else 0.02
        assert record["gan_weight"] == pytest.approx(expected, rel=1e-4)
        if record["dmd_norm"]:
            dmd = dmd * 2 / 3 + record["dmd_norm"] ** 2
            gan = gan * 2 / 3 + record["gan_norm"] ** 2
    assert len({round(record["gan_weight"], 6) for record in found[4:]}) == len(found) - 4, "never the same again"


def test_a_calibration_counts_updates_whatever_the_micro_batches(tmp_path: Path) -> None:
    bench = Roles(source(), steps=1, student_every=1, gan_share=0.4, calibration=3)
    trainer = bench.trainer(tmp_path, micro_batch=2)
    trainer.run()
    assert float(trainer.arms[0].method.memory["norms"][2]) == 3
    found = [record["gan_weight"] for record in records(tmp_path)]
    assert found[:4] == pytest.approx([0.01] * 4)
    assert found[4] == found[5] != pytest.approx(0.01)


# ------------------------------------------------------------------------------------------------------ divergence


def test_images_that_leave_their_range_are_a_fault() -> None:
    method: Any = Roles(source(), steps=1).method()
    for first, now, fault in ((0.5, 4.0, False), (0.5, 4.1, True), (2.0, 7.9, False), (2.0, 8.1, True)):
        method.memory["pixel"] = torch.tensor([first])
        told = method.fault({"pixel": now})
        assert (told is not None) == fault
        if told:
            assert told == f"the student's images have left their range (mean absolute pixel {now}, at first {first})"
    assert method.fault({"critic": 1.0}) is None, "no student update since the last log point"


def test_a_run_that_diverges_ends_and_says_so(tmp_path: Path) -> None:
    bench = Roles(source(), steps=1, student_every=1, sigma_max=2.0)
    trainer = bench.trainer(tmp_path, steps=60, lr=0.3, decay="none", grad_clip=None)
    with pytest.raises(RunFailed) as told:
        trainer.run()
    said = one_line(told.value)
    assert "arm: the student's images have left their range (mean absolute pixel" in said
    assert "try a lower training.lr" in said


def test_no_checkpoint_is_of_a_training_that_has_diverged(tmp_path: Path) -> None:
    """Also between two log points, at which alone the means are looked at."""
    bench = Roles(source(), steps=1, student_every=1, sigma_max=2.0)
    options: dict[str, Any] = {"lr": 0.3, "decay": "none", "grad_clip": None, "checkpoint_every": BATCH}
    trainer = bench.trainer(tmp_path, steps=60, log_every=60, **options)
    with pytest.raises(RunFailed, match=r"the student's images have left their range .* last good checkpoint: "):
        trainer.run()
    saved, _ = load_latest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.images_seen == trainer.images_seen - BATCH, "the step before was still good"
    assert trainer.images_seen < 30 * BATCH, "long before the log point"


def test_a_checkpoint_asks_the_last_update_whatever_its_micro_batches(tmp_path: Path) -> None:
    trainer = Roles(source(), steps=1, student_every=1).trainer(tmp_path, micro_batch=2, log_every=1)
    trainer.run()
    arm, asked = trainer.arms[0], []
    arm.method.fault = lambda means: asked.append(dict(means))  # type: ignore[method-assign,assignment,func-returns-value]
    assert arm.fault() is None
    last = records(tmp_path)[-1]
    assert asked[0]["pixel"] == pytest.approx(last["pixel"], rel=1e-5)
    assert asked[0]["loss"] == pytest.approx(last["target_loss"], rel=1e-5), "the last of its phases"


# ------------------------------------------------------------------------------------------------------- the rules


def test_the_method_conforms() -> None:
    report = check_method("unidad", quick=True)
    assert report.ok, str(report)
    assert report["copy of the teacher"].detail == "dmd = 0"
