"""The conformance checks hold for our methods, and every rule catches a method, or a denoiser, that breaks it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_methods import (
    DividesByT,
    DrawsItself,
    FavoursTheFirst,
    ForgetsGuidance,
    HoldsModule,
    HoldsTensor,
    IdleRole,
    LeavesHook,
    MovesTheTeacher,
    NeverAsks,
    NoAverage,
    NormalisesByTheBatch,
    PhaseOfAnotherRole,
    Plain,
    ReachesTheTeacher,
    Remembers,
    RoleOfNoPhase,
    ThawsTheOther,
    TrainsModeTeacher,
    TwoPhases,
    VectorTotal,
    WrongCopyValue,
)
from tiny import TINY

from diffstill.checks import check_method, losses, run_check, training
from diffstill.checks.bench import Bench, tiny_denoiser
from diffstill.checks.report import Broken, NotApplicable, Report, run_checks
from diffstill.checks.targets import find_method
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.methods import METHODS
from diffstill.methods.dash import Dash
from diffstill.models.folder import save_model
from diffstill.models.lineage import Lineage

OWN_METHOD = Path(__file__).parents[1] / "docs" / "own-method.md"


BROKEN: list[tuple[type[Plain], Callable[[Bench], str], str]] = [
    (ReachesTheTeacher, losses.gradients, "teacher received a gradient"),
    (IdleRole, losses.gradients, "role head received no gradient"),
    (VectorTotal, losses.gradients, "no scalar"),
    (ForgetsGuidance, losses.null_branch, "guidance is not trained"),
    (HoldsTensor, losses.modules, "self.weights is a tensor"),
    (HoldsModule, losses.modules, "self.helper is neither"),
    (WrongCopyValue, losses.copy_of_teacher, "imitation is .*, not 0"),
    (DividesByT, losses.finite, re.escape("t = [0]")),
    (DrawsItself, losses.deterministic, "draw with batch.uniform"),
    (FavoursTheFirst, losses.order, "shuffled"),
    (NormalisesByTheBatch, losses.halves, "mean over its halves"),
    (RoleOfNoPhase, losses.phases, r"the phases train \['student'\], and the roles are \['head', 'student'\]"),
    (PhaseOfAnotherRole, losses.phases, "phase both did not reach role student"),
    (ThawsTheOther, losses.phases, "phase student reached role head"),
    (LeavesHook, losses.hooks, "a hook is left on student"),
    (Plain, losses.options, "decorate the class with @register"),
    (MovesTheTeacher, training.teacher_unchanged, "of the teacher has changed"),
    (TrainsModeTeacher, training.teacher_unchanged, "ran in train mode"),
    (NeverAsks, training.teacher_unchanged, "was never called"),
    (Remembers, training.resume, "differs? "),
]


@pytest.mark.parametrize(("method", "rule", "says"), BROKEN, ids=[f"{m.__name__}" for m, _, _ in BROKEN])
def test_each_rule_catches_the_method_that_breaks_it(
    method: type[Plain], rule: Callable[[Bench], str], says: str
) -> None:
    with pytest.raises(Broken, match=says):
        rule(Bench(method))


def test_a_student_without_an_average_is_a_broken_rule_not_a_traceback() -> None:
    report = run_checks("x", [("ema", lambda: training.ema(Bench(NoAverage)))])
    assert not report.ok
    assert report["ema"].detail.startswith("raised KeyError")


@pytest.mark.parametrize("rule", sorted({rule for _, rule, _ in BROKEN} - {losses.options}, key=lambda r: r.__name__))
def test_the_sound_one_breaks_none_of_them(rule: Callable[[Bench], str]) -> None:
    try:
        rule(Bench(TwoPhases if rule is losses.phases else Plain))
    except NotApplicable:
        assert rule is losses.copy_of_teacher


@pytest.mark.parametrize(
    "name", ["conditional", "dash", "encoder", "fitnets", "guided", "progressive", "sfddm", "supervised", "unidad"]
)
def test_our_methods_conform(name: str) -> None:
    report = check_method(name, quick=True)
    assert report.ok, str(report)
    assert report["resume with dropout"].detail.endswith("bit-identical")


def test_a_copy_told_the_teachers_timesteps_is_the_teacher_and_one_told_its_own_steps_is_not() -> None:
    told = losses.copy_of_teacher(Bench(METHODS["sfddm"], {"time_index": "teacher"}))
    assert told == "output = 0, null = 0, feature = 0, null_feature = 0"
    with pytest.raises(NotApplicable):
        losses.copy_of_teacher(Bench(METHODS["sfddm"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_conforms_wholly(name: str) -> None:
    report = check_method(name)
    assert report.ok, str(report)
    assert not report["two processes"].skipped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dash", {"curriculum": "learn"}),
        ("dash", {"lambda_un": 0.0}),
        ("dash", {"cond_dropout": 0.3}),
        ("composite", {"scale": 1.0, "scale_to": 4.0}),
        ("gap", {"lambda_an": 0.1}),
        ("supervised", {"dropout_unit": "batch", "label_dropout": 0.5}),
        ("supervised", {"curriculum": {"rule": "uncertainty"}}),
        ("supervised", {"curriculum": {"rule": "min_snr", "snr_form": "eps"}}),
    ],
)
def test_variants_conform_for_every_prediction_type(kind: Any, name: str, options: dict[str, Any]) -> None:
    teacher = tiny_denoiser((8, 16), 1)
    teacher.prediction_type = kind
    report = check_method(name, options, teacher=teacher, quick=True)
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dmd_weight": 0.0, "target_teacher": "none"},
        {"target_weight": 1.0},
        {"guidance": 2.0},
        {"gan": "wgan", "r1": 0.1},
        {"steps": 2, "gradient": "random", "taps": "last", "head": "conv", "student_every": 2},
        {"gan_share": 0.5, "calibration": 2, "calibrate": "always", "student_every": 1},
    ],
)
def test_settings_of_unidad_conform_wholly(options: dict[str, Any]) -> None:
    report = check_method("unidad", options)
    assert report.ok, str(report)
    assert not report["two processes"].skipped


@pytest.mark.slow
def test_a_role_that_each_process_trains_alone_is_found(tmp_path: Path) -> None:
    """Its share in the loss is too small to show there."""
    file = tmp_path / "alone.py"
    file.write_text(ALONE)
    with pytest.raises(Broken, match=r"^heads: the weights of one and 2 processes are .* of their way apart"):
        training.two_processes(Bench(find_method(f"{file}:Alone")))


ALONE = """
from diffstill.methods.unidad import UniDad

