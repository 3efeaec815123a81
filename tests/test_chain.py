"""Chains of stages: every stage an artefact of its own, nothing done twice, nothing lost, resumed where it stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pictures import class_folders
from processes import Nursery, until

from diffstill.cli import main
from diffstill.diffusion.schedule import spaced_indices
from diffstill.engine.log import read_log
from diffstill.errors import InputError
from diffstill.jobs.stages import StageData, digest, stages_of
from diffstill.models.folder import load_model
from diffstill.models.lineage import weights_sha256
from diffstill.recipe import ChainRecipe, load_recipe
from diffstill.report.receipt import Receipt

FAST = {"training.images": 64, "training.batch_size": 16, "training.log_every": 1, "training.warmup_images": 0}
NET = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "attention_levels": []}
CHAIN = {
    "kind": "chain",
    "name": "tiny-chain",
    "data": {"source": "digits", "limit": 200},
    "stages": {
        "teacher": {"recipe": "digits-teacher-v", "overrides": {**FAST, **{f"network.{k}": v for k, v in NET.items()}}},
        "small": {
            "recipe": "digits-dash-v",
            "overrides": {**FAST, "student.block_out_channels": [8, 8], "student.norm_num_groups": 4},
        },
        "dial": {"recipe": "digits-guided", "overrides": FAST},
        "steps": {"recipe": "digits-progressive", "overrides": FAST, "rounds": [4, 2, 1]},
        "jumps": {
            "recipe": "digits-progressive", "of": "dial", "overrides": {**FAST, "method.sampler": "stochastic"},
            "rounds": [4, 2], "start": 16,
        },
    },
    "baselines": [8, 2, {"steps": 2, "spacing": "leading"}],
    "evaluation": {"samples": 30, "pairs": 30, "steps": 5, "guidance": [1, 2], "latency_batches": [1]},
}  # fmt: skip
NAMES = ["teacher", "small", "dial", "steps-4", "steps-2", "steps-1", "jumps-4", "jumps-2"]


def written(folder: Path, tree: dict[str, object] | None = None) -> str:
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump(tree or CHAIN, sort_keys=False), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chain, made once by the command line."""
    home = tmp_path_factory.mktemp("chain")
    assert main(["chain", written(home), "--out", str(home / "run"), "--quiet"]) == 0
    return home


def folders(run: Path) -> dict[str, Path]:
    """Stage -> its folder."""
    marks = sorted((run / "stages").glob("*/stage.json"))
    return {json.loads(mark.read_text())["name"]: mark.parent for mark in marks}


def test_every_stage_is_an_artefact_with_its_line(done: Path) -> None:
    run = done / "run"
    receipt, found = Receipt.load(run / "receipt.json"), folders(run)
    assert list(receipt.models) == [*NAMES, "teacher@8", "teacher@2", "teacher@2-leading"]
    steps = {name: receipt.models[name].steps for name in ("teacher", "steps-4", "teacher@8")}
    assert steps == {"teacher": 5, "steps-4": 4, "teacher@8": 8}, "5 of 8 steps would begin in the middle"
    assert receipt.kind == "chain"
    assert set(found) == set(NAMES)
    assert [t.name for t in receipt.training] == NAMES
    last = load_model(found["steps-1"] / "model")
    assert last.lineage is not None
    assert last.lineage.stages == ["supervised", "dash", "guided", *["progressive"] * 3]
    line, ancestor = [], last.lineage.teacher
    while ancestor is not None:
        line.append((ancestor.name, ancestor.weights_sha256))
        ancestor = ancestor.teacher
    shas = {name: weights_sha256(load_model(folder / "model").denoiser.network) for name, folder in found.items()}
    assert line == [(name, shas[name]) for name in ("steps-2", "steps-4", "dial", "small", "teacher")]
    assert (run / "report.html").stat().st_size > 10_000
    assert all(any(read_log(folder / "log.jsonl")) for folder in found.values())


def test_steps_scales_and_samplers_of_the_artefacts(done: Path) -> None:
    models = {name: load_model(folder / "model").denoiser for name, folder in folders(done / "run").items()}
    assert [models[name].schedule.T for name in NAMES] == [1000, 1000, 1000, 4, 2, 1, 4, 2]
    assert [models[name].sampler for name in NAMES] == ["ddim"] * 6 + ["stochastic"] * 2
    assert all(models[name].scale_range == ((1.0, 5.0) if name not in ("teacher", "small") else None) for name in NAMES)
    for name in NAMES[3:]:
        steps = models[name].schedule.T
        assert models[name].time_index is not None
        # A round's first teacher is seen with 8 (or 16) of the 1000 steps: the times are those of all 1000.
        assert models[name].time_index.tolist() == spaced_indices(1000, steps, "trailing")
        levels = models["teacher"].schedule.alphas_cumprod[models[name].time_index]
        # The noisiest beta of a cosine schedule is kept below 1 in float32, the type of diffusers' table.
        torch.testing.assert_close(models[name].schedule.alphas_cumprod, levels, rtol=1e-5, atol=2e-7)


