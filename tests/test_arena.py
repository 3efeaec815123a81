"""Arena statistics against known answers, and its tables and page."""

from __future__ import annotations

from pathlib import Path

import fabricated
import numpy as np
import pytest
from html_checks import check_page
from hypothesis import given
from hypothesis import strategies as st

from diffstill.evaluation.intervals import t_interval
from diffstill.report import arena as room
from diffstill.report.arena import ArenaArm, ArenaResult, ArmSeed, best_fd, fd_at, fidelity, markdown_table
from diffstill.report.page import write_arena


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arena")


@pytest.fixture(scope="module")
def arena(folder: Path) -> ArenaResult:
    return fabricated.arena(folder)


@pytest.mark.parametrize(
    ("values", "level", "mean", "half"),
    [
        # Table values of Student's t: t(0.975, 2) = 4.302653, t(0.975, 1) = 12.706205, t(0.95, 4) = 2.131847.
        ([1.0, 2.0, 3.0], 0.95, 2.0, 4.302653 / 3**0.5),
        ([0.0, 1.0], 0.95, 0.5, 12.706205 * 0.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.90, 3.0, 2.131847 * (2.5 / 5) ** 0.5),
        ([7.0, 7.0, 7.0], 0.95, 7.0, 0.0),
    ],
)
def test_t_interval_known_answers(values: list[float], level: float, mean: float, half: float) -> None:
    found = t_interval(values, level)
    assert (found.value, found.level) == (pytest.approx(mean), level)
    assert (found.low, found.high) == (pytest.approx(mean - half, rel=1e-6), pytest.approx(mean + half, rel=1e-6))


def test_t_interval_of_too_little() -> None:
    one = t_interval([4.0])
    assert (one.value, one.low, one.high) == (4.0, None, None)
    assert t_interval([]).value is None
    assert t_interval([1.0, None, 3.0]).value is None, "a diverged seed must not be dropped"
    assert t_interval([1.0, float("inf")]).value is None


def test_t_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(5.0, 2.0, (4000, 3))
    held = [e.low <= 5.0 <= e.high for e in map(t_interval, draws.tolist()) if e.low is not None and e.high is not None]
    assert len(held) == 4000
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.floats(-50, 50))
def test_t_interval_moves_with_the_data(values: list[float], shift: float) -> None:
    a, b = t_interval(values), t_interval([v + shift for v in values])
    for part in ("value", "low", "high"):
        assert getattr(b, part) == pytest.approx(getattr(a, part) + shift, abs=1e-6)


def _arm(name: str, distances: dict[int, float], budget: str = "equal_steps") -> ArenaArm:
    def seed(number: int, fd: float) -> ArmSeed:
        run = fabricated.evaluation(
            name, name, [fd + 5, fd, fd + 1, fd + 9, fd + 2], fabricated.cost(10, 1.0), None, {}
        )
        return ArmSeed(seed=number, steps=5, images_seen=10, seconds=1.0, evaluation=run, budget=budget)  # type: ignore[arg-type]

    return ArenaArm(
        name=name, method=name, label=name, parameters=10, seeds=[seed(*item) for item in distances.items()]
    )


def _world(arena: ArenaResult, *arms: ArenaArm) -> ArenaResult:
    return arena.model_copy(update={"arms": list(arms)})


def test_metrics(arena: ArenaResult) -> None:
    arm = _arm("a", {0: 10.0, 1: 14.0})
    assert arm.mean(best_fd).value == 12.0
    assert arm.mean(fd_at("1")).value == 17.0
    assert arm.mean(fd_at("9")).value is None
    assert arm.mean(fidelity("ratio")).value is None
    dash = arena.arm("dash")
    assert dash is not None
    thousandth = dash.mean(fidelity("gap_mse")).value
    assert thousandth is not None
    assert dash.mean(fidelity("gap_mse", 1000)).value == pytest.approx(1000 * thousandth)


def test_the_best_guidance_is_chosen_by_the_other_seeds(arena: ArenaResult) -> None:
    """Picked on the samples it is reported on, the mean of the best would be (1 + 2 + 3) / 3."""
    sweeps = {0: [1.0, 5.0, 9.0], 1: [8.0, 2.0, 9.0], 2: [7.0, 6.0, 3.0]}

    def seed(number: int, distances: list[float], budget: str = "equal_steps") -> ArmSeed:
        run = fabricated.evaluation("a", "a", [*distances, 50.0, 50.0], fabricated.cost(10, 1.0), None, {})
        return ArmSeed(seed=number, steps=5, images_seen=10, seconds=1.0, evaluation=run, budget=budget)  # type: ignore[arg-type]

    seeds = [seed(*item) for item in sweeps.items()]
    settings = [point.guidance for point in seeds[0].evaluation.sweep]
    arm = ArenaArm(
        name="a", method="a", label="a", parameters=1, seeds=[*seeds, seed(0, [2.0, 3.0, 4.0], "equal_seconds")]
    )
    # Means of the other two: (7.5, 4, 6), (4, 5.5, 6), (4.5, 3.5, 9).
    assert [s.chosen for s in arm.at("equal_steps")] == [settings[1], settings[0], settings[1]]
    assert arm.mean(best_fd).value == pytest.approx((5.0 + 8.0 + 6.0) / 3)
    assert arm.at("equal_seconds")[0].chosen == settings[0], "alone, a seed chooses for itself"
    assert arm.mean(best_fd, "equal_seconds").value == 2.0
    gone = ArenaArm(name="a", method="a", label="a", parameters=1, seeds=[*seeds[:2], seed(2, [float("nan")] * 3)])
    assert gone.at("equal_steps")[0].chosen in settings[3:], "a guidance that failed in another seed is not chosen"


