"""``diffstill arena`` as a user types it: arms beside each other, equal seconds, what a dry run counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TINY

from diffstill.cli import main
from diffstill.jobs.arena import images_for_equal_seconds


def test_arena_pairs_the_arms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def longer(seconds: dict[str, float], *_: object) -> dict[str, int]:
        return {"conditional": 320} if "dash" in seconds else {}

    monkeypatch.setattr("diffstill.jobs.arena.images_for_equal_seconds", longer)
    command = ["arena", "digits-dash", *TINY, "--methods", "dash,conditional", "--seeds", "2", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "a"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in result["arms"]] == ["dash", "conditional"]
    for arm in result["arms"]:
        more = 320 if arm["name"] == "conditional" else 256
        ran = [(seed["seed"], seed["budget"], seed["images_seen"]) for seed in arm["seeds"]]
        assert ran == [(k, *of) for k in (0, 1) for of in (("equal_steps", 256), ("equal_seconds", more))]
        different = {seed["evaluation"]["sha256"] for seed in arm["seeds"]}
        assert len(different) == (4 if arm["name"] == "conditional" else 2), "dash alone is not trained again"
    assert (tmp_path / "a" / "report.html").exists()
    # The conditional arm alone trains to the very same student as beside dash: arms do not disturb each other.
    single = ["arena", "digits-dash", *TINY, "--methods", "conditional", "--seeds", "1", "--quiet", "--json"]
    assert main([*single, "--out", str(tmp_path / "b")]) == 0
    alone = json.loads(capsys.readouterr().out)
    a, b = result["arms"][1]["seeds"][0]["evaluation"], alone["arms"][0]["seeds"][0]["evaluation"]
    assert a["sweep"][0]["fd"]["value"] == pytest.approx(b["sweep"][0]["fd"]["value"], rel=1e-3)
    # An evaluation whose file was cut off is done again.
    kept = tmp_path / "b" / "evaluations" / "seed-0-conditional.json"
    kept.write_text(kept.read_text()[:100])
    # The recipe that lies in the folder names the arms that were trained.
    own = ["arena", str(tmp_path / "b" / "recipe.yaml"), "--seeds", "1", "--quiet", "--json"]
    assert main([*own, "--out", str(tmp_path / "b")]) == 0
    again = json.loads(capsys.readouterr().out)["arms"][0]["seeds"][0]["evaluation"]
    assert again["sweep"] == b["sweep"]


def test_generators_of_few_steps_are_arms_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured in all of their steps, whatever the protocol's number; in any order, no arm changes another."""
    weights = []
    for order in ("dash,unidad", "unidad,dash"):
        command = ["arena", "digits-dash", *TINY, "arena.equal_seconds=false", "--methods", order, "--seeds", "1"]
        assert main([*command, "--quiet", "--json", "--out", str(tmp_path / order)]) == 0
        arms = {arm["name"]: arm["seeds"][0]["evaluation"] for arm in json.loads(capsys.readouterr().out)["arms"]}
        assert (arms["dash"]["steps"], arms["unidad"]["steps"]) == (4, 3)
        weights.append({name: arm["sha256"] for name, arm in arms.items()})
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["training.teacher_reuse=2", "--methods", "unidad"], "training.teacher_reuse: 2 would only repeat batches"),
        (["evaluation.guidance=[1, 9]", "--methods", "guided"], "evaluation.guidance: '9' leaves the scales"),
    ],
)
def test_an_arm_refuses_what_the_main_student_would(
    extra: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = ["teacher.overrides={prediction_type: v_prediction, method.curriculum.snr_form: v}"]
    command = ["arena", "digits-dash", *TINY, *guided, "student={family: teacher}", *extra, "--seeds", "1"]
    assert main([*command, "--quiet", "--out", str(tmp_path / "a")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_equal_seconds_gives_cheap_arms_more_images_and_dear_ones_none() -> None:
    seconds = {"dash": 90.0, "scratch": 30.0, "near": 82.0, "dear": 120.0, "odd": 43.0}
    images = dict.fromkeys([*seconds, "failed"], 6400)
    assert images_for_equal_seconds(seconds, images, "dash", 64) == {"scratch": 19200, "odd": 209 * 64}
    assert images_for_equal_seconds(seconds, images, "failed", 64) == {}, "a reference that diverged sets no budget"


def test_dry_run_of_an_arena_counts_its_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for seeds in ("1", "3"):
        assert (
            main(["arena", "digits-dash", *TINY, "--methods", "dash,conditional", "--seeds", seeds, "--dry-run"]) == 0
        )
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert "every arm from" not in told[0]
    assert told[1].endswith("of training, every arm from 3 seeds; evaluation comes on top")
