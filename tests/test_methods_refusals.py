"""What methods refuse, in one line; their registry, names and defaults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_bench import DISTILLERS, OTHER_NETWORKS, bench
from pydantic import ValidationError
from torch import Tensor

from diffstill.checks.bench import tiny_denoiser
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.methods import METHODS, Curriculum, CurriculumOptions, Setting, register
from diffstill.methods.composite import CompositeOptions
from diffstill.methods.conditional import ConditionalOnly
from diffstill.methods.dash import Dash, DashOptions
from diffstill.methods.fitnets import FitNets
from diffstill.models.denoiser import Denoiser


def mismatched(what: str) -> Denoiser:
    other = tiny_denoiser((8, 8), 0)
    if what == "schedule":
        other.schedule = NoiseSchedule.create("linear", 1000)
    elif what == "T":
        other.schedule = NoiseSchedule.create("cosine", 500)
    elif what == "classes":
        other.num_classes = 5
    elif what == "shape":
        other.sample_shape = (3, 8, 8)
    else:
        other.prediction_type = "v_prediction"
    return other


@pytest.mark.parametrize("name", DISTILLERS)
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("schedule", "schedule: 'linear with T=1000' differs from the teacher's; use the teacher's cosine with T=1000"),
        ("T", "schedule: 'cosine with T=500' differs from the teacher's; use the teacher's cosine with T=1000"),
        ("classes", "student.num_classes: 5 differs from the teacher's; use the teacher's 3"),
        ("shape", "student.sample_shape: (3, 8, 8) differs from the teacher's; use the teacher's (1, 8, 8)"),
        ("kind", "student.prediction_type: 'v_prediction' differs from the teacher's; use the teacher's epsilon"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused_in_one_line(name: str, what: str, says: str) -> None:
    method = METHODS[name]
    curriculum = Curriculum(NoiseSchedule.create("cosine", 1000)).freeze()
    with pytest.raises(InputError) as caught:
        method(Setting(mismatched(what), tiny_denoiser((8, 8), 1), curriculum), method.options_class())
    assert str(caught.value) == says


@pytest.mark.parametrize("name", DISTILLERS)
def test_distillation_needs_a_teacher_and_a_curriculum_to_transfer(name: str) -> None:
    method = METHODS[name]
    with pytest.raises(InputError, match=r"^teacher: is missing; name a teacher model folder$"):
        method(Setting(tiny_denoiser((8, 8), 0)), method.options_class())
    if name == "sfddm":  # has no weights over timesteps
        return
    with pytest.raises(InputError, match=r"method\.curriculum: 'transfer' needs the teacher's curriculum"):
        method(Setting(tiny_denoiser((8, 8), 0), tiny_denoiser((8, 8), 1)), method.options_class())


def test_unknown_stages_are_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"method\.stages: 'down\.7' .*down\.0, down\.1, last, mid, up\.0, up\.1"):
        bench("fitnets", stages=("down.7",))


@given(low=st.floats(0, 10), high=st.floats(-10, 20))
@settings(max_examples=40, deadline=None)
def test_a_range_of_scales_is_ordered(low: float, high: float) -> None:
    if high > low:
        assert CompositeOptions(scale=low, scale_to=high).scale_to == high
    else:
        with pytest.raises(ValidationError, match="must be greater than scale"):
            CompositeOptions(scale=low, scale_to=high)


@pytest.mark.parametrize("name", list(METHODS))
def test_options_are_strict_and_frozen(name: str) -> None:
    options = METHODS[name].options_class()
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        METHODS[name].options_class.model_validate({"lamda_un": 1.0})
    for field in type(options).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(options, field, None)


# What the classes say of themselves


def test_the_registry_and_what_its_methods_say() -> None:
    assert set(METHODS) == {*DISTILLERS, *OTHER_NETWORKS, "supervised", "pruning"}
    assert {name for name, method in METHODS.items() if not method.guided} == {"single-head", "unidad"}
    starts = {name: method.init for name, method in METHODS.items() if method.init != "fresh"}
    assert starts == {"pruning": "magnitude", **dict.fromkeys(OTHER_NETWORKS, "inherit")}
    assert {name for name, method in METHODS.items() if method.fewer_steps} == {"sfddm", "progressive", "encoder"}
    assert {name for name, method in METHODS.items() if method.keeps_scale} == {"progressive", "encoder"}
    assert {name for name, method in METHODS.items() if method.scale_input} == {"guided"}
    assert {name for name, method in METHODS.items() if not method.compiles} == {"fitnets", "sfddm", "unidad"}
    assert {name for name, method in METHODS.items() if not method.trains_null} == {"conditional", "guided", "encoder"}
    for method in METHODS.values():
        assert method.summary
        assert "\n" not in method.summary
        assert method.source


def test_two_methods_cannot_share_a_name() -> None:
    class Other(ConditionalOnly):
        name = "dash"

    with pytest.raises(ValueError, match="two methods are called 'dash'"):
        register(Other)
    assert register(Dash) is Dash


def test_defaults_are_the_papers() -> None:
    assert DashOptions().model_dump() == {
        "curriculum": "transfer", "lambda_im": 1.0, "lambda_un": 1.0, "lambda_an": 0.1, "cond_dropout": 0.0,
    }  # fmt: skip
    supervised: Any = METHODS["supervised"].options_class()
    assert (supervised.label_dropout, supervised.dropout_unit) == (0.1, "sample")
    assert supervised.curriculum == CurriculumOptions()


def test_a_student_without_named_stages_cannot_be_hinted() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return x_t * self.scale

    teacher = tiny_denoiser((8, 8), 1)
    student = Denoiser(Flat(), teacher.schedule, 3, (1, 8, 8))
    curriculum = Curriculum(teacher.schedule).freeze()
    with pytest.raises(InputError, match=r"method\.stages: 'mid'"):
        FitNets(Setting(student, teacher, curriculum), FitNets.options_class())