def test_cost_falls_from_stage_to_stage(done: Path) -> None:
    receipt = Receipt.load(done / "run" / "receipt.json")
    costs = {name: model.cost for name, model in receipt.models.items() if model.cost}
    assert [costs[name].nfe for name in NAMES] == [10, 10, 5, 4, 2, 1, 4, 2]
    line = [costs[name].flops_image for name in NAMES[:6]]
    assert line == sorted(line, reverse=True)
    assert receipt.models["teacher@2"].cost.nfe == 4  # type: ignore[union-attr]
    assert receipt.teacher is receipt.models["teacher"]
    assert receipt.subject is not None
    assert receipt.subject[0] == "jumps-2", "the last stage, not a baseline after it"
    assert all(receipt.models[name].fidelity for name in NAMES[1:])
    assert receipt.models["teacher@2"].fidelity is None


def test_a_second_call_does_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "run").rglob("*") if path.is_file()}
    assert main(["chain", written(done), "--out", str(done / "run"), "--quiet"]) == 0
    assert "all done already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in (done / "run").rglob("*") if path.is_file()}
    before.pop(done / "run" / "recipe.yaml"), after.pop(done / "run" / "recipe.yaml")
    assert before == after


def changed(key: str, value: object) -> dict[str, object]:
    tree = json.loads(json.dumps(CHAIN))
    tree["stages"]["dial"]["overrides"][key] = value
    return tree  # type: ignore[no-any-return]


def test_a_changed_stage_is_redone_with_those_after_it_alone_and_nothing_is_lost(done: Path) -> None:
    run = done / "run"
    first = set((run / "stages").iterdir())
    assert main(["chain", written(done, changed("training.lr", 1e-3)), "--out", str(run), "--quiet"]) == 0
    added = {path.name.rsplit("-", 1)[0] for path in set((run / "stages").iterdir()) - first if path.is_dir()}
    assert added == {"dial", "steps-4", "steps-2", "steps-1", "jumps-4", "jumps-2"}
    assert first <= set((run / "stages").iterdir())
    # Back to the first recipe: everything is found again.
    stamps = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.safetensors")}
    assert main(["chain", written(done), "--out", str(run), "--quiet"]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.safetensors")}


def test_what_does_not_touch_the_weights_retrains_nothing(done: Path) -> None:
    run = done / "run"
    stamps = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.safetensors")}
    tree = changed("description", "other words")
    tree["evaluation"] = {**CHAIN["evaluation"], "samples": 31}  # type: ignore[dict-item]
    assert main(["chain", written(done, tree), "--out", str(run), "--quiet"]) == 0
    kept = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("checkpoints/**/*.safetensors")}
    assert kept.items() <= stamps.items()
    assert Receipt.load(run / "receipt.json").protocol.samples == 31  # type: ignore[union-attr]


