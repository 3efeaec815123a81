"""The recipes that travel with the package: they parse, build the published networks, and plan on local data."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffstill.checks.bench import tiny_denoiser
from diffstill.engine.runtime import Runtime
from diffstill.errors import InputError
from diffstill.evaluation.cost import count_flops
from diffstill.jobs.build import Teacher, build_arm, build_denoiser, build_network
from diffstill.jobs.distill import teacher_recipe
from diffstill.jobs.plan import plan
from diffstill.methods import METHODS, Setting
from diffstill.methods.supervised import Supervised
from diffstill.models.adapters import FAMILIES, unwrap
from diffstill.recipe import (
    AS_TEACHER,
    ArmSpec,
    DistillRecipe,
    MethodSpec,
    NetworkSpec,
    TrainRecipe,
    builtin_recipes,
    load_recipe,
    resolved,
    to_yaml,
)
from diffstill.recipe.named import NETWORKS
from diffstill.yaml_text import read_yaml, write_yaml

NAMES = sorted(builtin_recipes())
IMAGES = {
    "dash-cifar100": ((3, 32, 32), 100),
    "dash-cifar10": ((3, 32, 32), 10),
    "cifar10-small": ((3, 16, 16), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "digits": ((1, 8, 8), 10),
}
"""Shape and classes by the beginning of a recipe's name; longer beginnings first."""


def images_of(name: str) -> tuple[tuple[int, int, int], int]:
    return next(form for start, form in IMAGES.items() if name.startswith(start))


@cache
def parameters(name: str) -> int:
    shape, classes = images_of(name)
    network = build_network(load_recipe(name).subject, shape, classes, seed=0)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_parses_and_is_called_as_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert "extends" not in resolved(recipe)
    own = yaml.safe_load(builtin_recipes()[name])
    assert own["description"] == recipe.description, "a description must not be inherited"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_stores_parses_to_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    stored = tmp_path / "recipe.yaml"
    stored.write_text(to_yaml(recipe), encoding="utf-8")
    assert resolved(load_recipe(str(stored))) == resolved(recipe)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_run_stores_tells_every_option_of_its_method(name: str) -> None:
    """Those left to their defaults, too: a later release may have others."""
    tree: dict[str, Any] = {"name": name, "steps": 2} if name == "unidad" else {"name": name}
    stored = MethodSpec.model_validate(tree).model_dump(mode="json")
    assert stored.keys() == {"name", *METHODS[name].options_class.model_fields}
    assert MethodSpec.model_validate(stored).build_options() == MethodSpec.model_validate(tree).build_options()


