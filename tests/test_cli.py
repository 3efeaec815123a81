"""The command line as a user types it: what is written, what is printed, how bad input ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from diffstill.cli import main, unforeseen
from diffstill.console import doctor_text
from diffstill.diffusion.guidance import Constant
from diffstill.errors import InputError
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.evaluate import guidance_of
from diffstill.models.folder import LoadedModel, load_model
from diffstill.recipe import load_recipe
from diffstill.report import words
from diffstill.report.receipt import Receipt


def test_distill_leaves_a_whole_run(tiny_run: Path) -> None:
    for name in ("recipe.yaml", "log.jsonl", "report.html", "receipt.json", "model/model_index.json", "teacher/unet"):
        assert (tiny_run / name).exists(), name
    receipt = Receipt.load(tiny_run / "receipt.json")
    assert set(receipt.models) == {"teacher", "student", "conditional-only"}
    assert receipt.models["conditional-only"].fidelity is not None
    student = receipt.models["student"]
    assert [point.guidance for point in student.sweep] == ["1", "2"]
    assert [point.nfe for point in student.sweep] == [4, 8]
    assert student.fidelity is not None
    assert student.fidelity.overall.pairs == 60
    assert receipt.lineage[-1].parent == receipt.lineage[0].name == "digits-teacher"
    assert [t.steps for t in receipt.training] == [8, 8]


def test_the_cards_words_are_the_reports(tiny_run: Path) -> None:
    student = Receipt.load(tiny_run / "receipt.json").models["student"]
    card = (tiny_run / "model" / "README.md").read_text(encoding="utf-8")
    assert student.best is not None
    assert student.fidelity is not None
    assert f"| FD-digits | {words.estimate(student.best.fd)} |" in card
    assert f"| guidance beside the teacher's | {words.guidance_state(student.fidelity)[1]} |" in card
    assert "Guidance is alive: " not in card
    assert "pipeline_tag" not in card, "the hub's only tag that is near says unconditional"


def test_a_second_run_says_that_all_is_done(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny_run / "receipt.json").stat().st_mtime_ns
    assert main(["distill", "digits-dash", *TINY, "--out", str(tiny_run), "--quiet"]) == 0
    assert "all done already" in capsys.readouterr().out
    assert (tiny_run / "receipt.json").stat().st_mtime_ns == before


def test_what_starts_a_section_anew_goes_before_what_is_set_in_it() -> None:
    recipe = load_recipe("digits-dash", ["method.lambda_an=0.5", "method.name=gap"])
    assert recipe.method.build_options().lambda_an == 0.5
    with pytest.raises(InputError, match=r"^method: unknown key 'lambda_im'"):
        load_recipe("digits-dash", ["method.lambda_im=3", "method.name=gap"])


def test_a_model_of_an_unknown_method_is_measured_and_drawn(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the user's own, or of another version: data and protocol are all that is read of its recipe."""
    model = tmp_path / "model"
    shutil.copytree(tiny_run / "model", model)
    lineage = json.loads((model / "lineage.json").read_text())
    lineage["recipe"]["method"] = {"name": "of-my-own"}
    lineage["recipe"]["training"]["old_key"] = 3
    (model / "lineage.json").write_text(json.dumps(lineage))
    few = ["samples=20", "pairs=20", "steps=2", "guidance=1"]
    assert main(["eval", str(model), *few, "--out", str(tmp_path / "eval"), "--quiet"]) == 0
    assert Receipt.load(tmp_path / "eval" / "receipt.json").recipe["method"] == {"name": "of-my-own"}
    assert main(["interpolate", str(model), "--label", "3", "--steps", "2", "--out", str(tmp_path / "x.png")]) == 0
    lineage["recipe"]["data"]["nonsense"] = 1
    (model / "lineage.json").write_text(json.dumps(lineage))
    capsys.readouterr()
    assert main(["eval", str(model), *few, "--out", str(tmp_path / "other"), "--quiet"]) == 2
    assert "data.nonsense" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_no_bug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "x" * 300, "--data", "digits"]) in (1, 2)
    told = capsys.readouterr().err
    assert "a bug" not in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("labels", ["\u00b2", "--3", "-1", "10"])
