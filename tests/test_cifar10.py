"""The CIFAR-10 benchmark: its arithmetic, and all of it on tiny networks and made-up images, stopped in between."""

from __future__ import annotations

import json
from pathlib import Path

import cifar10
import cifar10_results
import cifar_resnet
import fabricated
import numpy as np
import pytest
from test_cifar_resnet import random_weights

from diffstill.cli import main
from diffstill.evaluation.results import Estimate
from diffstill.jobs.distill import teacher_recipe
from diffstill.models.folder import load_model
from diffstill.recipe import load_recipe
from diffstill.report.arena import ArenaResult
from diffstill.report.receipt import Receipt

LADDER = {
    "ladders": [
        {"nets": "cifar", "work": "distil", "batch": 64, "library": {"ratio": {"median": 4.2}}},
        {"nets": "cifar", "work": "distil", "batch": 256, "library": {"ratio": {"median": 2.4}}},
        {"nets": "cifar", "work": "train", "batch": 64, "library": {"ratio": {"median": 9.0}}},
    ]
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Made-up images of ten colours, and an extractor of random weights."""
    folder = tmp_path_factory.mktemp("cifar")
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 10
    base = (labels[:, None] * np.array([25, 20, 15]) + 20)[:, None, None, :]
    images = np.clip(base + generator.integers(-20, 21, (120, 32, 32, 3)), 0, 255).astype(np.uint8)
    data = folder / "data"
    data.mkdir()
    np.savez(data / "c_train.npz", images=images[:80], labels=labels[:80])
    np.savez(data / "c_test.npz", images=images[80:], labels=labels[80:])
    random_weights(folder / "w.npz", 1)
    assert cifar_resnet.main([str(folder / "w.npz"), str(folder / "ResNet8.pt")]) == 0
    return {"data": f"npz:{data}", "extractor": str(folder / "ResNet8.pt")}


def test_a_budget_is_whole_batches_within_the_paper() -> None:
    assert cifar10.budget(1000.0, 10, 128, 25_000_000) == int(1000 * 600 * cifar10.SPARE) // 128 * 128
    assert cifar10.budget(1e9, 60, 128, 25_000_000) == 25_000_000 // 128 * 128
    assert cifar10.budget(0.001, 1, 128, 25_000_000) == 128, "one step at least"


def arena_of(tmp_path: Path, teacher: float, ratio: float = 0.9, **distances: float | None) -> ArenaResult:
    """An arena of one guidance, whose arms have these distances and DASH this gap ratio."""
    found = fabricated.arena(tmp_path)
    found.teacher.sweep = [point.model_copy(deep=True) for point in found.teacher.sweep[:1]]
    found.teacher.sweep[0].fd = Estimate(value=teacher)
    for name, value in distances.items():
        arm = found.arm(name)
        assert arm is not None
        for seed in arm.seeds:
            seed.evaluation.sweep = [point.model_copy(deep=True) for point in seed.evaluation.sweep[:1]]
            seed.evaluation.sweep[0].fd = Estimate(value=value)
            seed.chosen = seed.evaluation.sweep[0].guidance
            if name == "dash":
                assert seed.evaluation.fidelity is not None
                seed.evaluation.fidelity.overall.ratio = Estimate(value=ratio)
    return found


@pytest.mark.parametrize(
    ("dash", "composite", "scratch", "ratio", "share", "met"),
    [
        (8.0, 13.0, 20.0, 0.9, 0.2, [True, True, True, True, False]),
        (10.0, 9.0, 20.0, 0.84, 1 / 3, [False, False, False, True, False]),
        (20.0, 13.0, 8.0, 0.85, 5.0, [False, False, True, True, False]),
        (8.0, 13.0, 4.0, 0.9, None, [None, False, True, True, False]),  # scratch is better than the teacher
        (None, 13.0, 20.0, 0.9, None, [None, None, True, True, False]),  # DASH diverged
    ],
)
def test_the_aims_are_computed_from_what_was_measured(
    dash: float | None, composite: float, scratch: float, ratio: float, share: float | None, met: list, tmp_path: Path
) -> None:
    found = arena_of(tmp_path, 5.0, ratio, dash=dash, composite=composite, scratch=scratch)
    aims = cifar10_results.aims(found, LADDER)
    assert aims[0]["value"] == (None if share is None else pytest.approx(share))
    assert [aim["met"] for aim in aims] == met
    assert [aim["value"] for aim in aims[3:]] == [4.2, 2.4]
    assert [aim["met"] for aim in cifar10_results.aims(found, {"ladders": []})[3:]] == [None, None]
    page = cifar10_results.aims_table({"aims": aims})
    assert (page.count("| met |"), page.count("| missed |")) == (met.count(True), met.count(False))


@pytest.mark.parametrize("images", [cifar10.UNPLANNED, cifar10.budget(4321.0, 9, 128, 25_000_000)])
def test_the_recipe_takes_every_plan(images: int) -> None:
    """At full size, without --smoke, whose batch is another."""
    args = cifar10._arguments(["--extractor", "x.pt", "--data", "npz:cifar10"])
    recipe = load_recipe(cifar10.RECIPE, cifar10.overrides(args, {"teacher": images, "student": images}))
    upstream = teacher_recipe(recipe)
    assert (recipe.training.images, upstream.training.images) == (images, images)
    assert upstream.training.warmup_images <= images // 10
    assert recipe.evaluation.extractor == "torchscript:x.pt"


def test_a_plan_of_other_arguments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "throughput.json").write_text('{"complete": true}')
    words = ["--extractor", "x.pt", "--runs", str(tmp_path), "--device", "cpu"]
    asked = cifar10._asked(cifar10._arguments(words))
    (tmp_path / "plan.json").write_text(json.dumps({"asked": {**asked, "samples": 7}}))
    assert cifar10.main(words) == 2
    error = capsys.readouterr().err
    assert "samples: 10000 is not what" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--teacher-minutes", "-1"]])
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cifar10.main(["--extractor", "x.pt", *words])
    assert stop.value.code == 2
    assert "use more than 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_benchmark_runs_stops_and_goes_on(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every call is stopped after a few seconds until all is done; samples are there for another extractor."""
    words = ["--data", world["data"], "--extractor", world["extractor"], "--smoke", "--device", "cpu"]
    words += ["--samples", "40", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    words += ["--teacher-minutes", "0.001", "--student-minutes", "0.001", "--rate-seconds", "0.1"]
    calls = 0
    while True:
        calls += 1
        assert calls < 20
        try:
            code = cifar10.main([*words, "--minutes", "0.7" if calls < 3 else "9"])
        except SystemExit as stop:
            code = stop.code
        if code == 0:
            break
        assert code == cifar10.GO_ON
    assert "all done" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "cifar10.json").read_text(encoding="utf-8"))
    assert found["smoke"] is True
    assert set(found["arms"]) == {"dash", "dash-inherit", "composite", "conditional", "scratch"}
    assert found["protocol"]["extractor"]["name"] == "FD-ResNet8"
    assert set(found["teacher"]["sweep"]) == {"1", "2"}
    assert found["teacher"]["images"] == found["plan"]["images"]["teacher"]
    for arm in found["arms"].values():
        assert arm["images"] == found["plan"]["images"]["student"]
        assert arm["fidelity"]["ratio"]["value"] is not None or arm["label"] == "Conditional only"
        assert {"fd", "kid", "precision", "recall", "class_agreement", "inception_score"} <= set(arm["sweep"][0]["1"])
    assert found["arms"]["dash"]["cost"]["latency"][0]["batch"] == 1
    assert (tmp_path / "out" / "dash-grid.png").exists()
    kept = load_model(tmp_path / "runs" / "arena" / "models" / "seed-0" / "dash-inherit")
    assert kept.lineage.name == "dash-cifar10-arena-dash-inherit"
    assert kept.lineage.recipe["student"]["init"] == "inherit", "the arm's own recipe"
    samples = sorted((tmp_path / "runs" / "arena" / "samples").glob("dash-2-*.npz"))
    out = tmp_path / "eval"
    of = ["--data", world["data"], "data.val_fraction=0", f"extractor=torchscript:{world['extractor']}"]
    assert main(["eval", str(samples[0]), *of, "--out", str(out), "--quiet"]) == 0
    again = Receipt.load(out / "receipt.json").models["samples"].sweep[0]
    assert again.fd.value == pytest.approx(found["arms"]["dash"]["sweep"][0]["2"]["fd"]["value"], rel=1e-6)
