"""Pages, plots, pictures and words of the report room."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import fabricated
import numpy as np
import pytest
from html_checks import check_page
from hypothesis import given
from hypothesis import strategies as st

from diffstill.errors import InputError
from diffstill.evaluation.results import Estimate
from diffstill.report import compare, curves, pictures, plots, svg, views, words
from diffstill.report.page import write_comparison, write_report
from diffstill.report.receipt import Receipt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def receipt(folder: Path) -> Receipt:
    return fabricated.receipt(folder)


def page(receipt: Receipt, folder: Path, out: Path, plots: int = 1) -> str:
    return check_page(write_report(receipt, folder, out / "report.html").read_text(encoding="utf-8"), plots)


# words


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.number(12.94), "12.9"), (words.number(0.93), "0.930"), (words.number(9.996), "10.0"),
        (words.number(1791.4), "1\u2009791"), (words.number(0), "0"), (words.number(-0.0123), "\u22120.0123"),
        (words.number(None), "\u2013"), (words.number(math.nan), "\u2013"), (words.number(6.1e-7), "6.10e\u221207"),
        (words.estimate(Estimate(value=12.9, low=12.06, high=13.84)), "12.9 [12.1, 13.8]"),
        (words.estimate(Estimate(value=12.9)), "12.9"), (words.estimate(None), "\u2013"),
        (words.estimate(Estimate(value=0.004, low=-0.77, high=3.48), signed=True), "+0.00 [\u22120.77, +3.48]"),
        (words.plus_minus(Estimate(value=0.3234, low=0.2544, high=0.3924)), "0.323 \u00b1 0.069"),
        (words.plus_minus(Estimate(value=-0.004, low=-2.1, high=2.0), signed=True), "\u22120.00 \u00b1 2.05"),
        (words.plus_minus(Estimate(value=2.0)), "2.00"), (words.plus_minus(None), "\u2013"),
        (words.percent(Estimate(value=0.9981, low=0.99, high=1.0)), "99.8\u2009% [99.0, 100.0]"),
        (words.count(702753), "702\u2009753"), (words.si(702753), "703\u2009k"), (words.si(999_999), "1.00\u2009M"),
        (words.si(1.2478e12, "FLOP"), "1.25\u2009TFLOP"), (words.si(12), "12"), (words.tick(60_000), "60\u2009k"),
        (words.tick(100), "100"), (words.tick(1.5e9), "1.5\u2009G"),
        (words.seconds(0.00831), "8.31\u2009ms"), (words.seconds(41.4), "41.4\u2009s"),
        (words.seconds(59.7), "1\u2009min 00\u2009s"), (words.seconds(169), "2\u2009min 49\u2009s"),
        (words.seconds(3720), "1\u2009h 02\u2009min"), (words.seconds(47.5 * 3600), "47\u2009h 30\u2009min"),
        (words.seconds(76 * 3600), "3\u2009d 04\u2009h"), (words.times(702753, 117769), "5.97\u00d7"),
        (words.guidance_name("2"), "s = 2"), (words.guidance_name("tag:1,4,5"), "TAG"),
        (words.guidance_name("tag:1,3,5"), "TAG 1\u20133, 5"),
        (words.guidance_name("interval:3,0.2,0.8"), "3 in 0.2\u20130.8"),
        (words.guidance_name("a new one"), "a new one"),
    ],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(1e-5, 9e8))
def test_number_keeps_three_digits(value: float) -> None:
    shown = float(words.number(value).replace("\u2009", ""))
    assert shown == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(
    ("ratio", "cosine", "tone", "said"),
    [
        (0.93, 0.75, "good", "Guidance is alive (gap ratio 0.93, cosine 0.75)."),
        (0.49, 0.9, "bad", "Guidance has collapsed"),
        (0.09, 0.2, "bad", "Guidance has collapsed"),
        (3.9, 0.26, "bad", "Guidance has lost its direction"),
        (0.61, 0.72, "fair", "alive but weakened"),
        (1.4, 0.9, "fair", "alive but exaggerated"),
    ],
)
def test_verdict_on_guidance(receipt: Receipt, ratio: float, cosine: float, tone: str, said: str) -> None:
    found = fabricated.fidelity(ratio, cosine)
    assert words.guidance_state(found)[0] == tone
    changed = receipt.model_copy(deep=True)
    changed.models["student"].fidelity = found
    assert said in " ".join(words.verdict(changed))


def test_verdict_is_computed_from_the_numbers(receipt: Receipt) -> None:
    said = " ".join(words.verdict(receipt))
    assert "5.97\u00d7 fewer parameters and 5.97\u00d7 fewer FLOPs an image" in said
    assert "best FD-digits is 12.9 (TAG) against the teacher\u2019s 8.90 (TAG); real test images score 3.80" in said
    assert "within the uncertainty" not in said
    close = receipt.model_copy(deep=True)
    close.models["student"].sweep[4].fd = Estimate(value=9.2, low=8.8, high=9.6)
    assert "within the uncertainty" in " ".join(words.verdict(close))
    lost = receipt.model_copy(deep=True)
    for point in lost.models["student"].sweep:
        point.fd = Estimate(value=None)
    assert "has diverged" in " ".join(words.verdict(lost))
    teacher, student = receipt.models["teacher"], receipt.models["student"]
    larger = receipt.model_copy(update={"models": {"teacher": student, "student": teacher}})
    assert "5.97\u00d7 more parameters" in " ".join(words.verdict(larger))
    equal = receipt.model_copy(update={"models": {"teacher": teacher, "student": teacher}})
    assert "no fewer parameters and no fewer FLOPs an image than its teacher" in " ".join(words.verdict(equal))


# pages


def test_tiles_say_which_way_a_cost_goes(receipt: Receipt) -> None:
    """A larger or slower student is no "0.17x fewer" one."""
    teacher, student = receipt.models["teacher"], receipt.models["student"]
    larger = receipt.model_copy(update={"models": {"teacher": student, "student": teacher}})
    smaller = [(tile.value, tile.label) for tile in views.tiles(receipt)[:3]]
    other = [(tile.value, tile.label) for tile in views.tiles(larger)[:3]]
    assert [value for value, _ in smaller] == [value for value, _ in other]
    assert [label.split(",")[0] for _, label in smaller] == ["fewer parameters", "fewer FLOPs an image", "faster"]
    assert [label.split(",")[0] for _, label in other] == ["more parameters", "more FLOPs an image", "slower"]


def test_unreadable_images_are_on_the_page(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    assert "left out" not in dict(views.data_facts(receipt.data))
    data = receipt.data.model_copy(update={"skipped": 12, "skipped_first": ["cat/3.png (truncated)"]})
    assert dict(views.data_facts(data))["left out"] == "12 unreadable, the first: cat/3.png (truncated)"
    changed = receipt.model_copy(update={"data": data})
    assert "cat/3.png (truncated)" in page(changed, folder, tmp_path / "report.html")


def test_report_shows_everything(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    path = write_report(receipt, folder, tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    text = check_page(html, plots=11)
    for part in ("Samples", "Turning the guidance dial", "Is guidance alive?", "Cost", "Training", "The numbers",
                 "Guidance sweep", "Lineage", "Protocol", "Recipe, as resolved", "channels:"):  # fmt: skip
        assert part in text
    assert html.count("data:image/png;base64,") == 2 + 2 * len(fabricated.GUIDANCE)
    assert html.index("Samples") < html.index("<svg") < html.index('<table class="numbers"')
    assert "12.9" in text
    assert "[12.1, 13.7]" in text
    loaded = Receipt.load(receipt.save(tmp_path / "receipt.json"))
    again = write_report(loaded, folder, tmp_path / "again.html")
    assert again.read_bytes() == path.read_bytes(), "a page made again from the receipt is the same page"


def test_pages_work_with_missing_pieces(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    teacher = receipt.models["teacher"]
    trained = receipt.model_copy(update={"models": {"teacher": teacher}, "kind": "train"})
    text = page(trained, folder, tmp_path)
    assert "The teacher has 703\u2009k parameters".replace("\u2009", " ") in text
    assert "Is guidance alive?" not in text
    bare = Receipt(kind="train", name="bare", seed=0, environment=receipt.environment, data=receipt.data)
    assert "Nothing has been measured yet." in page(bare, folder, tmp_path, plots=0)
    thin = receipt.model_copy(deep=True)
    thin.protocol = None
    for model in thin.models.values():
        model.cost, model.fidelity, model.images = None, None, {}
        for point in model.sweep:
            point.kid = point.class_agreement = point.fd_test = None
    thin.models["student"].guided = False
    text = page(thin, folder, tmp_path)
    assert "no guidance dial to turn" in text
    assert "KID" not in text
    lost = page(receipt, tmp_path / "elsewhere", tmp_path)
    assert "Samples" not in lost


def test_user_strings_are_escaped(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    changed = receipt.model_copy(deep=True)
    changed.name = changed.data.name = evil
    changed.data.classes[3] = evil
    changed.warnings = [evil]
    changed.recipe = {"note": evil, "</pre>": evil}
    fidelity = changed.models["student"].fidelity
    assert fidelity is not None
    fidelity.by_class[3].label = f"class {evil}"
    changed.models[evil + "$\\frac$"] = changed.models.pop("student")
    changed.training[1].method = "_" + evil
    path = write_report(changed, folder, tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    text = check_page(html, plots=11)
    assert "<script" not in html
    assert text.count(evil) > 8
    check_page(
        write_comparison([(folder, changed), (folder, receipt)], tmp_path / "c.html").read_text(encoding="utf-8")
    )


def test_pictures_outside_the_run_are_not_followed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    images, labels = fabricated.digits()
    drawn = pictures.class_grid(images, labels, fabricated.CLASSES)
    for place in (tmp_path / "secret.png", run / "grid.png"):
        pictures.save_png(drawn, place)
    (run / "text.png").write_text("not a picture")
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    assert views.picture(run, "grid.png", "") is not None
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "text.png", "none.png", "", None, "."):
        assert views.picture(run, path, "") is None, path


# comparison


def test_comparison(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    other = fabricated.receipt(tmp_path / "b", "composite", fabricated.fidelity(0.41, 0.52), shift=4.0)
    out = write_comparison([(folder / "receipt.json", receipt), (tmp_path / "b", other)], tmp_path / "c.html")
    text = check_page(out.read_text(encoding="utf-8"), plots=5)
    assert "Of 2 runs, dash-digits has the lowest FD-digits: 12.9 (TAG)." in text
    assert "In composite guidance has collapsed" in text
    assert "Warning" not in text
    assert text.count("teacher supervised") == 1, "the same teacher is one row"
    assert out.read_text(encoding="utf-8").count("data:image/png") == 2


def test_comparison_warns_of_each_differing_field(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    other = receipt.model_copy(update={"protocol": fabricated.protocol(samples=500, clip="none")})
    out = write_comparison([(folder, receipt), (folder, other)], tmp_path / "c.html")
    text = check_page(out.read_text(encoding="utf-8"))
    assert "The protocols differ in samples: 1000 / 500." in text
    assert "The protocols differ in clip: recompute / none." in text
    names = [run.name for run in compare.named_runs([(folder, receipt), (folder, other)])]
    assert len(set(names)) == 2, "runs of one name are told apart"


def test_the_floor_is_a_result_not_a_setting(receipt: Receipt) -> None:
    a, b = fabricated.protocol(), fabricated.protocol(floor=None)
    assert compare.protocol_differences([a, b]) == {}


def test_comparison_refuses_distances_of_different_spaces(receipt: Receipt, folder: Path, tmp_path: Path) -> None:
    extractor = fabricated.protocol().extractor.model_copy(update={"name": "FID", "sha256": "ee" * 32})
    for changes, said in (({"extractor": extractor}, "FID (eeeeeeee"), ({"reference_sha256": "ff" * 32}, "ffff")):
        other = receipt.model_copy(update={"protocol": fabricated.protocol(**changes)})
        with pytest.raises(InputError) as caught:
            write_comparison([(folder, receipt), (folder, other)], tmp_path / "c.html")
        message = str(caught.value)
        assert next(iter(changes)) in message
        assert said in message
        assert "\n" not in message
    with pytest.raises(InputError, match="two or more"):
        write_comparison([(folder, receipt)], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


# plots


def _heights(svg: str) -> list[float]:
    """y pixels of the first marker series, top is 0."""
    return [float(y) for y in re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="([\d.]+)"[^>]*var\(--c0\)', svg)]


def test_sweep_draws_every_value_at_its_height(receipt: Receipt) -> None:
    student = receipt.models["student"]
    svg = plots.sweep({"student": student}, "fd", "FD")
    assert svg is not None
    pixels = _heights(svg)
    drawn = np.array([[p.fd.low, p.fd.high, p.fd.value] for p in student.sweep], dtype=float).ravel()
    assert len(pixels) == 15
    # An affine map from value to pixel: every marker (caps and points) lies on one falling line.
    slope, offset = np.polyfit(sorted(drawn, reverse=True), sorted(pixels), 1)
    assert slope < 0
    assert np.allclose(sorted(pixels), slope * np.array(sorted(drawn, reverse=True)) + offset, atol=0.05)


def test_plots_of_nothing_are_nothing() -> None:
    assert plots.sweep({}, "fd", "FD") is None
    assert plots.fidelity_bins({}, "ratio", "Ratio") is None
    assert plots.curriculum({"a": []}) is None
    assert plots.frontier({"a": (1.0, Estimate(value=None))}, "F") is None
    assert curves.loss_curves({}, "Loss") is None
    assert curves.probe_curves({}, "Probe") is None


def test_a_hundred_classes_fit(receipt: Receipt) -> None:
    many = fabricated.fidelity()
    many.by_class = [many.by_class[0].model_copy(update={"label": f"class a long name {i}"}) for i in range(100)]
    svg = plots.fidelity_bins({"student": many}, "ratio", "Ratio", by="class")
    assert svg is not None
    assert svg.count("a long name") == 20


# training curves


def test_read_log_keeps_losses_and_gradient_norms_at_the_image_apart(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    told = {"loss": 1.0, "student_loss": 2.0, "dmd": 0.5, "pixel": 0.7, "dmd_norm": 3.0, "gan_norm": 4.0}
    told |= {"gan_weight": 0.1, "student_grad_norm": 9.0, "grad_norm": 8.0}
    log.write_text(json.dumps({"images": 16, "step": 1, "arm": "a", "lr": 1e-3, **told}) + "\n", encoding="utf-8")
    found = curves.read_log(log, "a")
    assert found.losses == {"loss": {16: 1.0}, "dmd": {16: 0.5}}
    assert found.norms == {"dmd_norm": {16: 3.0}, "gan_norm": {16: 4.0}}


def test_read_log_takes_its_own_arm_and_passes_over_the_rest(tmp_path: Path) -> None:
    lines = [
        {"images": 10, "arm": "a", "loss": 3.0, "x": 2.0, "lr": 1.0, "grad_norm": 9.0, "step": 1},
        {"images": 20, "arm": "a", "loss": math.nan, "x": 1.0},
        {"images": 20, "arm": "b", "loss": 7.0},
        {"images": 30, "arm": "a", "loss": 1.0},
        {"images": 30, "arm": "a", "loss": 2.0},
        {"images": 30, "arm": "a", "event": "rate", "images_per_s": 5.0, "loss": 100.0},
        {"images": 30, "arm": "a", "event": "probe", "ratio": 0.4, "cosine": 0.3},
        {"images": "many", "arm": "a", "loss": 1.0},
        [1, 2],
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"images": 40, "arm": "a", "lo', encoding="utf-8")
    found = curves.read_log(log, "a")
    assert found.losses == {"loss": {10: 3.0, 30: 2.0}, "x": {10: 2.0}}
    assert found.probe == {"ratio": {30: 0.4}, "cosine": {30: 0.3}}
    assert curves.read_log(log, "b").losses == {"loss": {20: 7.0}}
    assert curves.read_log(log, "unknown").losses == found.losses
    assert curves.read_log(tmp_path / "none", "a").losses == {}


def test_smoothing_has_no_bias_and_is_late_by_little() -> None:
    assert np.allclose(curves.smooth(np.full(500, 3.0)), 3.0)
    step = curves.smooth(np.repeat([1.0, 0.0], 500))
    assert step[0] == 1.0
    assert step[499] == pytest.approx(1.0)
    assert step[519] == pytest.approx((1 - 1 / 20) ** 20, rel=1e-6)


def test_other_students_are_named_beside_the_runs_own(receipt: Receipt) -> None:
    more = Receipt.model_validate(
        receipt.model_dump() | {"models": {**receipt.models, "rival": receipt.models["student"]}}
    )
    assert more.subject is not None
    assert more.subject[0] == "student"
    assert list(more.models) == ["teacher", "student", "rival"]
    (said,) = words.beside(more)
    assert said.startswith("Beside it, rival: gap ratio")
    assert words.beside(receipt) == []


def test_a_long_title_is_broken_into_lines_that_fit() -> None:
    title = "Gradient norms at the image: a stage with quite a long name that says all that was done to it"
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", svg.Panel(title, size=(4.9, 3.2)).svg())
    lines = [text for text in drawn if " " in text]
    assert " ".join(lines) == title
    assert len(lines) > 1
    assert max(map(len, lines)) <= svg.LETTERS * 4.9
