"""Numbers as a person reads them, and the verdict: a receipt in two or three plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..diffusion.guidance import TAG, Interval, parse_guidance
from ..evaluation.results import (
    Encoding,
    Estimate,
    FewShot,
    FewShotProtocol,
    Fidelity,
    ModelEvaluation,
    Protocol,
    ScalePoint,
)
from .receipt import Receipt

THIN = "\u2009"
MISSING = "\u2013"

# What the verdict calls a live dial. Under 0.5 the evaluation itself raises `collapsed` (dash.md 5.1). A ratio says
# nothing where the gap points elsewhere (an untrained null row: ratio 3.9, cosine 0.26), so the cosine is asked first.
DIRECTION_LOST, WEAK, EXAGGERATED = 0.5, 0.8, 1.25


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """``digits`` significant digits, thousands apart: 12.9, 0.931, 1 791, 0.00600, 6.1e-07."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _fixed(value, _decimals(value, digits), signed=signed)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub Markdown: the first column to the left, the others to the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines.insert(1, [":--", *["--:"] * (len(header) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def estimate(found: Estimate | None, *, signed: bool = False) -> str:
    """A value with its interval, all with the value's decimals: ``12.9 [12.1, 13.8]``."""
    if found is None or found.value is None:
        return MISSING
    text = number(found.value, signed=signed)
    if found.low is None or found.high is None:
        return text
    # A value near zero has more decimals than its interval deserves: the widest of the three sets them.
    widest = max(abs(found.value), abs(found.low), abs(found.high))
    decimals = _decimals(widest, 3)
    value, low, high = (_fixed(x, decimals, signed=signed) for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def plus_minus(found: Estimate | None, *, signed: bool = False) -> str:
    """A value with half the width of its (symmetric) interval, in the value's decimals: ``0.323 ± 0.069``."""
    if found is None or found.value is None:
        return MISSING
    if found.low is None or found.high is None:
        return number(found.value, signed=signed)
    half = (found.high - found.low) / 2
    decimals = _decimals(max(abs(found.value), half), 3)
    return f"{_fixed(found.value, decimals, signed=signed)} \u00b1 {_fixed(half, decimals)}"


def _decimals(value: float, digits: int) -> int | None:
    if value == 0:
        return 0
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.996 shows as 10.0
    return None if exponent < -5 or exponent > 8 else max(0, digits - 1 - exponent)


def _fixed(value: float, decimals: int | None, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{value:{sign}.2e}" if decimals is None else f"{value:{sign},.{decimals}f}"
    return text.replace(",", THIN).replace("-", "\u2212")


def count(value: int) -> str:
    """Every digit, thousands apart: ``702 753``."""
    return f"{value:,}".replace(",", THIN)


def si(value: float | None, unit: str = "") -> str:
    """Three significant digits with a prefix: ``703 k``, ``1.25 M``, ``18.4 GFLOP``."""
    if value is None or not math.isfinite(value):
        return MISSING
    step = min(max(math.floor(math.log10(abs(value)) / 3), 0), 5) if value else 0
    scaled = value / 1000**step
    if step < 5 and round(abs(scaled)) >= 1000:
        step, scaled = step + 1, scaled / 1000
    prefix = ("", "k", "M", "G", "T", "P")[step]
    text = number(scaled) if step or scaled != round(scaled) else f"{scaled:.0f}"
    return text + (THIN + prefix + unit if prefix + unit else "")


def tick(value: float) -> str:
    """A number on an axis, as ``si`` without zeros at its end: ``60 k``, ``1.5 G``."""
    head, gap, prefix = si(value).partition(THIN)
    return (head.rstrip("0").rstrip(".") if "." in head else head) + gap + prefix


def seconds(value: float | None) -> str:
    """``8.31 ms``, ``41.4 s``, ``2 min 49 s``, ``1 h 02 min``, ``3 d 04 h``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 1:
        return f"{number(value * 1000)}{THIN}ms" if value >= 1e-3 else f"{number(value * 1e6)}{THIN}µs"
    if value < 59.5:
        return f"{number(value)}{THIN}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}{THIN}h {minutes:02d}{THIN}min"
    return f"{hours // 24}{THIN}d {hours % 24:02d}{THIN}h"


def percent(found: Estimate | None) -> str:
    """``0.981 [0.97, 0.99]`` as ``98.1 % [97.0, 99.0]``."""
    if found is None or found.value is None:
        return MISSING
    text = f"{100 * found.value:.1f}{THIN}%"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def times(big: float | None, small: float | None) -> str | None:
    """``5.97×``, or None where there is no ratio."""
    return f"{number(big / small)}×" if big and small else None


def guidance_name(text: str) -> str:
    """``"tag:1,4,5"`` (the paper's) as ``TAG``; other schedules with their numbers; a constant as ``s = 2``."""
    scale = constant_scale(text)
    return short_guidance(text) if scale is None else f"s = {scale:g}"


def short_guidance(text: str) -> str:
    """As ``guidance_name``, a constant as its bare number."""
    try:
        schedule = parse_guidance(text)
    except ValueError:
        return text
    if isinstance(schedule, TAG):
        own = f" {schedule.s_min:g}\u2013{schedule.s_max:g}, {schedule.beta:g}"
        return "TAG" if schedule == TAG() else "TAG" + own
    if isinstance(schedule, Interval):
        return f"{schedule.scale:g} in {schedule.lo:g}\u2013{schedule.hi:g}"
    return f"{schedule.scale:g}"


def constant_scale(text: str) -> float | None:
    """The scale of a constant guidance, None for a schedule."""
    try:
        return float(text)
    except ValueError:
        return None


def guidance_state(fidelity: Fidelity) -> tuple[str, str]:
    """(tone, sentence) on whether the student's guidance lives; tone is ``good``, ``fair`` or ``bad``."""
    ratio, cosine = fidelity.overall.ratio.value, fidelity.overall.cosine.value
    figures = f"gap ratio {number(ratio, 2)}, cosine {number(cosine, 2)}"
    if fidelity.collapsed or (ratio is not None and ratio < 0.5):
        return "bad", f"Guidance has collapsed ({figures})."
    if ratio is None or cosine is None:
        return "bad", f"Guidance could not be measured ({figures})."
    if cosine < DIRECTION_LOST:
        return "bad", f"Guidance has lost its direction ({figures})."
    if ratio < WEAK:
        return "fair", f"Guidance is alive but weakened ({figures})."
    if ratio > EXAGGERATED:
        return "fair", f"Guidance is alive but exaggerated ({figures})."
    return "good", f"Guidance is alive ({figures})."


def overlap(a: Estimate, b: Estimate) -> bool | None:
    """Whether two intervals touch; None where one is missing."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.low <= b.high and b.low <= a.high


def metric(protocol: Protocol | None) -> str:
    """What distances are called; those to the very images that were trained on say so."""
    if protocol is None:
        return "FD"
    return protocol.extractor.name + (" to the shots" if alone(protocol) else "")


def alone(protocol: Protocol | None) -> bool:
    """Whether there are no images of the domain but the few that were trained on."""
    return protocol is not None and protocol.few_shot is not None and protocol.few_shot.alone


def verdict(receipt: Receipt) -> list[str]:
    """The receipt in plain sentences, computed from its numbers."""
    if receipt.subject is None:
        done = receipt.training[-1] if receipt.training else None
        trained = f"{done.name} saw {count(done.images_seen)} images in {seconds(done.seconds)}. " if done else ""
        return [f"{trained}Nothing has been measured yet."]
    role, model = receipt.subject
    teacher = receipt.teacher if role != receipt.teacher_role else None
    said = [_cost_sentence(role, model, teacher), _quality_sentence(receipt, role, model, teacher)]
    few = receipt.protocol.few_shot if receipt.protocol else None
    point = shown(model, few)
    if point is not None and point.few_shot is not None and few is not None:
        said.append(_alone_sentences(point.few_shot, few) if few.alone else _few_shot_sentence(point.few_shot, few))
    if model.encoding is not None:
        said.append(_encoding_sentence(model.encoding))
    elif model.fidelity is not None:
        said.append(guidance_state(model.fidelity)[1])
    elif not model.guided and not model.images_alone:
        said.append("It has no null branch, so there is no guidance dial to turn.")
    return [sentence for sentence in said if sentence]


def shown(model: ModelEvaluation, few: FewShotProtocol | None) -> ScalePoint | None:
    """The point that stands for a model: its best, or where a single image leaves none a distance, its first."""
    first = model.sweep[0] if model.sweep and few is not None and few.alone and few.shots == 1 else None
    return model.best or first


def beside(receipt: Receipt) -> list[str]:
    """A sentence for every other student that was measured with the run's own."""
    own = receipt.subject[0] if receipt.subject else None
    if receipt.kind == "chain" and receipt.teacher is not None:
        first = receipt.teacher
        return [_stage_sentence(name, m, first) for name, m in receipt.models.items() if m is not first]
    said = []
    for role, model in receipt.models.items():
        if role in ("teacher", own) or model.fidelity is None:
            continue
        overall = model.fidelity.overall
        best = f", best distance {number(model.best.fd.value)}" if model.best else ""
        ratio, cosine = number(overall.ratio.value, 2), number(overall.cosine.value, 2)
        said.append(f"Beside it, {role}: gap ratio {ratio}, cosine {cosine}{best}.")
    return said


def _few_shot_sentence(found: FewShot, few: FewShotProtocol) -> str:
    kept = percent(found.diversity_share.model_copy(update={"low": None}))
    copied = percent(found.memorised.model_copy(update={"low": None}))
    near = percent(Estimate(value=few.near))
    diversity = f"Its samples have {kept} of the diversity of real images" if found.diversity_share.value else ""
    copies = f"{copied} of them lie as near to one of the few as {near} of real images do"
    return f"{diversity}; {copies}." if diversity else f"{copies.replace('of them', 'of its samples')}."


def _alone_sentences(found: FewShot, few: FewShotProtocol) -> str:
    """Of a model whose few images are all there are of their domain."""
    if few.shots == 1:
        return (
            "There are no other images of the domain than the one it was trained on, so there is no distance to the "
            "domain, and whether its samples are copies is not known."
        )
    near, copied = (percent(Estimate(value=value)) for value in (few.near, found.memorised.value))
    copies = f"{copied} of its samples lie as near to one of them as the nearest {near} of them lie to another."
    if not few.copies_known:
        copies = "Whether its samples are copies is not known: these are all one picture."
    return (
        f"There are no other images of the domain than these {count(few.shots)}, so a low distance is a copy, not "
        f"quality. {copies}"
    )


def _encoding_sentence(found: Encoding) -> str:
    return (
        f"Images that it turns into noise in {found.steps} steps come back with a mean squared error of "
        f"{number(found.error.value)}; by the first model\u2019s own steps run backwards, "
        f"{number(found.coarse_error.value)} in as many and {number(found.fine_error.value)} in many."
    )


def _stage_sentence(name: str, model: ModelEvaluation, first: ModelEvaluation) -> str:
    said = [f"{name}:"]
    if model.cost and first.cost:
        fewer = _fewer(first.cost.flops_image, model.cost.flops_image, "FLOPs an image")
        said.append(f"NFE {model.cost.nfe}, {fewer},")
    if model.best and first.best and model.best.fd.value and first.best.fd.value:
        share = model.best.fd.value / first.best.fd.value
        said.append(f"best distance {number(model.best.fd.value)} ({share:.2f}× the first stage\u2019s)")
    if model.fidelity is not None:
        overall = model.fidelity.overall
        said.append(f"gap ratio {number(overall.ratio.value, 2)}, cosine {number(overall.cosine.value, 2)}")
    return " ".join(said).rstrip(",") + "."


def _cost_sentence(role: str, model: ModelEvaluation, teacher: ModelEvaluation | None) -> str:
    if model.cost is None:
        return ""
    mine, theirs = model.cost, teacher.cost if teacher else None
    if theirs is None:
        return f"The {role} has {si(mine.parameters)} parameters and needs {si(mine.flops_image, 'FLOP')} an image."
    parts = [
        _fewer(theirs.parameters, mine.parameters, "parameters"),
        _fewer(theirs.flops_image, mine.flops_image, "FLOPs an image"),
    ]
    return f"The {role} has {' and '.join(parts)} than its teacher."


def _fewer(theirs: float, mine: float, what: str) -> str:
    if theirs == mine:
        return f"no fewer {what}"
    return f"{times(theirs, mine)} fewer {what}" if theirs > mine else f"{times(mine, theirs)} more {what}"


def _quality_sentence(receipt: Receipt, role: str, model: ModelEvaluation, teacher: ModelEvaluation | None) -> str:
    if not model.sweep:
        return ""
    few = receipt.protocol.few_shot if receipt.protocol else None
    if few is not None and few.alone and few.shots == 1:
        return ""
    if model.best is None:
        return "Not one of its sample sets has a finite distance to the data: the model has diverged."
    best, name = model.best, receipt.protocol.extractor.name if receipt.protocol else "FD"
    if alone(receipt.protocol):
        name += " to the few" if model.images_alone else " to the images it was trained on"
    said = f"Its best {name} is {number(best.fd.value)} ({guidance_name(best.guidance)})"
    if model.images_alone:
        said = f"The images\u2019 {name} is {number(best.fd.value)}"
    other = teacher.best if teacher else None
    if other is not None:
        said += f" against the teacher\u2019s {number(other.fd.value)} ({guidance_name(other.guidance)})"
        if overlap(best.fd, other.fd):
            said += ", within the uncertainty"
    floor = receipt.protocol.floor if receipt.protocol else None
    if floor is not None and receipt.protocol is not None:
        halves = receipt.protocol.few_shot is not None
        said += f"; {'half of the real images score' if halves else 'real test images score'} {number(floor.value)}"
        said += " against the other half" if halves else ""
    if best.class_agreement is not None and best.class_agreement.value is not None:
        whose = "them" if model.images_alone else "its samples"
        said += f". {100 * best.class_agreement.value:.1f}{THIN}% of {whose} show the class that was asked for"
    return said + "."
