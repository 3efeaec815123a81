"""Names of points that lie above each other."""

from __future__ import annotations

import itertools

import fabricated
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffstill.report.frontier import CROWD, LINE_HEIGHT, ROOM, best_flops, names_beside

HEIGHTS = st.lists(st.floats(0, 400), min_size=CROWD, max_size=12)


@given(HEIGHTS)
def test_names_of_a_column_never_touch_and_stay_in_order(heights: list[float]) -> None:
    found = names_beside([(100.0, y) for y in heights])
    assert set(found) == set(range(len(heights)))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for low, high in itertools.pairwise(order):
        assert found[high] - found[low] >= LINE_HEIGHT - 1e-6
    # No shift of all of them together would bring them nearer: the least squares' first condition.
    assert sum(found[i] - heights[i] for i in found) == pytest.approx(0, abs=1e-6)


def test_names_move_no_farther_than_they_must() -> None:
    apart = [(0.0, 0.0), (0.0, 50.0), (0.0, 100.0)]
    assert names_beside(apart) == {0: 0.0, 1: 50.0, 2: 100.0}
    touching = [(0.0, 10.0), (0.0, 200.0), (0.0, 12.0)]
    found = names_beside(touching)
    assert found[1] == 200.0
    assert (found[0] + found[2]) / 2 == pytest.approx(11.0)
    assert found[2] - found[0] == pytest.approx(LINE_HEIGHT)


def test_few_points_and_points_side_by_side_keep_their_names_above() -> None:
    assert names_beside([(0.0, 0.0), (0.0, 1.0)]) == {}
    assert names_beside([(2 * ROOM[0] * i, 5.0) for i in range(5)]) == {}
    mixed = [(0.0, 0.0), (400.0, 7.0), (1.0, 30.0), (2.0, 60.0)]
    assert set(names_beside(mixed)) == {0, 2, 3}


def test_a_best_distance_at_scale_one_costs_one_pass_a_step() -> None:
    model = fabricated.evaluation("student", "dash", [3.0, 2.0, 1.0, 2.0, 3.0], fabricated.cost(1000, 1.0), None, {})
    assert model.cost is not None
    for point in model.sweep:
        best = model.model_copy(update={"sweep": [point]})
        passes = 50 if point.guidance == "1" else 100
        assert best_flops(best) == passes * model.cost.flops_forward
    assert best_flops(model.model_copy(update={"cost": None})) is None
