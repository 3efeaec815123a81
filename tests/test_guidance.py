from __future__ import annotations

import math
import string

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffstill.diffusion.guidance import TAG, Constant, GuidanceSchedule, Interval, guidance_gap, guide, parse_guidance
from diffstill.diffusion.sampling import count_nfe, ddim_timesteps

T = 1000
COND, NULL = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def test_scale_1_is_purely_conditional_and_0_purely_null() -> None:
    torch.testing.assert_close(guide(COND, NULL, 1.0), COND)
    assert torch.equal(guide(COND, NULL, 0.0), NULL)


@given(a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_guidance_is_affine_in_the_scale_and_linear_in_the_branches(a: float, b: float) -> None:
    middle = guide(COND, NULL, (a + b) / 2)
    torch.testing.assert_close(middle, (guide(COND, NULL, a) + guide(COND, NULL, b)) / 2)
    torch.testing.assert_close(guide(COND, NULL, a) - guide(COND, NULL, b), (a - b) * guidance_gap(COND, NULL))
    torch.testing.assert_close(guide(2 * COND + NULL, 3 * NULL, a), 2 * guide(COND, NULL, a) + guide(NULL, NULL, a))


def test_a_scale_per_sample_broadcasts() -> None:
    scales = torch.tensor([0.0, 1.0, 2.5, 4.0], dtype=torch.float64)
    mixed = guide(COND, NULL, scales.view(-1, 1, 1, 1))
    for i, s in enumerate(scales.tolist()):
        torch.testing.assert_close(mixed[i], guide(COND[i], NULL[i], s))


@pytest.mark.parametrize(("t", "value"), [(0, 3.7724), (500, 2.5), (980, 1.2495)])
def test_tag_has_the_known_values(t: int, value: float) -> None:
    assert TAG()(t, T) == pytest.approx(value, abs=5e-5)


def test_tag_means_2_5254_over_50_steps() -> None:
    stamps = ddim_timesteps(T, 50)
    assert sum(TAG()(t, T) for t in stamps) / 50 == pytest.approx(2.5254, abs=5e-5)


@given(s_min=st.floats(0, 10), s_max=st.floats(0, 10), beta=st.floats(-1e6, 1e6), t=st.integers(0, T - 1))
@example(s_min=1, s_max=4, beta=1e5, t=999)
def test_tag_stays_between_its_ends_for_any_sharpness(s_min: float, s_max: float, beta: float, t: int) -> None:
    low, high = sorted((s_min, s_max))
    assert low - 1e-9 <= TAG(s_min, s_max, beta)(t, T) <= high + 1e-9


def test_interval_is_half_open_and_conditional_outside() -> None:
    interval = Interval(3.0, 0.2, 0.8)
    assert [interval(t, T) for t in (0, 199, 200, 500, 799, 800, 999)] == [1, 1, 3, 3, 3, 1, 1]
    assert all(Interval(3.0)(t, T) == 3.0 for t in range(0, T, 37))


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("2", Constant(2.0)),
        (" 1.5 ", Constant(1.5)),
        (3, Constant(3.0)),
        (0.0, Constant(0.0)),
        ("-1", Constant(-1.0)),
        ("tag", TAG(1.0, 4.0, 5.0)),
        ("tag:1.5", TAG(1.5, 4.0, 5.0)),
        ("tag:1,3,8", TAG(1.0, 3.0, 8.0)),
        ("interval:3", Interval(3.0, 0.0, 1.0)),
        ("interval:3,0.2,0.8", Interval(3.0, 0.2, 0.8)),
        (TAG(2.0, 3.0, 4.0), TAG(2.0, 3.0, 4.0)),
    ],
)
def test_what_is_understood(text: str, made: GuidanceSchedule) -> None:
    assert parse_guidance(text) == made
    assert parse_guidance(str(made)) == made


@pytest.mark.parametrize(
    "text",
    ["", "two", "2,3", "tag:a", "tag:1,2,3,4", "interval", "interval:", "interval:3,0,1,2", "2:3", "tag:1,,5",
     "nan", "inf", "tag:nan", "interval:3,-inf,1", "TAG", "tag 1", "4x", ":", "2\n3", "tag:1,4,5:6"],
)  # fmt: skip
def test_what_is_not_understood_is_named_in_one_line_with_the_forms(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_guidance(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "use a number such as 2, tag, tag:1,4,5 or interval:3,0.2,0.8" in message
    assert "\n" not in message


GRAMMAR = st.text(alphabet="taginervl:,.+-e_ " + string.digits, max_size=24)
SHAPED = st.tuples(
    st.sampled_from(["", "tag", "interval", "tag:", "interval:"]),
    st.lists(st.floats(width=32).map(str), max_size=4).map(",".join),
).map("".join)


@given(text=st.one_of(st.text(), GRAMMAR, SHAPED, st.floats(), st.integers(), st.none(), st.booleans()))
@settings(max_examples=400)
def test_parsing_never_raises_anything_but_a_value_error(text: object) -> None:
    try:
        schedule = parse_guidance(text)  # type: ignore[arg-type]
    except ValueError:
        return
    assert isinstance(schedule, (Constant, TAG, Interval))
    for t in (0, 500, 999):
        assert not math.isnan(schedule(t, T))


@pytest.mark.parametrize(
    ("text", "nfe"),
    [("1", 50), ("2", 100), ("0", 100), ("tag", 100), ("interval:3,0.2,0.8", 80), ("interval:3,0.5", 75)],
)
def test_count_nfe(text: str, nfe: int) -> None:
    assert count_nfe(parse_guidance(text), T, 50) == nfe
