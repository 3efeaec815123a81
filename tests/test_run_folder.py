"""Whose a run folder is, and what --fresh and an evaluation may take away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TINY

from diffstill.cli import main
from diffstill.errors import InputError
from diffstill.jobs.finish import check_out
from diffstill.jobs.folder import RunFolder
from diffstill.report.receipt import Receipt


def test_another_recipe_in_the_same_folder_is_refused_and_named(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["distill", "digits-dash", *TINY, "training.lr=3e-3", "--out", str(tiny_run), "--quiet"])
    error = capsys.readouterr().err
    assert code == 2
    assert "training.lr: 0.004 -> 0.003" in error
    assert error.count("\n") == 1
    assert (tiny_run / "receipt.json").exists()


def test_fresh_never_empties_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["distill", "digits-dash", *TINY, "--out", str(tmp_path), "--fresh", "--quiet"]) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "holds files that are no run" in capsys.readouterr().err


def test_fresh_keeps_what_no_run_made_and_what_the_recipe_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project with a recipe.yaml is no run; a run with other files in it, or with an input, is not emptied."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("kind: train\n")
    Path("thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"^out: '\.' holds files that are no run"):
            RunFolder(Path("."), {"seed": 1}, {}, fresh=fresh)
    run = Path("run")
    RunFolder(run, {"seed": 1}, {"data": "a"}).claim()
    (run / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"^out: 'run' holds files that no run made \(thesis\.txt\)"):
        RunFolder(run, {"seed": 1}, {}, fresh=True)
    (run / "thesis.txt").unlink()
    (run / "model").mkdir()
    for source in ("run/model", "folder:run/model", str(run.resolve() / "model")):
        with pytest.raises(InputError, match=r"holds .*run/model, which the recipe reads, and --fresh would lose it"):
            RunFolder(run, {"teacher": {"model": source}}, {}, fresh=True)
    assert (run / "model").is_dir()


def test_fresh_works_in_the_run_folder_itself_and_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    RunFolder(run, {"seed": 1}, {"data": "a"}).claim()
    (run / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    RunFolder(tmp_path / "link", {"seed": 2}, {"data": "a"}, fresh=True).claim()
    assert sorted(entry.name for entry in run.iterdir()) == ["inputs.json", "recipe.yaml"]
    monkeypatch.chdir(run)
    RunFolder(Path("."), {"seed": 3}, {"data": "a"}, fresh=True).claim()
    assert "seed: 3" in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize("mark", ["recipe.yaml", "checkpoints", "arena.json"])
def test_an_evaluation_writes_into_no_run_finished_or_not(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).touch()
    with pytest.raises(InputError, match=r"^out: .* holds a run, whose receipt would be lost"):
        check_out(tmp_path)
    with pytest.raises(InputError, match=r"^out: .* is a file; give a folder"):
        check_out(tmp_path / mark)


def test_a_model_of_fewer_steps_than_the_receipts_bins_has_a_receipt(tmp_path: Path, tiny_run: Path) -> None:
    few = [part for part in TINY if not part.startswith("teacher.overrides")]
    few += [f"teacher.model={tiny_run / 'teacher'}", "respace.steps=8", "evaluation.steps=8"]
    assert main(["distill", "digits-dash", *few, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    told = Receipt.load(tmp_path / "run" / "receipt.json").training[-1].curriculum
    assert len(told) == 8
    assert sum(told) / 8 == pytest.approx(1, abs=1e-3)


def test_fresh_empties_a_run_and_other_inputs_are_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"seed": 1}, {"data": "a"}).claim()
    (tmp_path / "log.jsonl").write_text("old")
    with pytest.raises(InputError, match=r"other data or another teacher \(data: a -> b\)"):
        RunFolder(tmp_path, {"seed": 1}, {"data": "b"})
    RunFolder(tmp_path, {"seed": 1}, {"data": "b"}, fresh=True).claim()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["inputs.json", "recipe.yaml"]
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"data": "b"}
