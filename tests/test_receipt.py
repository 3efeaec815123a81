"""Receipts: what is written can be read back, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import fabricated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffstill import __version__
from diffstill.errors import InputError, RunFailed
from diffstill.evaluation.results import Estimate
from diffstill.report import receipt as room
from diffstill.report.receipt import Receipt, environment, schema_text

PUBLISHED = Path(__file__).parents[1] / "docs" / "receipt.schema.json"


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    return fabricated.receipt(tmp_path_factory.mktemp("run"))


def test_published_schema_is_the_generated_one() -> None:
    mend = "run: python -m diffstill.report.receipt > docs/receipt.schema.json"
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), mend


def test_the_module_prints_the_schema() -> None:
    command = [sys.executable, "-m", "diffstill.report.receipt"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == schema_text()


def test_round_trip(receipt: Receipt, tmp_path: Path) -> None:
    path = receipt.save(tmp_path / "new" / "receipt.json")
    again = Receipt.load(path)
    assert again == receipt
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert Receipt.load(path.parent) == receipt, "a run folder is as good as its receipt"
    assert [file.name for file in path.parent.iterdir()] == ["receipt.json"], "nothing half-written lies beside"


def test_json_does_not_depend_on_insertion_order(receipt: Receipt) -> None:
    turned = receipt.model_copy(deep=True)
    turned.models = dict(reversed(turned.models.items()))
    turned.recipe = dict(reversed(turned.recipe.items()))
    assert turned.to_json() == receipt.to_json()


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_json_is_finite(value: float) -> None:
    made = Receipt(
        kind="train", name="x", seed=0, environment=fabricated.environment(), data=fabricated.data(),
        recipe={"lr": value}, protocol=fabricated.protocol(floor=Estimate(value=value)),
    )  # fmt: skip

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(made.to_json(), parse_constant=refuse)
    expected = value if math.isfinite(value) else None
    assert content["recipe"]["lr"] == content["protocol"]["floor"]["value"] == expected


def test_a_receipt_that_could_not_be_read_back_is_not_written(receipt: Receipt, tmp_path: Path) -> None:
    path = receipt.save(tmp_path / "receipt.json")
    before = path.read_bytes()
    broken = receipt.model_copy(deep=True)
    assert broken.models["student"].fidelity is not None
    broken.models["student"].fidelity.teacher_gap_rms = math.nan
    with pytest.raises(RunFailed, match=r"models\.student\.fidelity\.teacher_gap_rms") as caught:
        broken.save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def _edited(receipt: Receipt, **changes: object) -> str:
    return json.dumps(json.loads(receipt.to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda r: "", "is not JSON"),
        (lambda r: r.to_json()[:-40], "is not JSON"),
        (lambda r: "[1, 2]", "has schema_id None"),
        (lambda r: '{"loss": 1}', "has schema_id None"),
        (lambda r: _edited(r, schema_id="diffstill-receipt/2"), "'diffstill-receipt/2', not 'diffstill-receipt/1'"),
        (lambda r: _edited(r, seed="many"), "seed: "),
        (lambda r: _edited(r, colour="red"), "colour: Extra inputs"),
        (lambda r: _edited(r, models={"student": {}}), "models.student.name: Field required"),
    ],
)
def test_foreign_and_broken_files_are_refused_in_one_line(receipt: Receipt, tmp_path: Path, text, said) -> None:
    path = tmp_path / "receipt.json"
    path.write_text(text(receipt), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        Receipt.load(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert "written by diffstill" in message
    assert "\n" not in message


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Receipt.load(tmp_path / "none" / "receipt.json")
    with pytest.raises(InputError, match=r"receipt\.json' cannot be read"):
        Receipt.load(tmp_path)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        Receipt(kind="train", name="x", seed=0, environment=fabricated.environment(), data=fabricated.data(), loss=1)  # type: ignore[call-arg]


def test_subject(receipt: Receipt) -> None:
    teacher, student = receipt.models["teacher"], receipt.models["student"]

    def subject(**models: object) -> object:
        return Receipt.model_validate(receipt.model_dump() | {"models": models}).subject

    assert subject(student=student, teacher=teacher) == ("student", student)
    assert subject(teacher=teacher) == ("teacher", teacher)
    assert subject(stage2=student, teacher=teacher, stage1=student) == ("stage2", student)
    assert subject(zebra=teacher, student=student) == ("student", student)
    assert subject() is None
    models = {"first": teacher, "stage": student, "then": student, "first@8": teacher}
    chain = receipt.model_dump() | {"kind": "chain", "models": models}
    assert Receipt.model_validate(chain).subject == ("then", student), "the last stage"
    asked = Receipt.model_validate(chain | {"recipe": {"result": "stage"}})
    assert asked.subject == ("stage", student)
    assert Receipt.model_validate(chain | {"recipe": {"result": None}}).subject == ("then", student)


def test_environment_is_this_one() -> None:
    here = environment("cpu")
    assert here.torch == torch.__version__
    assert here.device == "cpu"
    assert here.cores >= 1
    made = Receipt(kind="eval", name="x", seed=0, environment=here, data=fabricated.data())
    assert made.version == __version__
    assert made.created.endswith("Z")


def test_commit_is_that_of_our_own_checkout_only(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([*git, "tag", "-am", "v1", "v1"], check=True)
    assert room._git_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert room._git_commit(tmp_path) == f"{head}-dirty"
    inside = tmp_path / "venv"
    inside.mkdir()
    assert room._git_commit(inside) is None, "an installed package must not report the repository around it"