def test_labels_that_are_none_are_named(tiny_run: Path, labels: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tiny_run / "model"), f"--labels={labels}", "--out", "x.png"]) == 2
    assert f"labels: '{labels}' is not usable; use 0..9" in capsys.readouterr().err


def test_sample_draws_what_was_asked(tiny_run: Path, tmp_path: Path) -> None:
    asked = ["--labels", "7,2", "--guidance", "3", "--steps", "5", "--seed", "4", "--quiet"]
    assert main(["sample", str(tiny_run / "model"), *asked, "--out", str(tmp_path / "x")]) == 0
    wanted = sample_images(
        load_model(tiny_run / "model").denoiser, 2, guidance=Constant(3.0), steps=5, seed=4, labels=torch.tensor([7, 2])
    )
    for number, (file, image) in enumerate(zip(sorted((tmp_path / "x").iterdir()), wanted, strict=True)):
        assert file.name == ("000000-7.png", "000001-2.png")[number]
        drawn = Image.open(file)
        assert drawn.mode == "L"
        assert np.abs(np.asarray(drawn).astype(int) - image[0].numpy().astype(int)).max() <= 1


def test_sample_mixes_its_images_with_no_earlier_ones(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sample", str(tiny_run / "model"), "--steps", "2", "--quiet", "--out", str(tmp_path / "x")]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").touch()
    assert main([*asked, "-n", "3"]) == 0
    before = sorted((tmp_path / "x").iterdir())
    assert main([*asked, "-n", "2"]) == 2
    assert "holds images of an earlier call" in capsys.readouterr().err
    assert sorted((tmp_path / "x").iterdir()) == before


@pytest.mark.parametrize("text", ["1", "1.0"])
def test_a_model_of_one_scale_may_be_told_that_scale(text: str) -> None:
    model = SimpleNamespace(guided=False, default_guidance="1", denoiser=SimpleNamespace(unconditional=True))
    assert str(guidance_of(text, cast(LoadedModel, model))) == "1"
    with pytest.raises(InputError, match="cannot be set: this model is unconditional"):
        guidance_of("2", cast(LoadedModel, model))


def test_an_arms_complaint_names_the_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_run: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_run / "teacher", plain)
    (plain / "curriculum.safetensors").unlink()
    command = ["distill", "digits-dash", f"teacher={{model: {plain}}}", "method.curriculum=none", "--dry-run"]
    command.append("student={family: teacher}")
    assert main(command) == 2
    assert "diffstill: beside.conditional-only.method.curriculum: " in capsys.readouterr().err
    assert main([*command, "beside={}"]) == 0
    assert main(["distill", "digits-dash", "student.block_out_channels=8,16", "--dry-run"]) == 2
    assert "give a list, e.g. [8,16]" in capsys.readouterr().err


def test_sample_is_the_same_for_any_batch_size(tiny_run: Path, tmp_path: Path) -> None:
    for name, batch in (("a", "3"), ("b", "64")):
        arguments = ["--labels", "0,1,2", "-n", "7", "--steps", "5", "--seed", "4", "--quiet", "--batch-size", batch]
        assert main(["sample", str(tiny_run / "model"), *arguments, "--out", str(tmp_path / name)]) == 0
    first = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert first == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert len(first) == 7
    for name in first:
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in "ab")
        assert np.abs(a - b).max() <= 1


