"""A student by how many times smaller it is: the largest that fits, and one that can inherit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from students import TEACHER, small
from worlds import uneven_world

from diffstill.analytic import analytic_denoiser
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.evaluation.cost import count_parameters
from diffstill.jobs.build import build_student
from diffstill.models.adapters import unet2d
from diffstill.models.denoiser import Denoiser
from diffstill.models.students import inherit, student_for_ratio
from diffstill.recipe import MethodSpec, NetworkSpec


@settings(max_examples=15, deadline=None)
@given(ratio=st.floats(1, 60))
def test_a_proposed_student_is_small_enough_and_can_inherit(ratio: float) -> None:
    teacher = small(layers_per_block=2)
    options = student_for_ratio(teacher.config, ratio)
    student = unet2d.build(sample_shape=(1, 8, 8), num_classes=3, **options)
    assert student.num_parameters() <= teacher.num_parameters() / ratio
    inherit(teacher, student)


def test_the_papers_student_is_proposed_for_its_ratio() -> None:
    with torch.device("meta"):
        teacher = unet2d.build(sample_shape=(3, 32, 32), num_classes=10, **TEACHER)
    options = student_for_ratio(teacher.config, 5.87)
    assert (options["block_out_channels"], options["layers_per_block"]) == ([64, 128, 128, 128], 1)
    assert student_for_ratio(teacher.config, 1)["block_out_channels"] == [128, 256, 256, 256]


@pytest.mark.parametrize("init", ["fresh", "inherit", "magnitude"])
@pytest.mark.parametrize(("method", "takes_scale"), [("dash", False), ("guided", True)])
def test_a_recipe_may_say_the_ratio_alone(init: str, method: str, takes_scale: bool) -> None:
    teacher = Denoiser(small(layers_per_block=2), NoiseSchedule.create("cosine", 100), 3, (1, 8, 8), "v_prediction")
    spec = NetworkSpec.model_validate({"family": "teacher", "ratio": 4, "init": init})
    made = build_student(spec, MethodSpec(name=method), teacher.freeze(), seed=0)
    ratio = count_parameters(teacher.network) / count_parameters(made.network)
    assert 4 * 0.95 <= ratio < 6
    assert made.takes_scale == takes_scale
    assert all(p.requires_grad for p in made.network.parameters())
    assert NetworkSpec.model_validate(spec.model_dump()) == spec


def test_a_ratio_that_cannot_be_is_refused_in_one_line() -> None:
    teacher = Denoiser(small(), NoiseSchedule.create("cosine", 100), 3, (1, 8, 8)).freeze()
    spec = NetworkSpec.model_validate({"family": "teacher", "ratio": 1e6})
    with pytest.raises(InputError, match=r"^student\.ratio: 1000000\.0 .*give at most"):
        build_student(spec, MethodSpec(name="dash"), teacher, seed=0)
    exact = analytic_denoiser(uneven_world(), NoiseSchedule.create("cosine", 100))
    with pytest.raises(InputError, match=r"^student\.ratio: .* needs a teacher that is a UNet2DModel; leave it out"):
        build_student(spec, MethodSpec(name="dash"), exact, seed=0)
    for wrong in ("six", True, [6]):
        with pytest.raises(ValidationError, match=r"ratio: .*give a number"):
            NetworkSpec.model_validate({"family": "teacher", "ratio": wrong})
    with pytest.raises(ValidationError, match=r"unknown key 'ratio'"):
        NetworkSpec.model_validate({"family": "unet2d", "ratio": 6, "block_out_channels": [8]})


@pytest.mark.parametrize(
    ("ratio", "mend"), [(0.5, "give a number of at least 1"), (float("nan"), "give a number"), (1e6, "give at most")]
)
def test_an_impossible_ratio_is_refused(ratio: float, mend: str) -> None:
    with pytest.raises(InputError, match=f"^ratio: .*{mend}") as caught:
        student_for_ratio(small().config, ratio)
    assert "\n" not in str(caught.value)