class Alone(UniDad):
    name = "alone"

    def replace_role(self, name, wrapped):
        if name != "heads":
            super().replace_role(name, wrapped)
"""


def test_own_networks_are_copied_and_left_alone() -> None:
    teacher, student = tiny_denoiser((16, 16), 4), tiny_denoiser((8, 8), 5)
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    bench = Bench(Dash, None, teacher, student)
    training.teacher_unchanged(bench)
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())
    assert next(teacher.network.parameters()).requires_grad
    with pytest.raises(NotApplicable, match="your own"):
        training.two_processes(bench)


def test_networks_and_options_that_do_not_fit_are_bad_input() -> None:
    other = tiny_denoiser((8, 8), 0)
    other.schedule = NoiseSchedule.create("linear", 1000)
    with pytest.raises(InputError, match=r"schedule: .*use the teacher's cosine"):
        check_method("dash", teacher=tiny_denoiser((8, 8), 0), student=other)
    with pytest.raises(InputError, match=r"options\.lambda_im: -1 .*greater than or equal to 0"):
        check_method("dash", {"lambda_im": -1})
    with pytest.raises(InputError, match=r"options\.nonsense: 1 .*dash knows .*lambda_un"):
        check_method("dash", {"nonsense": 1})


# Targets and reports


@pytest.fixture
def _methods_restored() -> Iterator[None]:
    before, loaded = dict(METHODS), set(sys.modules)
    yield
    METHODS.clear()
    METHODS.update(before)
    for name in set(sys.modules) - loaded:
        if name.startswith("diffstill_user_"):
            del sys.modules[name]


def test_unknown_targets_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import math\nfrom diffstill.methods import Method\nclass Mine(Method):\n    name = 'mine'\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    for target, says in {
        "dahs": r"did you mean dash\?",
        f"{tmp_path}/absent.py:Mine": "absent.py' does not exist",
        f"{file}:Yours": "has no class 'Yours'; the file has Mine",
        f"{file}:math": "has no class 'math'",
        f"{file}": "name the class, too: .*mine.py:Mine",
        f"{broken}:Mine": "ModuleNotFoundError: No module named 'no_such_module'",
        f"{tmp_path}/no/model": "does not exist",
        f"{tmp_path}": "model_index.json",
    }.items():
        with pytest.raises(InputError, match=says) as caught:
            run_check(target, quick=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("guided", [True, False])
def test_a_model_folder_is_checked_as_it_would_be_sampled(tmp_path: Path, guided: bool) -> None:
    lineage = Lineage(name="tiny", method="dash", created="2000-01-01T00:00:00Z")
    save_model(tiny_denoiser((8, 8), 0), tmp_path / "model", lineage=lineage, class_names=list("abc"), guided=guided)
    report = run_check(str(tmp_path / "model"))
    assert report.ok, str(report)
    assert report.target == "denoiser UNet2DModel"
    assert report["null label"].skipped is not guided


def test_a_report_is_readable_by_people_and_machines() -> None:
    def breaks() -> str:
        raise Broken("off by 3")

    def skips() -> str:
        raise NotApplicable("no compiler")

    def bug() -> str:
        raise ZeroDivisionError("division\nby zero")

    report = run_checks("method x", [("a", lambda: "fine"), ("b", breaks), ("c", skips), ("d", bug)])
    assert not report.ok
    assert [o.ok for o in report.outcomes] == [True, False, True, False]
    assert report["d"].detail == "raised ZeroDivisionError: division by zero"
    again = json.loads(report.model_dump_json())
    assert again["ok"] is False
    assert {k: again["outcomes"][1][k] for k in ("name", "ok", "detail")} == {
        "name": "b",
        "ok": False,
        "detail": "off by 3",
    }
    lines = str(report).splitlines()
    assert lines[0] == "method x does not conform: 1 rules hold, 2 broken, 1 skipped"
    assert lines[2].split() == ["FAIL", "b", "off", "by", "3"]
    assert Report.model_validate({"target": "x", "outcomes": []}).ok


# The worked example of docs/own-method.md


def example(folder: Path) -> Path:
    """The page's method and recipe, written where a reader would."""
    text = OWN_METHOD.read_text(encoding="utf-8")
    for name, language in (("huber.py", "python"), ("huber.yaml", "yml")):
        (body,) = re.findall(rf"^```{language}\n(# {re.escape(name)}\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
        (folder / name).write_text(body, encoding="utf-8")
    return folder / "huber.py"


@pytest.mark.usefixtures("_methods_restored")
def test_the_documented_example_conforms(tmp_path: Path) -> None:
    report = run_check(f"{example(tmp_path)}:Huber", quick=True)
    assert report.ok, str(report)
    assert not any(outcome.skipped for outcome in report.outcomes)
    shown = OWN_METHOD.read_text(encoding="utf-8")
    for outcome in report.outcomes:
        assert f"`{outcome.name}`" in shown, f"own-method.md does not explain {outcome.name}"


@pytest.mark.slow
def test_the_documented_example_trains_from_its_recipe(tmp_path: Path) -> None:
    command = [sys.executable, str(example(tmp_path)), "distill", str(tmp_path / "huber.yaml"), *TINY]
    done = subprocess.run([*command, "--quiet", "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "receipt.json").read_text())["training"][-1]["method"] == "huber"
    assert (tmp_path / "run" / "model" / "model_index.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_methods_restored")
def test_the_documented_example_is_the_same_on_two_processes(tmp_path: Path) -> None:
    assert "losses within" in training.two_processes(Bench(find_method(f"{example(tmp_path)}:Huber")))


@pytest.mark.parametrize(
    "body",
    [
        "    pass",
        "    name = 'mine'\n    options_class = dict",
        "    def __init__(self, *given):\n        raise RuntimeError('no')",
    ],
)
def test_a_class_that_cannot_be_built_is_its_authors(tmp_path: Path, body: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from diffstill.methods import Method\nclass Mine(Method):\n{body}\n")
    with pytest.raises(InputError, match=r"^method: 'Mine' cannot be built; \w+Error: ") as caught:
        run_check(f"{file}:Mine", quick=True)
    assert "\n" not in str(caught.value)