def test_eval_uses_the_models_own_protocol_and_takes_overrides(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny_run / "model"), "guidance=[1.5]", "evaluation.samples=30", "--quiet"]
    command += ["--out", str(tmp_path / "e")]
    assert main([*command, "--teacher", str(tiny_run / "teacher"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["protocol"]["steps"] == 4
    assert printed["protocol"]["samples"] == 30
    assert printed["models"]["student"]["sweep"][0]["guidance"] == "1.5"
    assert printed["models"]["student"]["fidelity"]["overall"]["pairs"] == 60
    assert (tmp_path / "e" / "report.html").exists()
    assert main(["eval", str(tiny_run / "model"), "sampels=30", "--quiet", "--out", str(tmp_path / "f")]) == 2
    assert "rename it to samples" in capsys.readouterr().err
    assert main(["eval", str(tiny_run / "model"), "samples=30", "--quiet", "--out", str(tiny_run)]) == 2
    assert "whose receipt would be lost" in capsys.readouterr().err


def test_report_again_and_comparison(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tiny_run), "--out", str(tmp_path / "one.html")]) == 0
    assert main(["report", str(tiny_run), str(tiny_run), "--out", str(tmp_path / "two.html")]) == 0
    assert main(["report", str(tiny_run), "--out", str(tmp_path)]) == 2
    assert f"is a folder; name the page: {tmp_path / 'report.html'}\n" in capsys.readouterr().err
    receipt = (tiny_run / "receipt.json").read_bytes()
    assert main(["report", str(tiny_run), "--out", str(tiny_run / "receipt.json")]) == 2
    assert "is no page; name a page that ends in .html\n" in capsys.readouterr().err
    assert (tiny_run / "receipt.json").read_bytes() == receipt
    assert "<svg" in (tmp_path / "one.html").read_text()
    assert (tmp_path / "two.html").read_text().startswith("<!doctype html>")


def test_what_is_wrong_with_the_teachers_overrides_is_named_where_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "digits-dash", "teacher.overrides.training.imges=3", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("diffstill: teacher.overrides.training.imges: 3 is no known key")


def test_a_teacher_of_other_noise_is_refused_before_anything_is_measured(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["train", "digits-teacher", "data.limit=100", "training.images=32", "training.batch_size=32"]
    other += ["training.warmup_images=0", "evaluation.samples=20", "evaluation.pairs=20", "evaluation.steps=2"]
    other += ["network.block_out_channels=[8, 8]", "network.norm_num_groups=4", "schedule.name=linear", "--quiet"]
    assert main([*other, "--out", str(tmp_path / "linear")]) == 0
    capsys.readouterr()
    words = ["eval", str(tiny_run / "model"), "--teacher", str(tmp_path / "linear" / "model"), "samples=20"]
    assert main([*words, "--out", str(tmp_path / "eval")]) == 2
    told = capsys.readouterr().err
    assert "student.schedule" in told
    assert "evaluate" not in told


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "never"
    assert main(["distill", "digits-dash", "--dry-run", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    for training in ("digits-teacher", "digits-dash", "conditional-only"):
        assert f"  {training}:" in printed, "everything that is trained is forecast"
    assert "s per 1,000 images" in printed
    assert "117,769 (5.97x fewer than the teacher's 702,753)" in printed
    assert "  all together: " in printed
    assert not out.exists()


def test_dry_run_compares_students_that_are_no_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "digits-dash", "student.family=teacher", "--dry-run"]) == 0
    assert "(as many as the teacher's)" in capsys.readouterr().out
    wide = ["student.init=fresh", "student.block_out_channels=[64, 128]", "student.layers_per_block=2"]
    assert main(["distill", "digits-dash", *wide, "--dry-run"]) == 0
    assert "x more than the teacher's " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["digits-teacher", "digits-dash", "cascade-digits"])
def test_dry_run_refuses_what_the_evaluation_would_lack(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    command = {"digits-teacher": "train", "digits-dash": "distill"}.get(recipe, "chain")
    assert main([command, recipe, "evaluation.extractor=inception", "--dry-run"]) == 2
    assert "extractor: 'inception' has no weights in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "no classifier is trained for a forecast"


@pytest.mark.parametrize("what", ["recipes", "methods", "data", "metrics"])
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_recipes_are_listed_by_name_with_their_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    told = {row["name"]: row["command"] for row in rows}
    assert [told[f"digits-{name}"] for name in ("teacher", "dash", "arena")] == ["train", "distill", "arena"]
    assert told["cascade-digits"] == "chain"
    assert main(["list", "recipes"]) == 0
    assert re.search(r"^digits-dash +distill +\S", capsys.readouterr().out, re.MULTILINE)


def test_doctor_is_content(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    text = doctor_text({**found, "cores": 2, "threads": 1, "free_disk_gib": 66.2})
    assert ", 2 cores, 1 thread, native bf16: " in text
    assert "66.2 GiB free on this disk" in text


BAD = [
    (["distill", "digits-dahs"], "'digits-dahs' is not known (did you mean digits-dash or digits-dash-v?); see"),
    (["train", "digits-teacher", "training.lr=fast"], "training.lr: 'fast' is not usable; give a number\n"),
    (["train", "digits-teacher", "training.images=2.5"], "training.images: 2.5 is not usable; give a whole number\n"),
    (["train", "digits-teacher", "training.lr=-1"], "training.lr: -1 is not usable; use a number above 0\n"),
    (["train", "digits-teacher", "training.compile=maybe"], "'maybe' is not usable; use auto, true or false\n"),
    (["train", "digits-teacher", "training.ema_cap=maybe"], "'maybe' is not usable; use true or false\n"),
    (["train", "digits-teacher", "training.learning_rate=1"], "rename it to lr, or remove it"),
    (["train", "digits-teacher", "training.epochs=9"], "rename it to images (training is counted in images)"),
    (["train", "digits-teacher", "training.micro_batch=7"], "no multiple of micro_batch 7; use 8\n"),
    (["train", "digits-teacher", "schedule=cosine"], "'cosine' is not usable; give a section of its own, key: value"),
    (["train", "digits-teacher", "evaluation.seeds=[x]"], "evaluation.seeds.0: 'x' is not usable; give a whole number"),
    (["distill", "digits-dash", "student.block_out_channels=16"], "channels: 16 is not usable; give a list, e.g. [16,"),
    (["distill", "digits-dash", "method.lambda_un=x"], "method.lambda_un: 'x' is not usable; give a number\n"),
    (["distill", "digits-unidad", "method.taps=attic"], "method.taps: 'attic' is not usable; use all, blocks or last"),
    (
        ["distill", "digits-dash", "method.name=mine.py:Mine"],
        "one of your own is known where its file is run (docs/own-",
    ),
    (["distill", "digits-dash", "schedule.name=linear"], "schedule: is no known key; remove it; known here: name,"),
    (["chain", "cascade-digits", "stages.smal.overrides.seed=1"], "stages.smal: no such stage (did you mean small?)"),
    (["chain", "cascade-digits", "stages.small.recipe=x"], "diffstill: stages.small.recipe: 'x' is not known; see"),
    (["chain", "cascade-digits", "stages.small.overrides.training.lrr=1"], "stages.small.overrides.training.lrr: 1 is"),
    (["distill", "digits-teacher"], "diffstill train digits-teacher"),
    (["train", "digits-teacher", "training.lrr=1"], "rename it to lr, or remove it"),
    (["train", "digits-teacher", "training.images=65"], "no multiple of batch_size"),
    (["train", "digits-teacher", "method.label_drop=0.2"], "did you mean label_dropout"),
    (["train", "digits-teacher", "network.block_out_channels=[30, 60]"], "norm_num_groups"),
    (["train", "digits-teacher", "network.block_out_channels=[8, 16]"], "blind to label and timestep"),
    (["train", "digits-teacher", "network.block_out_channels=[16, 16, 16, 16, 16]"], "divisible"),
    (["train", "digits-teacher", "method.name=dash"], "needs a teacher"),
    (["train", "digits-teacher", "network.init=inherit"], "kind: distill"),
    (["train", "digits-teacher", "data.source=folder:nowhere"], "data.source"),
    (["train", "digits-teacher", "data=5"], "data"),
    (["train", "digits-teacher", "x"], "key=value"),
    (["train", "nowhere.yaml"], "cannot be read"),
    (["distill", "digits-dash", "student.init=inherit", "student.block_out_channels=[48, 64]"], "student"),
    (["distill", "digits-dash", "method.lambda_im=-1"], "lambda_im"),
    (["distill", "digits-dash", "method.name=composite", "method.scale_to=1"], "scale_to"),
    (["distill", "digits-dash", "method.name=fitnets", "method.stages=[attic]"], "method.stages"),
    (["distill", "digits-dash", "evaluation.guidance=[strong]"], "guidance"),
    (["distill", "digits-dash", "teacher.model=nowhere"], "teacher"),
    (["distill", "digits-dash", "teacher.overrides.method.curriculum.rule=often"], "curriculum.rule"),
    (["arena", "digits-dash", "--methods", "dash,alchemy"], "alchemy"),
    (["arena", "digits-dash", "--methods", "dash", "--seeds", "0"], "seeds"),
    (["sample", "nowhere"], "nowhere"),
    (["eval", "nowhere"], "nowhere"),
    (["report", "nowhere"], "nowhere"),
    (["list", "dreams"], "what: 'dreams' is not usable; use recipes, methods, data, metrics"),
    (["check", "alchemy"], "alchemy"),
    (["frobnicate"], "frobnicate"),
    (["distill", "digits-dash", "student.norm_num_groups=true"], "student.norm_num_groups: true is not usable"),
    (["train", "digits-teacher", "network.block_out_channels=[16, true]"], "block_out_channels"),
    (["--verbose"], "command: is missing; use one of demo, train, distill"),
    (["train"], "diffstill: recipe: is missing; give a name from `diffstill list recipes`, or a YAML path; see"),
    (
        ["train", "digits-teacher", "--seed", "1"],
        "'--seed' is no option of this command; settings of a recipe are written",
    ),
    (["train", "digits-teacher", "--seed", "1"], "written without dashes: seed=1\n"),
    (["train", "digits-teacher", "--lr=3"], "written without dashes: training.lr=3\n"),
    (["train", "digits-teacher", "--frsh"], "is no option of this command; did you mean --fresh?"),
    (
        ["train", "digits-teacher", "--device", "gpu"],
        "diffstill: device: 'gpu' is not usable; use auto, cpu, cuda or mps\n",
    ),
    (["train", "digits-teacher", "--device", "mps"], "device: 'mps' is not to be had here; use auto or "),
    (["sample", "nowhere", "more"], "command line: 'more' is a word too many; see diffstill sample --help"),
    (["sample", "nowhere", "--steps", "few"], "diffstill: steps: 'few' is not usable; give a whole number\n"),
    (["sample", "nowhere", "--clip", "off"], "diffstill: clip: 'off' is not usable; use recompute, paper, none\n"),
    (["arena", "digits-dash"], "recipe: 'digits-dash' has no arena.arms; name methods with --methods, e.g. dash,"),
    (["distil", "digits-dash"], "command: 'distil' is unknown (did you mean distill?); use one of demo, train"),
    (["train", "digits-teacher", "--device", "abacus"], "abacus"),
]


@pytest.mark.parametrize(("command", "named"), BAD, ids=[" ".join(c)[:70] or "nothing" for c, _ in BAD])
def test_bad_input_ends_in_one_line_and_code_2(
    command: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("diffstill: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert not list(tmp_path.iterdir()), "bad input must write nothing"


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert "example: diffstill demo" in shown.out
    assert not shown.err


def test_help_tells_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in (
        ("arena", ("(default runs/arena-NAME)", "(default: the recipe's)")),
        ("sample", ("(default: auto)", "of the noise (default 0)", "changes no picture (default 256)")),
        ("consistency", ("compare student and teacher from the same noise", "(default recompute)")),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert all(text in shown for text in told), shown


def test_memory_that_does_not_suffice_is_no_bug() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    for error in (refused.value, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")):
        said = unforeseen(error)
        assert said.startswith("out of memory (")
        assert said.endswith("; in training set training.micro_batch or a smaller training.batch_size, in evaluation a "
                             "smaller evaluation.batch_size, in sampling a smaller --batch-size")  # fmt: skip
    assert "(a bug: " in unforeseen(ValueError("x"))


@pytest.mark.parametrize("command", [["sample"], ["eval", "--data", "digits"]])
def test_a_run_given_for_its_model_is_told_where_the_model_is(
    tiny_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(tiny_run), *command[1:], "--quiet"]) == 2
    assert capsys.readouterr().err.endswith(f"has no model_index.json; use {tiny_run / 'model'}\n")


def test_sample_refuses_what_the_model_cannot_do(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_run / "model")
    for arguments, named in (
        (["--labels", "11"], "labels"),
        (["--labels", "cat"], "labels"),
        (["--guidance", "loud"], "guidance: 'loud' is not usable; use a number such as 2, tag, tag:1,4,5 or interval"),
        (["--steps", "0"], "steps"),
        (["--steps", "2000"], "steps"),
        (["--seed", "-1"], "seed"),
        (["-n", "0", "--labels", "1"], "n"),
        (["--batch-size", "0"], "batch-size"),
    ):
        assert main(["sample", model, *arguments, "--quiet"]) == 2, arguments
        assert named in capsys.readouterr().err


@pytest.mark.slow
def test_module_and_help_in_a_real_process() -> None:
    shown = subprocess.run([sys.executable, "-m", "diffstill", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "example: diffstill demo" in shown.stdout
    wrong = subprocess.run([sys.executable, "-m", "diffstill", "trian"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "Traceback" not in wrong.stderr
