"""Whose a run folder is, and what --fresh and an evaluation may take away."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fabricated
import numpy as np
import pytest
import yaml
from pictures import class_folders
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
    for name in (".git", ".env", "seed-photos", "seed-list.txt", "notes.tmp", ".notes.12.tmp", ".thesis.writing"):
        (run / name).mkdir()
        with pytest.raises(InputError, match=f"holds files that no run made \\({re.escape(name)}\\)"):
            RunFolder(run, {"seed": 1}, {}, fresh=True)
        (run / name).rmdir()
    left = (".model.writing", ".model.replaced", ".receipt.json.812.tmp", "log.tmp", "seed-3", "seed-3-seconds")
    for name in left:
        (run / name).mkdir()
    RunFolder(run, {"seed": 1}, {"data": "a"}, fresh=True).claim()
    assert not any((run / name).exists() for name in left)
    (run / "model").mkdir()
    for source in ("run/model", "folder:run/model", str(run.resolve() / "model")):
        with pytest.raises(InputError, match=r"holds .*run/model, which the recipe reads, and --fresh would lose it"):
            RunFolder(run, {"teacher": {"model": source}}, {}, fresh=True)
    assert (run / "model").is_dir()


def test_where_the_inputs_lie_makes_no_other_run(tmp_path: Path) -> None:
    def recipe(root: str) -> dict[str, object]:
        data = {"source": f"npz:{root}/train.npz", "test": f"npz:{root}/test.npz", "size": 8}
        return {
            "data": data,
            "teacher": {"model": f"{root}/teacher", "recipe": f"{root}/it.yaml"},
            "roles": {"target": f"{root}/target"},
        }

    inputs = {"data": "a", "teacher": {"weights": "b"}, "roles": {"target": "c"}}
    RunFolder(tmp_path / "run", recipe("old"), inputs).claim()
    RunFolder(tmp_path / "run", recipe("/new"), inputs).claim()
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == recipe("/new")
    with pytest.raises(InputError, match=r"other data or another teacher \(data: a -> other\)"):
        RunFolder(tmp_path / "run", recipe("/new"), {**inputs, "data": "other"})
    other = recipe("/new") | {"data": {"source": "npz:/new/train.npz", "size": 16}}
    with pytest.raises(InputError, match=r"a different recipe \(data\.size: 8 -> 16\)"):
        RunFolder(tmp_path / "run", other, inputs)


def test_a_run_goes_on_when_its_data_has_moved(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is trained on data of its own, the student on others; both move."""
    class_folders(tmp_path / "old" / "own", {"cat": 30, "dog": 30}, side=8)
    class_folders(tmp_path / "old" / "few", {"cat": 20, "dog": 20}, side=8)
    (tmp_path / "teacher.yaml").write_text(
        f"extends: digits-teacher\ndata: {{source: 'folder:{tmp_path}/old/own', channels: 1}}\n"
    )
    words = [part for part in TINY if not part.startswith("data.")]
    words += [f"teacher.recipe={tmp_path / 'teacher.yaml'}", "teacher.data=own", "data.channels=1"]
    command = ["distill", "digits-dash", *words, "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*command, f"data.source=folder:{tmp_path}/old/few"]) == 0
    made = (tmp_path / "run" / "receipt.json").read_bytes()
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "teacher.yaml").write_text((tmp_path / "teacher.yaml").read_text().replace("/old/", "/new/"))
    assert main([*command, f"data.source=folder:{tmp_path}/new/few"]) == 0
    assert (tmp_path / "run" / "receipt.json").read_bytes() == made
    next((tmp_path / "new" / "own" / "cat").iterdir()).unlink()
    assert main([*command, f"data.source=folder:{tmp_path}/new/few"]) == 2
    assert "other data or another teacher (teacher.data: " in capsys.readouterr().err


def test_fresh_works_in_the_run_folder_itself_and_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    RunFolder(run, {"seed": 1}, {"data": "a"}).claim()
    (run / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    RunFolder(tmp_path / "link", {"seed": 2}, {"data": "a"}, fresh=True).claim()
    assert sorted(entry.name for entry in run.iterdir()) == [".lock", "inputs.json", "recipe.yaml"]
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


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    """The second is refused while the first lives, and not afterwards."""
    script = (
        "import sys; from pathlib import Path; from diffstill.jobs.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]), {'seed': 1}, {}); folder.claim(); print('claimed', flush=True); input()"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "claimed\n"
        for fresh in (False, True):
            with pytest.raises(InputError, match=r"^out: .* is in use by another process; wait for it, stop it, or"):
                RunFolder(tmp_path / "run", {"seed": 1}, {}, fresh=fresh).claim()
        assert (tmp_path / "run" / "recipe.yaml").exists()
        first.communicate("\n")
    RunFolder(tmp_path / "run", {"seed": 1}, {}).claim()


TRAIN = [
    "network.block_out_channels=[8, 8]", "network.norm_num_groups=4", "training.images=128", "training.batch_size=32",
    "training.warmup_images=0", "evaluation.samples=20", "evaluation.pairs=20", "evaluation.steps=2",
    "evaluation.guidance=1", "evaluation.latency_batches=1",
]  # fmt: skip


def test_what_a_training_warned_of_is_in_its_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unreadable images that were left out, and a checkpoint that was passed over."""
    class_folders(tmp_path / "data", {"cat": 30, "dog": 30}, side=8)
    (tmp_path / "data" / "cat" / "zzz.png").write_bytes(b"torn")
    out, source = tmp_path / "run", [f"data.source=folder:{tmp_path / 'data'}", "data.skip_bad=true", "data.channels=1"]
    command = ["train", "digits-teacher", *TRAIN, *source, "training.checkpoint_every=32", "--out", str(out), "--quiet"]
    assert main(command) == 0
    first = Receipt.load(out / "receipt.json")
    assert [line.split(",")[0] for line in first.warnings] == ["1 unreadable image left out (data.skip_bad)"]
    assert first.data.skipped == 1
    for file in ("receipt.json", "report.html"):
        (out / file).unlink()
    newest = max((out / "checkpoints").iterdir())
    next(newest.glob("*.safetensors")).write_bytes(b"torn")
    assert main(command) == 0
    again = Receipt.load(out / "receipt.json")
    assert any("is damaged and was passed over" in line for line in again.warnings)
    assert any("unreadable image left out" in line for line in again.warnings)
    assert again.models["teacher"].sha256 == first.models["teacher"].sha256


def test_a_finished_evaluation_does_not_make_a_run_finished(tmp_path: Path) -> None:
    """As an older version left one there."""
    folder = RunFolder(tmp_path / "run", {"seed": 1}, {})
    folder.claim()
    shutil.copy(evaluated(tmp_path), folder.receipt)
    assert not RunFolder(tmp_path / "run", {"seed": 1}, {}).finished


def evaluated(tmp_path: Path) -> Path:
    images, labels = fabricated.digits()
    np.savez(tmp_path / "images.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    words = ["eval", str(tmp_path / "images.npz"), "--data", "digits", "--out", str(tmp_path / "eval"), "--quiet"]
    assert main(words) == 0
    return tmp_path / "eval" / "receipt.json"


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
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "inputs.json", "recipe.yaml"]
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"data": "b"}
