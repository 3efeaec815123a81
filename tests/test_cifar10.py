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


def test_the_aims_are_computed_from_what_was_measured(tmp_path: Path) -> None:
    found = fabricated.arena(tmp_path)
    aims = {aim["name"]: aim for aim in cifar10_results.aims(found, LADDER)}
    steps = {name: aim for name, aim in aims.items() if name.startswith("DASH step")}
    assert [(aim["value"], aim["met"]) for aim in steps.values()] == [(4.2, True), (2.4, False)]
    teacher = {point.guidance: point.fd.value for point in found.teacher.sweep}
    dash, scratch = (found.arm(name) for name in ("dash", "scratch"))
    for guidance, floor in teacher.items():
        points = [[p for s in arm.at("equal_steps") for p in s.evaluation.sweep] for arm in (dash, scratch)]
        mine, theirs = (np.mean([p.fd.value for p in each if p.guidance == guidance]) for each in points)
        aim = next(a for name, a in aims.items() if name.endswith(f"at guidance {guidance}, at most"))
        if theirs <= floor:
            assert aim["value"] is None
        else:
            assert aim["value"] == pytest.approx((mine - floor) / (theirs - floor))
            assert aim["met"] == (aim["value"] <= 0.25)
    order = aims["DASH better than composite better than scratch"]
    assert order["met"] == (order["value"] == sorted(order["value"]))
    nothing = {aim["name"]: aim for aim in cifar10_results.aims(found, {"ladders": []})}
    assert all(nothing[name]["met"] is None for name in steps)
    page = cifar10_results.aims_table({"aims": list(aims.values())})
    assert page.count("\n") == len(aims) + 2
    assert ("missed" in page) == any(aim["met"] is False for aim in aims.values())


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
    samples = sorted((tmp_path / "runs" / "arena" / "samples").glob("dash-2-*.npz"))
    out = tmp_path / "eval"
    of = ["--data", world["data"], "data.val_fraction=0", f"extractor=torchscript:{world['extractor']}"]
    assert main(["eval", str(samples[0]), *of, "--out", str(out), "--quiet"]) == 0
    again = Receipt.load(out / "receipt.json").models["samples"].sweep[0]
    assert again.fd.value == pytest.approx(found["arms"]["dash"]["sweep"][0]["2"]["fd"]["value"], rel=1e-6)
