"""What ``cifar10.py`` found, in one JSON: every model beside the teacher, the aims and whether they are met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from problem import CUDA_AIM

from diffstill.evaluation.results import ModelEvaluation, ScalePoint
from diffstill.report import words
from diffstill.report.arena import ArenaArm, ArenaResult, best_fd, fd_at, fidelity

PAPER_IMAGES = {"teacher": 25_000_000, "student": 15_000_000}
PAPER = {
    "teacher": {"parameters": 35_800_000, "FID": 5.47},
    "dash": {"parameters": 6_100_000, "FID": 8.87, "IS": 9.31, "gap ratio": 0.91},
    "composite": {"parameters": 6_100_000, "FID": 13.84},
    "scratch": {"parameters": 6_100_000, "FID": 20.47},
}
"""arXiv 2606.00798: FID by Inception, 50,000 samples, 50 DDIM steps, TAG guidance. Not to be set beside FD-ResNet56
but as ratios to the teacher."""
POINT = ("fd", "fd_test", "kid", "precision", "recall", "class_agreement", "inception_score")
PARTS = ("ratio", "cosine", "gap_mse", "cond_mse", "null_mse")


def collect(
    found: ArenaResult, ladder: Mapping[str, Any], planned: Mapping[str, Any], *, smoke: bool
) -> dict[str, Any]:
    """Everything as JSON-able data."""
    return {
        "format": "diffstill-cifar10/1",
        "smoke": smoke,
        "environment": found.environment.model_dump(mode="json"),
        "protocol": found.protocol.model_dump(mode="json"),
        "plan": dict(planned),
        "paper": {"images": PAPER_IMAGES, "models": PAPER},
        "teacher": _teacher(found.teacher, planned["images"]["teacher"]),
        "arms": {arm.name: _arm(arm) for arm in found.arms},
        "aims": aims(found, ladder),
        "throughput": dict(ladder),
        "notes": found.notes,
    }


def _teacher(model: ModelEvaluation, images: int) -> dict[str, Any]:
    return {
        "images": images,
        "cost": model.cost.model_dump(mode="json") if model.cost else None,
        "sweep": {point.guidance: _point(point) for point in model.sweep},
    }


def _point(point: ScalePoint) -> dict[str, Any]:
    told = {name: getattr(point, name) for name in POINT}
    return {"nfe": point.nfe} | {name: e.model_dump(mode="json") for name, e in told.items() if e is not None}


def _arm(arm: ArenaArm) -> dict[str, Any]:
    first = arm.seeds[0]
    cost = first.evaluation.cost
    return {
        "label": arm.label,
        "parameters": arm.parameters,
        "images": first.images_seen,
        "seconds": [seed.seconds for seed in arm.seeds],
        "cost": cost.model_dump(mode="json") if cost else None,
        "sweep": [{point.guidance: _point(point) for point in seed.evaluation.sweep} for seed in arm.seeds],
        "fidelity": {part: arm.mean(fidelity(part)).model_dump(mode="json") for part in PARTS},
        "best fd": arm.mean(best_fd).model_dump(mode="json"),
    }


def aims(found: ArenaResult, ladder: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The aims that were set before anything was measured, each with what came out; ``met`` is null where it could not
    be measured."""
    made = [_excess(found, point.guidance) for point in found.teacher.sweep]
    made.append(_order(found))
    dash = found.arm("dash")
    ratio = dash.mean(fidelity("ratio")).value if dash else None
    made.append(_aim("gap ratio of DASH at least", 0.85, ratio, lambda value, aim: value >= aim))
    steps = {each["batch"]: each for each in ladder["ladders"] if each["work"] == "distil" and each["nets"] == "cifar"}
    for batch, least in CUDA_AIM.items():
        ran = steps.get(batch, {}).get("library", {}).get("ratio")
        made.append(
            _aim(
                f"DASH step at batch {batch}, over the straightforward loop's images/s, at least",
                least,
                ran["median"] if ran else None,
                lambda value, aim: value >= aim,
            )
        )
    return made


def _aim(name: str, aim: float, value: float | None, holds: Callable[[float, float], bool]) -> dict[str, Any]:
    return {"name": name, "aim": aim, "value": value, "met": None if value is None else holds(value, aim)}


def _fd(found: ArenaResult, name: str, guidance: str) -> float | None:
    arm = found.arm(name)
    return arm.mean(fd_at(guidance)).value if arm else None


def _excess(found: ArenaResult, guidance: str) -> dict[str, Any]:
    """DASH's distance above the teacher's over scratch's distance above it, at one sampler. Where scratch is no farther
    than the teacher there is nothing to compare with."""
    teacher = next(point.fd.value for point in found.teacher.sweep if point.guidance == guidance)
    dash, scratch = _fd(found, "dash", guidance), _fd(found, "scratch", guidance)
    share = None
    if teacher is not None and dash is not None and scratch is not None and scratch > teacher:
        share = (dash - teacher) / (scratch - teacher)
    name = f"DASH's distance above its teacher's, of scratch's, at guidance {guidance}, at most"
    return _aim(name, 0.25, share, lambda value, aim: value <= aim)


def _order(found: ArenaResult) -> dict[str, Any]:
    """DASH before composite before scratch, each at its best guidance."""
    names = ("dash", "composite", "scratch")
    best = [arm.mean(best_fd).value if (arm := found.arm(name)) else None for name in names]
    known = [value for value in best if value is not None]
    met = None if len(known) < len(names) else known == sorted(known)
    return {"name": "DASH better than composite better than scratch", "aim": list(names), "value": best, "met": met}


def table(found: Mapping[str, Any]) -> str:
    """The short table for the screen and the page: a row a model, distances by guidance, the gap."""
    settings = list(found["teacher"]["sweep"])
    extractor = found["protocol"]["extractor"]["name"]
    header = ["", "parameters", "images", *(f"{extractor}, {words.guidance_name(g)}" for g in settings)]
    header += ["gap ratio", "cosine"]
    teacher = found["teacher"]
    size = teacher["cost"]["parameters"] if teacher["cost"] else None
    rows = [["Teacher", words.count(size) if size else words.MISSING, words.count(teacher["images"])]]
    rows[0] += [words.number(teacher["sweep"][g]["fd"]["value"]) for g in settings] + ["1", "1"]
    for arm in found["arms"].values():
        means = [[seed[g]["fd"]["value"] for seed in arm["sweep"] if g in seed] for g in settings]
        cells = [words.number(sum(m) / len(m)) if m and None not in m else words.MISSING for m in means]
        gap = [words.number(arm["fidelity"][part]["value"]) for part in ("ratio", "cosine")]
        rows.append([arm["label"], words.count(arm["parameters"]), words.count(arm["images"]), *cells, *gap])
    return words.markdown(header, rows)


def aims_table(found: Mapping[str, Any]) -> str:
    """The aims, a row each."""

    def shown(value: Any) -> str:
        if value is None:
            return words.MISSING
        if isinstance(value, list):
            return " < ".join(words.number(v) if isinstance(v, float) else str(v) for v in value)
        return words.number(value)

    said = {True: "met", False: "missed", None: "not measured"}
    rows = [[aim["name"], shown(aim["aim"]), shown(aim["value"]), said[aim["met"]]] for aim in found["aims"]]
    return words.markdown(["aim", "set", "measured", ""], rows)
