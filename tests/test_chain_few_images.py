"""Chains of few-shot adaptation: stages with data of their own, roles that start from earlier stages, and the rows of
doing nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffstill.cli import main
from diffstill.models.denoiser import identity
from diffstill.models.folder import load_model
from diffstill.models.lineage import weights_sha256
from diffstill.report.receipt import Receipt

FAST = {"training.images": 64, "training.batch_size": 16, "training.log_every": 1, "training.warmup_images": 0}
NET = {"network.block_out_channels": [8, 16], "network.norm_num_groups": 4, "network.attention_levels": []}
SOURCE = {"source": "digits", "classes": ["-9"], "unlabelled": True, "limit": 200}
FROZEN = {"method.target_teacher": "frozen", "method.steps": 2}


def tree(roles: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": "chain",
        "name": "tiny-few",
        "data": {"source": "digits", "classes": ["9"], "unlabelled": True, "shots": 3},
        "stages": {
            "source": {"recipe": "digits-source", "data": SOURCE, "overrides": {**FAST, **NET}},
            "tuned": {"recipe": "digits-finetune", "of": "source", "overrides": FAST},
            "adapted": {"recipe": "digits-unidad", "of": "source", "roles": roles, "overrides": {**FAST, **FROZEN}},
        },
        "evaluation": {"samples": 30, "pairs": 30, "steps": 3, "guidance": [1], "latency_batches": [1]},
    }


def run(folder: Path, made: dict[str, Any]) -> int:
    (folder / "few.yaml").write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    return main(["chain", str(folder / "few.yaml"), "--out", str(folder / "run"), "--quiet"])


def marks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for mark in sorted((folder / "run" / "stages").glob("*/stage.json")):
        told = json.loads(mark.read_text())
        found.setdefault(told["name"], []).append(told)
    return found


def test_stages_have_their_own_data_and_roles_and_doing_nothing_is_a_row(tmp_path: Path) -> None:
    assert run(tmp_path, tree({"target_teacher": "tuned"})) == 0
    first = {name: told[0] for name, told in marks(tmp_path).items()}
    data = {name: told["inputs"]["data"] for name, told in first.items()}
    assert data["source"] != data["tuned"] == data["adapted"]
    (tuned,) = (tmp_path / "run" / "stages").glob("tuned-????????/model")
    assert first["adapted"]["inputs"]["roles"] == {"target_teacher": identity(load_model(tuned).denoiser)}
    assert "roles" not in first["tuned"]["inputs"]
    models = Receipt.load(tmp_path / "run").models
    rows = ["source", "tuned", "adapted", "source@2-renoise", "tuned@2-renoise"]
    assert list(models) == rows
    assert [models[name].steps for name in rows] == [3, 3, 2, 2, 2]
    folders = {f.name.rsplit("-", 1)[0]: f for f in (tmp_path / "run" / "stages").glob("*-????????") if f.is_dir()}
    held = {name: weights_sha256(load_model(folder / "model").denoiser.network) for name, folder in folders.items()}
    assert models["source@2-renoise"].sha256 == held["source"], "its network, in the student's steps"
    assert models["tuned@2-renoise"].sha256 == held["tuned"]
    # Another start of a role is another stage; the others are found again.
    assert run(tmp_path, tree({"target_teacher": "source"})) == 0
    assert {name: len(told) for name, told in marks(tmp_path).items()} == {"source": 1, "tuned": 1, "adapted": 2}


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({"judge": "tuned"}, "roles.judge: no role that may start from a model of its own; one of student, critic"),
        ({"target_teacher": "nowhere"}, "stages.adapted: roles.target_teacher: "),
        ({}, "method.target_teacher: 'frozen' has no model"),
    ],
)
def test_roles_that_do_not_fit_are_refused_before_anything_is_written(
    roles: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tree(roles)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