@pytest.mark.parametrize("key", ["layers_per_block", "norm_num_groups", "attention_head_dim"])
def test_sizes_under_one_are_refused_before_a_network_is_built(key: str) -> None:
    for value in (0, -8):
        with pytest.raises(InputError, match=rf"^network\.{key}: {value} is not usable; use 1 or more"):
            load_recipe("digits-teacher", [f"network.{key}={value}"])
    with pytest.raises(InputError, match=r"^network\.block_out_channels: .*use 1 or more"):
        load_recipe("digits-teacher", ["network.block_out_channels=[0, 8]"])
    with pytest.raises(InputError, match=r"^evaluation\.latency_batches: .*use 1 or more"):
        load_recipe("digits-teacher", ["evaluation.latency_batches=[0]"])
    with pytest.raises(InputError, match=r"^training\.checkpoint_minutes: .*finite"):
        load_recipe("digits-teacher", ["training.checkpoint_minutes=.inf"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_stores_tells_every_option_of_its_network(family: str) -> None:
    stored = NetworkSpec.model_validate({"family": family, "dropout": 0.25}).model_dump(mode="json")
    assert stored.keys() == {"family", "init", *NETWORKS[family]}
    assert stored["dropout"] == 0.25
    assert NetworkSpec.model_validate({"family": AS_TEACHER}).model_dump() == {"family": AS_TEACHER, "init": None}


def test_an_arm_of_another_family_takes_no_options_of_the_recipes() -> None:
    recipe = load_recipe("digits-dash")
    assert isinstance(recipe, DistillRecipe)
    teacher = Teacher(tiny_denoiser((16, 32), 0), None, None, None)
    options = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    spec = ArmSpec.model_validate(
        {"method": {"name": "dash", "curriculum": "none"}, "student": {"family": "dit", **options}}
    )
    made = build_arm(recipe, spec, teacher, 0)
    assert type(unwrap(made.student.network)).__name__ == "DiTTransformer2DModel"


@pytest.mark.parametrize(
    ("method", "live"),
    [
        ({"name": "dash"}, True),
        ({"name": "composite"}, True),
        ({"name": "gap"}, True),
        ({"name": "guided", "weighting": "snr"}, True),
        ({"name": "conditional"}, False),
        ({"name": "supervised"}, False),
        ({"name": "dash", "lambda_un": 0}, False),
    ],
)
def test_an_arm_that_learns_from_the_null_branch_needs_a_live_one(method: dict[str, Any], live: bool) -> None:
    """Of a teacher with one scale baked in."""
    recipe = load_recipe("digits-dash")
    assert isinstance(recipe, DistillRecipe)
    options = {} if method["name"] in ("guided", "supervised") else {"curriculum": "none"}
    spec = ArmSpec.model_validate({"method": method | options, "student": {"family": "teacher"}})
    teacher = Teacher(tiny_denoiser((16, 32), 0), None, None, None)
    build_arm(recipe, spec, teacher, 0)
    dead = dataclasses.replace(teacher, guided=False)
    if not live:
        build_arm(recipe, spec, dead, 0)
        return
    with pytest.raises(InputError, match=r"^teacher: 'teacher' has no live null branch to learn from"):
        build_arm(recipe, spec, dead, 0)


OF_OUR_TEACHERS = [n for n in NAMES if isinstance(r := load_recipe(n), DistillRecipe) and r.teacher.pipeline is None]


@pytest.mark.parametrize("name", OF_OUR_TEACHERS)
def test_the_teacher_exists_and_shares_the_data(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, DistillRecipe)
    teacher = teacher_recipe(recipe)  # refuses other data
    assert isinstance(teacher, TrainRecipe)
    if recipe.student.family == AS_TEACHER:
        return
    ratio = parameters(teacher.name) / parameters(name)
    assert ratio == 1 if recipe.respace else 5.7 <= ratio <= 6.4


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dash-cifar10-teacher", 35_751_939),
        ("dash-cifar10", 6_082_627),
        ("dash-cifar10-may", 6_082_627),
        ("dash-cifar100-teacher", 35_798_019),
        ("dash-cifar100", 6_105_667),
    ],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    assert parameters(name) == count


def test_published_lengths_and_rates() -> None:
    """391K and 234K iterations of 64 images: 500 and 300 epochs over all 50,000."""
    teacher, student, may = (load_recipe(f"dash-cifar10{end}") for end in ("-teacher", "", "-may"))
    assert (teacher.training.images, teacher.training.steps) == (500 * 50_000, 390_625)
    assert (student.training.images, student.training.steps) == (300 * 50_000, 234_375)
    assert (student.training.lr, student.training.ema_decay) == (1e-4, 0.999)
    assert (may.training.lr, may.training.ema_decay) == (2e-4, 0.9995)
    assert may.training.model_copy(update={"lr": 1e-4, "ema_decay": 0.999}) == student.training
    assert (teacher.training.lr, teacher.training.ema_decay, teacher.training.weight_decay) == (2e-4, 0.9999, 0.01)
    options = student.method.build_options().model_dump()
    assert {key: options[key] for key in ("lambda_im", "lambda_un", "lambda_an", "curriculum")} == {
        "lambda_im": 1.0, "lambda_un": 1.0, "lambda_an": 0.1, "curriculum": "transfer",
    }  # fmt: skip
    for recipe in (teacher, student):
        assert recipe.subject.options["dropout"] == 0.1
        assert recipe.subject.options["attention_head_dim"] is None
        assert (recipe.training.warmup_images, recipe.training.lr_min, recipe.training.grad_clip) == (0, 1e-6, 1.0)


@pytest.mark.parametrize(("name", "form"), [("dash-cifar10-teacher", "x0"), ("dash-cifar10-teacher-short", "eps")])
def test_base_weights_are_published_at_length_and_standard_in_short_runs(name: str, form: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, TrainRecipe)
    small = recipe.network.model_copy(update={"block_out_channels": [64], "attention_levels": []})
    denoiser = build_denoiser(small, (3, 8, 8), 10, recipe.schedule.build(), recipe.prediction_type, 0)
    curriculum = Supervised(Setting(denoiser), recipe.method.build_options()).curriculum
    assert curriculum.options.snr_form == form
    assert curriculum.options.gamma == 5
    weights = curriculum.weights().detach()
    # dash.md 2.3: min(snr, 5) leaves 6.65% of the weight to the noisier half, min(snr, 5) / snr 60.6%.
    noisy = float(weights[500:].sum() / weights.sum())
    assert noisy == pytest.approx(0.0665 if form == "x0" else 0.6064, abs=5e-4)


@pytest.mark.parametrize("name", ["dash-cifar10", "fashion-mnist"])
def test_plans_on_a_local_file(name: str, tmp_path: Path) -> None:
    """What ``--dry-run`` does, with a local file in the hub's place; nothing is fetched or written."""
    (channels, side, _), classes = images_of(name)
    draw = np.random.default_rng(0)
    labels = np.arange(4 * classes) % classes
    images = draw.integers(0, 256, (len(labels), side, side, channels), dtype=np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, images=images, labels=labels)
    source = f"npz:{file}"
    recipe = load_recipe(
        name,
        {
            "data.source": source,
            "teacher.overrides": {"data.source": source, "training.batch_size": 2},
            "training.batch_size": 2,
        },
    )
    planned = plan(recipe, Runtime("cpu"))
    assert isinstance(recipe, DistillRecipe)
    teacher, student = planned.forecasts.values()
    assert list(planned.forecasts) == [recipe.teacher.recipe, name]
    assert (teacher[0].parameters, student[0].parameters) == (parameters(str(recipe.teacher.recipe)), parameters(name))
    assert student[0].teacher_parameters == teacher[0].parameters
    # Two branches of the teacher, and two of the student forwards and backwards.
    assert student[0].flops_per_image == 2 * teacher[0].flops_forward + 6 * student[0].flops_forward
    assert f"{student[0].parameters:,}" in planned.as_text()
    assert list(tmp_path.iterdir()) == [file]


def test_published_arithmetic() -> None:
    """12.44 and 2.15 GFLOP a forward (2 x MAC), a ratio of 5.78 (published: 5.77)."""
    flops = []
    for name in ("dash-cifar10-teacher", "dash-cifar10"):
        schedule = TrainRecipe.model_fields["schedule"].default.build()
        flops.append(count_flops(build_denoiser(load_recipe(name).subject, (3, 32, 32), 10, schedule, "epsilon", 0)))
    assert flops[0] == pytest.approx(12.44e9, rel=1e-3)
    assert flops[1] == pytest.approx(2.15e9, rel=2e-3)
    assert flops[0] / flops[1] == pytest.approx(5.78, abs=0.01)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),  # version 1.1: 8
        ("08", 8),
        ("0o10", 8),
        ("0x1F", 31),
        ("+3", 3),
        ("1e-3", 0.001),  # 1.1: text
        ("-.5", -0.5),
        ("2.", 2.0),
        (".inf", math.inf),
        ("1:30", "1:30"),  # 1.1: 90
        ("no", "no"),  # 1.1: false
        ("2026-11-28", "2026-11-28"),  # 1.1: a date
        ("=", "="),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    for read in (read_yaml(text), read_yaml(f"[{text}, 1]")[0] if text else None, read_yaml(f"key: {text}")["key"]):
        assert read == value
        assert type(read) is type(value)


def test_a_leading_zero_does_not_make_a_seed_octal() -> None:
    assert load_recipe("digits-teacher", ["seed=010"]).seed == 10


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(),
    st.sampled_from(["no", "010", "1e3", "0o7", "1:30", "=", "<<", "null", "2026-11-28", "-.5", "1_0", ".inf", "~"]),
)  # fmt: skip


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6))
def test_what_is_written_as_yaml_is_read_back_as_it_was(value: Any) -> None:
    read = read_yaml(write_yaml(value))
    assert read == value
    assert repr(read) == repr(value)  # 1 == 1.0 == True
