"""Timestep curricula: TIRT's start, sign and normalisers, uncertainty's stationary point, transfer (dash.md 2.3, 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.methods import Curriculum, CurriculumOptions
from diffstill.methods.curriculum import student_curriculum

SCHEDULE = NoiseSchedule.create("cosine", 1000)
SMALL = NoiseSchedule.create("cosine", 12)
EVERY = torch.arange(12)


def made(schedule: NoiseSchedule = SCHEDULE, **options: Any) -> Curriculum:
    return Curriculum(schedule, CurriculumOptions(**options))


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The start


def test_tirt_starts_at_min_snr_5_with_unit_mean() -> None:
    weights = made().weights().detach().double()
    base = SCHEDULE.snr.clamp(max=5)
    torch.testing.assert_close(weights, base / base.mean(), rtol=1e-5, atol=1e-7)
    assert abs(float(weights.mean()) - 1) < 1e-6


def test_the_published_schedule_gives_the_known_shares() -> None:
    """snr > 5 at exactly the first 261 timesteps; shares of t >= 500 and t >= 800."""
    assert (SCHEDULE.snr > 5).nonzero().flatten().tolist() == list(range(261))
    weights = made().weights().detach().double()
    share = weights / weights.sum()
    assert round(float(share[500:].sum()), 4) == 0.0665
    assert round(float(share[800:].sum()), 5) == 0.00334
    assert torch.equal(weights[:261], weights[:1].expand(261))


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("x0", lambda snr: snr.clamp(max=5)),
        ("eps", lambda snr: snr.clamp(max=5) / snr),
        ("v", lambda snr: snr.clamp(max=5) / (snr + 1)),
        ("none", lambda snr: torch.ones_like(snr)),
    ],
)
def test_forms_of_the_base(form: str, wanted: Any) -> None:
    base = wanted(SCHEDULE.snr)
    for rule in ("tirt", "min_snr", "uncertainty"):
        found = made(rule=rule, snr_form=form).weights().double()
        torch.testing.assert_close(found, base / base.mean(), rtol=1e-5, atol=1e-7)
    assert torch.equal(made(rule="none", snr_form=form).weights(), torch.ones(1000))


@pytest.mark.parametrize(
    ("rule", "learns"), [("tirt", True), ("uncertainty", True), ("min_snr", False), ("none", False)]
)
def test_which_rules_learn(rule: str, learns: bool) -> None:
    curriculum = made(rule=rule)
    assert curriculum.learns is learns
    assert curriculum.logits.requires_grad is learns
    assert not curriculum.freeze().logits.requires_grad
    assert not curriculum.base.requires_grad


# Trap (b)


@given(seed=st.integers(0, 10_000), normalise=st.sampled_from(["batch", "all"]))
@settings(max_examples=40, deadline=None)
def test_descent_lowers_lambda_exactly_where_loss_exceeds_the_weighted_mean(seed: int, normalise: str) -> None:
    """d loss / d omega_i has the sign of loss_i - weighted mean (dash.md 6); with every t in the batch once
    both normalisers are the same."""
    curriculum = made(SMALL, normalise=normalise, clamp=None).double()  # the last timesteps weigh 1e-7
    with torch.no_grad():
        curriculum.logits.copy_(draws(seed, 12))
    before = curriculum.logits.detach().clone()
    losses = draws(seed + 1, 12).double().exp()
    weights = curriculum.weights().detach()
    weighted_mean = (weights * losses).sum() / weights.sum()
    optimizer = torch.optim.SGD([curriculum.logits], lr=1.0)
    loss = curriculum(losses, EVERY, EVERY)
    torch.testing.assert_close(loss.detach(), weighted_mean)
    loss.backward()
    optimizer.step()
    moved = curriculum.logits.detach() - before
    clear = (losses - weighted_mean).abs() > 1e-6 * weighted_mean
    assert int(clear.sum()) >= 11
    assert torch.equal((moved < 0)[clear], (losses > weighted_mean)[clear])
    assert torch.equal((moved > 0)[clear], (losses < weighted_mean)[clear])


def test_timesteps_outside_the_batch_do_not_move() -> None:
    curriculum = made(SMALL)
    t = torch.tensor([1, 4, 4, 7])
    curriculum(torch.tensor([1.0, 2.0, 3.0, 0.5]), t, t).backward()
    assert curriculum.logits.grad is not None
    assert curriculum.logits.grad.nonzero().flatten().tolist() == [1, 4, 7]


# Normalisers


@given(t=st.integers(0, 11), seed=st.integers(0, 1000), value=st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_one_sample_has_weight_one_under_the_batch_mean_and_not_over_all(t: int, seed: int, value: float) -> None:
    loss, at = torch.tensor([value]), torch.tensor([t])
    batch, over_all = made(SMALL), made(SMALL, normalise="all")
    for curriculum in (batch, over_all):
        with torch.no_grad():
            curriculum.logits.copy_(draws(seed, 12))
    assert float(batch(loss, at, at).detach()) == pytest.approx(value, rel=1e-5)
    weight = float(over_all.weights()[t].detach())
    assert float(over_all(loss, at, at).detach()) == pytest.approx(weight * value, rel=1e-5)
    spread = over_all.weights().detach()
    assert float(spread.max() / spread.min()) > 2


def test_the_batch_mean_runs_over_all_processes() -> None:
    """Halves with the normaliser of the whole average to the whole: what micro-batches and processes rely on."""
    curriculum = made(SMALL)
    with torch.no_grad():
        curriculum.logits.copy_(draws(0, 12))
    t, losses = torch.tensor([0, 3, 3, 5, 8, 9, 11, 1]), draws(1, 8).exp()
    whole = curriculum(losses, t, t)
    halves = [curriculum(losses[part], t[part], t) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    wrong = [curriculum(losses[part], t[part], t[part]) for part in (slice(0, 4), slice(4, 8))]
    assert abs(float((torch.stack(wrong).mean() - whole).detach())) > 1e-3


def test_frozen_means_over_all_timesteps_whatever_the_batch() -> None:
    learned = made(SMALL)
    with torch.no_grad():
        learned.logits.copy_(draws(3, 12))
    weights, t, losses = learned.weights().detach(), torch.tensor([2, 2, 9]), torch.tensor([1.0, 2.0, 3.0])
    frozen = learned.freeze()
    torch.testing.assert_close(frozen(losses, t, t), (weights[t] * losses).mean())


# Clamp


def test_the_clamp_bounds_the_weights_and_stops_the_runaway() -> None:
    bounded, free = made(SMALL, snr_form="none", clamp=2.0), made(SMALL, snr_form="none", clamp=None)
    for curriculum in (bounded, free):
        with torch.no_grad():
            curriculum.logits.copy_(torch.linspace(-8, 8, 12))
    weights = bounded.weights().detach()
    sigmoid = torch.sigmoid(torch.tensor([-2.0, 2.0]))
    assert float(weights.max() / weights.min()) == pytest.approx(float(sigmoid[1] / sigmoid[0]), rel=1e-5)
    spread = free.weights().detach()
    assert float(spread.max() / spread.min()) > 1000
    # Beyond the bound there is no gradient: lambda cannot run on unseen.
    bounded(draws(0, 12).exp(), EVERY, EVERY).backward()
    assert bounded.logits.grad is not None
    outside = bounded.logits.detach().abs() > 2
    assert torch.equal(bounded.logits.grad[outside], torch.zeros(int(outside.sum())))
    assert bool((bounded.logits.grad[~outside] != 0).all())


def test_the_clamp_changes_nothing_inside() -> None:
    bounded, free = made(SMALL, clamp=3.0), made(SMALL, clamp=None)
    for curriculum in (bounded, free):
        with torch.no_grad():
            curriculum.logits.copy_(torch.linspace(-2.9, 2.9, 12))
    assert torch.equal(bounded.weights(), free.weights())


# Uncertainty


def test_uncertainty_comes_to_rest_at_the_log_of_the_loss() -> None:
    """d/du [loss exp(-u) + u] = 0 at u = log loss, for every timestep and any base."""
    losses = torch.logspace(-3, 1, 12)
    for form in ("x0", "none"):
        curriculum = made(SMALL, rule="uncertainty", snr_form=form)
        with torch.no_grad():
            curriculum.logits.copy_(losses.log())
        curriculum(losses, EVERY, EVERY).backward()
        assert curriculum.logits.grad is not None
        assert float(curriculum.logits.grad.abs().max()) < 1e-6
    free = made(SMALL, rule="uncertainty", snr_form="none")
    optimizer = torch.optim.Adam([free.logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        free(losses, EVERY, EVERY).backward()
        optimizer.step()
    torch.testing.assert_close(free.logits.detach(), losses.log(), rtol=0, atol=2e-2)
    frozen = free.freeze().weights()
    torch.testing.assert_close(frozen, (1 / losses) / (1 / losses).mean(), rtol=5e-2, atol=1e-3)


# Transfer


def learned(**options: Any) -> Curriculum:
    curriculum = made(**options)
    with torch.no_grad():
        curriculum.logits.copy_(draws(5, 1000))
    return curriculum


@pytest.mark.parametrize("options", [{}, {"rule": "uncertainty"}, {"snr_form": "eps", "gamma": 3.0, "clamp": None}])
def test_what_is_saved_comes_back_frozen_and_equal(options: dict[str, Any]) -> None:
    teacher = learned(**options)
    back = Curriculum.from_table(teacher.table(), teacher.meta(), NoiseSchedule.create("cosine", 1000))
    assert torch.equal(back.logits, teacher.logits)
    assert torch.equal(back.weights(), teacher.weights())
    assert torch.equal(teacher.table()["weights"], teacher.weights())
    assert back.options == teacher.options
    assert not back.logits.requires_grad
    assert not any(tensor.requires_grad for tensor in teacher.table().values())
    assert all(isinstance(value, str) for value in teacher.meta().values())


def test_the_saved_table_is_a_copy() -> None:
    teacher = learned()
    table = teacher.table()
    with torch.no_grad():
        teacher.logits.add_(1)
    assert not torch.equal(table["logits"], teacher.logits)


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        (NoiseSchedule.create("cosine", 500), "'cosine with T=500'"),
        (NoiseSchedule.create("linear", 1000), "'linear with T=1000'"),
    ],
)
def test_a_curriculum_for_another_schedule_is_refused(schedule: NoiseSchedule, shown: str) -> None:
    teacher = learned()
    with pytest.raises(InputError) as caught:
        Curriculum.from_table(teacher.table(), teacher.meta(), schedule)
    assert str(caught.value) == (
        f"schedule: {shown} differs from the transferred curriculum's; "
        "use the curriculum's own schedule, cosine with T=1000"
    )


@pytest.mark.parametrize("lost", ["logits", "base", "options", "T"])
def test_a_curriculum_with_a_part_missing_is_refused(lost: str) -> None:
    teacher = learned()
    table = {name: tensor for name, tensor in teacher.table().items() if name != lost}
    meta = {name: text for name, text in teacher.meta().items() if name != lost}
    with pytest.raises(InputError, match=r"teacher\.curriculum: .*save the teacher again") as caught:
        Curriculum.from_table(table, meta, SCHEDULE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"options": '{"rule": "nonsense"}'}, {"T": "many"}, {"options": "{"}])
def test_a_curriculum_with_a_broken_description_is_refused(change: dict[str, str]) -> None:
    teacher = learned()
    with pytest.raises(InputError, match=r"teacher\.curriculum") as caught:
        Curriculum.from_table(teacher.table(), {**teacher.meta(), **change}, SCHEDULE)
    assert "\n" not in str(caught.value)


def test_a_table_of_the_wrong_length_is_refused() -> None:
    teacher = learned()
    table = {**teacher.table(), "logits": torch.zeros(10)}
    with pytest.raises(InputError, match="schedule"):
        Curriculum.from_table(table, teacher.meta(), SCHEDULE)


def test_the_student_modes() -> None:
    teacher = learned(clamp=None).freeze()
    transfer = student_curriculum("transfer", SCHEDULE, teacher)
    assert torch.equal(transfer.weights(), teacher.weights())
    assert not torch.allclose(transfer.weights(), made().weights())
    base = student_curriculum("base", SCHEDULE, teacher)
    assert torch.equal(base.weights(), made().weights())
    learn = student_curriculum("learn", SCHEDULE, teacher)
    assert torch.equal(learn.logits, torch.zeros(1000))
    assert [c.logits.requires_grad for c in (transfer, base, learn)] == [False, False, True]
    assert transfer.options == base.options == learn.options == teacher.options
    none = student_curriculum("none", SCHEDULE, teacher)
    assert torch.equal(none.weights(), torch.ones(1000))
    assert torch.equal(student_curriculum("none", SCHEDULE, None).weights(), torch.ones(1000))
    with torch.no_grad():
        transfer.logits.zero_()
    assert not torch.equal(teacher.logits, transfer.logits)


@pytest.mark.parametrize("mode", ["transfer", "base", "learn"])
def test_without_the_teachers_curriculum_there_is_no_silent_fallback(mode: Any) -> None:
    with pytest.raises(InputError) as caught:
        student_curriculum(mode, SCHEDULE, None)
    assert str(caught.value) == (
        f"method.curriculum: {mode!r} needs the teacher's curriculum, which this teacher does not carry; "
        "use a teacher trained by diffstill train, or method.curriculum=none"
    )


def test_options_are_checked() -> None:
    for bad in ({"rule": "tirtt"}, {"gamma": 0}, {"clamp": -1}, {"normalise": "none"}, {"lambda": 1}):
        with pytest.raises(ValidationError):
            CurriculumOptions.model_validate(bad)


@pytest.mark.parametrize("bound", [2.0, 0.7])  # float32 knows the first one exactly
def test_lambda_that_was_carried_past_the_bound_comes_back(bound: float) -> None:
    """Under any version of torch, whose ``clamp`` may or may not have a gradient there."""
    curriculum = made(SMALL, snr_form="none", clamp=bound)
    with torch.no_grad():
        curriculum.logits[0], curriculum.logits[1] = bound + 0.7, -bound - 0.7
    curriculum.keep_inside()
    assert curriculum.logits[:2].tolist() == torch.tensor([bound, -bound]).tolist()
    t = torch.arange(SMALL.T)
    curriculum(torch.linspace(1, 2, SMALL.T), t, t).backward()
    assert curriculum.logits.grad is not None
    assert bool((curriculum.logits.grad[:2] != 0).all())