def test_a_finished_model_may_be_the_first_stage(done: Path, tmp_path: Path) -> None:
    teacher = folders(done / "run")["teacher"] / "model"
    sha = weights_sha256(load_model(teacher).denoiser.network)
    stages: Any = CHAIN["stages"]
    tree = {**CHAIN, "stages": {"mine": {"model": str(teacher)}, "dial": stages["dial"]}}
    assert main(["chain", written(tmp_path, tree), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    student = load_model(folders(tmp_path / "run")["dial"] / "model")
    assert student.lineage is not None
    assert student.lineage.teacher is not None
    assert student.lineage.teacher.weights_sha256 == sha


def test_weights_that_were_changed_by_hand_are_not_built_upon(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: Any = CHAIN["stages"]
    tree = {**CHAIN, "stages": {"teacher": stages["teacher"]}, "baselines": []}
    command = ["chain", written(tmp_path, tree), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(command) == 0
    mark = next((tmp_path / "run" / "stages").glob("*/stage.json"))
    mark.write_text(mark.read_text().replace(json.loads(mark.read_text())["weights_sha256"], "0" * 64))
    assert main(command) == 2
    assert "delete the folder to train the stage again" in capsys.readouterr().err
    mark.write_text("{}")
    assert main(command) == 2
    assert "has a stage.json that cannot be read" in capsys.readouterr().err


def test_the_result_must_be_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["chain", written(tmp_path, {**CHAIN, "result": "best"}), "--out", str(tmp_path / "run"), "--quiet"])
    assert code == 2
    assert "result: 'best' is no stage; one of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"a": {"recipe": "digits-guided"}}, "stages.a.recipe: 'digits-guided' needs a teacher, and no stage comes"),
        ({"a": {"recipe": "digits-teacher-v"}, "b": {"recipe": "digits-guided", "of": "c"}}, "'c' is no earlier stage"),
        (
            {"a": {"recipe": "digits-teacher-v", "rounds": [2]}},
            "stages.a.rounds: [2] is not usable; remove them: supervised makes no fewer steps",
        ),
        ({"a": {"recipe": "digits-teacher-v", "model": "x"}}, "stages.a: give either recipe (trained here) or model"),
        ({"a": {"recipe": "cascade-digits"}}, "stages.a.recipe: 'cascade-digits' is a chain"),
        (
            {"a": {"recipe": "digits-teacher-v"}, "b": {"recipe": "digits-dash-v", "rounds": [4]}},
            "stages.b.rounds: [4] is not usable; remove them: dash makes no fewer steps",
        ),
        (
            {"a": {"recipe": "digits-teacher-v"}, "b": {"recipe": "digits-progressive", "rounds": [4, 4]}},
            "[4, 4] must be falling numbers of steps",
        ),
        (
            {"a": {"recipe": "digits-teacher-v"}, "b": {"recipe": "digits-progressive", "rounds": [4], "start": 2}},
            "start 2 is fewer steps than the first round's 4",
        ),
        (
            {"a": {"recipe": "digits-teacher"}, "b": {"recipe": "digits-progressive", "rounds": [4]}},
            "stages.b-4: method.weighting",
        ),
        (
            {"a": {"recipe": "digits-teacher-v", "overrides": {"seed": 3}}},
            "stages.a: overrides.seed: the chain itself says that, or the stage beside its recipe",
        ),
        (
            {"a": {"recipe": "digits-teacher-v", "last_rounds_factor": 3}},
            "stages.a: last_rounds_factor is for rounds",
        ),
        (
            {
                "a": {"recipe": "digits-teacher-v"},
                "b": {"recipe": "digits-guided"},
                "c": {"recipe": "digits-dash-v", "overrides": {"student.init": "fresh"}},
            },
            "stages.c: method.name: 'dash' does not teach a student every scale",
        ),
        (
            {
                "a": {"recipe": "digits-teacher-v"},
                "b": {"recipe": "digits-progressive", "rounds": [4], "overrides": {"method.null_weight": 0}},
                "c": {"recipe": "digits-progressive", "rounds": [2]},
            },
            "stages.c-2: teacher: 'b-4' has no live null branch to learn from",
        ),
        ({"a b": {"recipe": "digits-teacher-v"}}, "stages.a b: use another name"),
        ({"a": {"model": "nowhere/at/all"}}, "stages.a: teacher.model"),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_anything_is_written(
    stages: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["chain", written(tmp_path, {**CHAIN, "stages": stages}), "--out", str(tmp_path / "run"), "--quiet"])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "said"), [(5000, "steps 5000 must lie in 1..1000"), (0, "1 or more")])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_baselines_that_cannot_be_are_refused_before_anything_is_written(
    steps: int, said: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, {**CHAIN, "baselines": [steps]})
    assert main(["chain", recipe, "--out", str(tmp_path / "run"), *more, "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("diffstill: baselines")
    assert said in told
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert main(["chain", written(tmp_path), "--out", str(tmp_path / "mine"), "--quiet", "--fresh"]) == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    other = {**CHAIN, "name": "another"}
    assert main(["chain", written(tmp_path, other), "--out", str(done / "run"), "--quiet"]) == 2
    assert "holds another run (tiny-chain); use another --out, or --fresh to start over\n" in capsys.readouterr().err
    assert main(["distill", written(tmp_path), "--quiet"]) == 2
    assert "run: diffstill chain tiny-chain" in capsys.readouterr().err


def test_moved_data_change_no_stage(tmp_path: Path) -> None:
    """Its name counts the data by their fingerprint, not by their place."""
    class_folders(tmp_path / "old", {"cat": 30, "dog": 30}, side=8)

    def names(place: str) -> list[str]:
        source = {"source": f"folder:{tmp_path}/{place}", "channels": 1}
        recipe = load_recipe(written(tmp_path, {**CHAIN, "data": source}))
        assert isinstance(recipe, ChainRecipe)
        found, data = stages_of(recipe), StageData(recipe)
        return [digest(stage.inputs(data.of(stage), "teacher", {})) for stage in found if stage.recipe is not None]

    before = names("old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert names("new") == before
    next((tmp_path / "new" / "cat").iterdir()).unlink()
    assert not set(names("new")) & set(before)


def test_rounds_double_their_length_at_two_and_one_steps() -> None:
    recipe = load_recipe("cascade-digits")
    assert isinstance(recipe, ChainRecipe)
    stages = {stage.name: stage.recipe for stage in stages_of(recipe) if stage.recipe is not None}
    images = {name: stages[f"steps-{name}"].training.images for name in (8, 4, 2, 1)}
    assert images == {8: 19200, 4: 19200, 2: 38400, 1: 38400}
    assert {stages[f"steps-{n}"].respace.teacher_steps for n in (4, 2, 1)} == {None}  # type: ignore[union-attr]
    assert stages["steps-8"].respace.teacher_steps == 48  # type: ignore[union-attr]


def test_dry_run_forecasts_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chain", written(tmp_path), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["predicted"]) == NAMES
    # Stage 1 asks the teacher twice an image; a round of a two-step way asks it twice too, each at one pass.
    assert told["predicted"]["dial"]["teacher_parameters"] == told["predicted"]["small"]["parameters"]


def test_a_stages_recipe_may_lie_beside_the_chain(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: digits-teacher-v\nname: mine\ntraining: {images: 640}\n")
    recipe = load_recipe(written(tmp_path, {**CHAIN, "stages": {"a": {"recipe": "mine.yaml"}}, "baselines": []}))
    assert isinstance(recipe, ChainRecipe)
    (stage,) = stages_of(recipe)
    assert stage.recipe is not None
    assert stage.recipe.training.images == 640


def test_a_cut_off_evaluation_is_measured_again(done: Path) -> None:
    run = done / "run"
    assert main(["chain", written(done), "--out", str(run), "--quiet"]) == 0
    files = list((run / "stages").glob("steps-1-*.json"))  # one a protocol that other tests asked for
    lengths = {file: file.stat().st_size // 2 for file in files}
    for file, length in lengths.items():
        file.write_text(file.read_text()[:length])
    assert main(["chain", written(done), "--out", str(run), "--quiet"]) == 0
    mended = [file for file in files if file.stat().st_size > 1.5 * lengths[file]]
    assert [json.loads(file.read_text())["name"] for file in mended] == ["steps-1"]


def test_an_inherited_stage_can_be_left_out() -> None:
    whole, part = (load_recipe("few-shot-fashion", more) for more in ([], ["stages.dmd2-then-finetune=null"]))
    assert isinstance(whole, ChainRecipe)
    assert isinstance(part, ChainRecipe)
    assert list(part.stages) == [name for name in whole.stages if name != "dmd2-then-finetune"]
    with pytest.raises(InputError, match=r"^stages.dmd: no such stage \(did you mean dmd2\?\); one of source, "):
        load_recipe("few-shot-fashion", ["stages.dmd=null"])
    with pytest.raises(InputError, match="'dmd2' is no earlier stage"):
        load_recipe("few-shot-fashion", ["stages.dmd2=null"])


def test_a_recipe_of_a_stage_must_be_known() -> None:
    with pytest.raises(InputError, match="digits-guidde"):
        stages_of(ChainRecipe.model_validate({**CHAIN, "stages": {"a": {"recipe": "digits-guidde"}}}))


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def test_killed_in_a_round_it_goes_on_there_to_the_same_bits(done: Path, nursery: Nursery, tmp_path: Path) -> None:
    tree = json.loads(json.dumps(CHAIN))
    tree["stages"]["steps"]["overrides"] |= {"training.images": 320, "training.checkpoint_every": 16}
    tree["stages"] = {name: stage for name, stage in tree["stages"].items() if name != "jumps"}
    command = ["chain", written(tmp_path, tree), "--quiet", "--out"]
    child = nursery.start([*command, str(tmp_path / "run")], tmp_path / "err")
    stages = tmp_path / "run" / "stages"
    until(lambda: len(list(stages.glob("steps-2-*/checkpoints/*/"))) > 2)
    os.kill(child, signal.SIGKILL)
    nursery.wait()
    finished = {path: path.stat().st_mtime_ns for path in stages.glob("*/stage.json")}
    assert {path.parent.name.rsplit("-", 1)[0] for path in finished} == {"teacher", "small", "dial", "steps-4"}
    assert main([*command, str(tmp_path / "run")]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert main([*command, str(tmp_path / "whole")]) == 0
    a, b = folders(tmp_path / "run"), folders(tmp_path / "whole")
    assert {name: path.name for name, path in a.items()} == {name: path.name for name, path in b.items()}
    for name in ("steps-2", "steps-1"):
        one, two = (json.loads((found[name] / "stage.json").read_text())["weights_sha256"] for found in (a, b))
        assert one == two, name