def test_pairing_is_by_seed_and_removes_what_seeds_share(arena: ArenaResult) -> None:
    dash = _arm("dash", {0: 10.0, 1: 30.0, 2: 20.0})
    world = _world(arena, dash, other := _arm("other", {2: 23.0, 0: 13.0, 1: 33.0, 9: 1000.0}))
    found = world.paired(other, best_fd)
    assert found is not None
    assert (found.value, found.low, found.high) == tuple(pytest.approx(3.0) for _ in range(3))
    assert dash.mean(best_fd).low < 0  # type: ignore[operator]
    assert world.paired(dash, best_fd) is None
    assert world.paired(_arm("lonely", {7: 1.0}), best_fd) is None
    assert world.paired(other, best_fd, "equal_seconds") is None


def test_ranking_puts_the_unmeasured_last_and_keeps_budgets_apart(arena: ArenaResult) -> None:
    timed = _arm("timed", {0: 1.0}, "equal_seconds")
    world = _world(arena, _arm("b", {0: 5.0}), _arm("nan", {0: float("nan")}), _arm("a", {0: 4.0}), timed)
    assert [arm.name for arm in world.ranked()] == ["a", "b", "nan"]
    assert [arm.name for arm in world.ranked("equal_seconds")] == ["timed"]
    assert world.budgets() == ["equal_steps", "equal_seconds"]


def test_round_trip(arena: ArenaResult, tmp_path: Path) -> None:
    assert ArenaResult.load(arena.save(tmp_path / "arena.json")) == arena
    assert ArenaResult.load(tmp_path) == arena


def test_markdown_table(arena: ArenaResult) -> None:
    renamed = arena.model_copy(deep=True)
    renamed.arms[0].label = "a | b"
    lines = markdown_table(renamed).splitlines()
    header, body = room.rows(renamed)
    assert len(lines) == 2 + 1 + len(arena.arms)
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(header) + 1}
    assert body[0][:1] == ["Teacher"]
    assert body[1][:3] == ["a | b", "117\u2009769", "3 \u00d7 2\u2009000"], "DASH is the best"
    distances = [float(row[4].split(" \u00b1")[0]) for row in body[1:]]
    assert distances == sorted(distances)
    assert body[1][6] == "\u2013", "no difference to itself"
    assert body[2][6].startswith("+")


def test_the_table_of_a_budget_is_of_that_budget(arena: ArenaResult) -> None:
    def both(name: str, steps: float, seconds: float) -> ArenaArm:
        seeds = [*_arm(name, {0: steps}).seeds, *_arm(name, {0: seconds}, "equal_seconds").seeds]
        return ArenaArm(name=name, method=name, label=name, parameters=10, seeds=seeds)

    world = _world(arena, both("dash", 10.0, 12.0), both("other", 40.0, 15.0))
    for budget, best, difference in (("equal_steps", 40.0, 30.0), ("equal_seconds", 15.0, 3.0)):
        other = room.rows(world, budget)[1][2]  # type: ignore[arg-type]
        assert other[2] == "1 \u00d7 5"
        assert (float(other[4]), float(other[6])) == (best, difference)


def test_page(arena: ArenaResult, folder: Path) -> None:
    text = check_page(write_arena(arena, folder / "arena.html").read_text(encoding="utf-8"))
    for arm in arena.arms:
        assert arm.label in text
    assert "DASH reaches the lowest FD-digits" in text
    assert "the gap ratio fell under 0.5 in 1 of 3 trainings" in text
    assert "At equal steps" in text
    assert "At equal time" in text
    assert "8.87 \u00b1 0.12" in text, "the paper's number"
    assert arena.notes[0] in text


def test_page_of_one_seed_and_of_a_diverged_arm(arena: ArenaResult, tmp_path: Path) -> None:
    world = _world(arena, _arm("dash", {0: 10.0}), _arm("lost", {0: float("nan")}), _arm("far", {0: 990.0}))
    page = write_arena(world, tmp_path / "arena.html").read_text(encoding="utf-8")
    assert "At equal time" not in check_page(page)
    check_page(write_arena(_world(arena), tmp_path / "empty.html").read_text(encoding="utf-8"), plots=0)
