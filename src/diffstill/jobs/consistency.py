"""``diffstill consistency``: does a student draw what its teacher draws from the same noise?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..disk import write_text
from ..engine.runtime import Runtime
from ..errors import InputError, RunFailed
from ..evaluation.features import extract
from ..evaluation.paired import PairFigures, compare_pairs, compare_strangers
from ..evaluation.results import Estimate
from ..evaluation.sampling import sample_images
from .finish import extractor_for
from .opened import Drawer, How, Told, check_alike, check_picture, data_of, draw_rows, drawer, open_model, short
from .ui import Ui

CLASSES, NOISES = 10, 3
"""In the picture: columns, and noises a class."""


def consistency(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    how: How,
    *,
    teacher: str,
    count: int = 256,
    teacher_steps: int | None = None,
    data: str | None = None,
) -> Told:
    """Draws ``count`` images from one noise by both models, measures how alike they are, and shows some.

    Beside the pairs stand the strangers: the student's images against teacher images of the same class and other
    noise. Pairs that are no more alike than strangers have nothing but their class in common. The figures are also
    written as JSON beside the picture.

    Raises:
        InputError: models of different images or classes, or for the stochastic sampler; data that is not known.
        RunFailed: the files cannot be written.
    """
    check_picture(out, count)
    if count < 2:
        raise InputError("n", count, "use 2 or more: strangers are two images of a class")
    student = drawer(open_model(source, runtime.device), how.guidance, how.steps, how.clip)
    opened = open_model(teacher, runtime.device, "teacher")
    original = drawer(opened, how.guidance, teacher_steps, how.clip, steps_field="teacher-steps")
    check_alike(student.denoiser, original.denoiser, "teacher")
    splits, protocol = data_of(student.model, data)
    extractor = extractor_for(protocol, splits, runtime, ui)
    # Of many classes the first ones, so that each has two images.
    labels = torch.arange(count) % min(student.denoiser.num_classes, count // 2)
    theirs, mine = (_drawn(who, labels, how, ui, role) for who, role in ((original, "teacher"), (student, "student")))
    seen, seen_theirs = (extract(extractor, images, how.batch_size) for images in (mine, theirs))
    paired = compare_pairs(mine, theirs, seen, seen_theirs)
    unpaired = compare_strangers(mine, theirs, seen, seen_theirs, labels)
    figures: dict[str, Any] = {
        "model": student.name,
        "teacher": original.name,
        "steps": student.steps,
        "teacher_steps": original.steps,
        "guidance": str(student.scale),
        "clip": how.clip,
        "seed": how.seed,
        "data": splits.name,
        "extractor": extractor.info.model_dump(mode="json"),
        "paired": paired.model_dump(mode="json"),
        "unpaired": unpaired.model_dump(mode="json"),
    }
    _draw(out, theirs, mine, labels, (original.steps, student.steps), student.model.class_names)
    beside = out.with_suffix(".json")
    try:
        write_text(beside, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise RunFailed(f"cannot write {beside}: {error}") from error
    return Told(out, figures, _lines(figures, paired, unpaired))


def _drawn(who: Drawer, labels: Tensor, how: How, ui: Ui, role: str) -> Tensor:
    """Images (N, C, H, W) uint8; image i of both models starts from the same noise."""
    with ui.bar(role, len(labels)) as bar:
        return sample_images(
            who.denoiser,
            len(labels),
            guidance=who.scale,
            steps=who.steps,
            seed=how.seed,
            batch_size=how.batch_size,
            clip=how.clip,
            labels=labels,
            guided=who.model.guided,
            progress=bar.update,
        )


def _draw(
    out: Path, theirs: Tensor, mine: Tensor, labels: Tensor, taken: tuple[int, int], class_names: tuple[str, ...]
) -> None:
    """The teacher's row above the student's, one noise after the other, one class a column."""
    used = int(labels.max()) + 1
    columns, noises = min(CLASSES, used), min(NOISES, len(labels) // used)
    rows: list[Tensor] = []
    for noise in range(noises):
        part = slice(noise * used, noise * used + columns)
        rows += [theirs[part], mine[part]]
    names = [f"teacher, {_steps(taken[0])}", f"student, {_steps(taken[1])}"] * noises
    draw_rows(out, rows, names, [short(name) for name in class_names[:columns]])


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"


def _lines(figures: dict[str, Any], paired: PairFigures, unpaired: PairFigures) -> tuple[str, ...]:
    named = figures["extractor"]["name"]
    rows = [
        ("", "same noise", "other noise, same class"),
        ("PSNR, dB", _told(paired.psnr, 2, "infinite (all pixels equal)"), _told(unpaired.psnr, 2, "infinite")),
        ("SSIM", _told(paired.ssim, 3), _told(unpaired.ssim, 3)),
        (f"distance in the features of {named}", _told(paired.distance, 3), _told(unpaired.distance, 3)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    head = (
        f"{figures['model']} in {_steps(figures['steps'])} against {figures['teacher']} in "
        f"{_steps(figures['teacher_steps'])}: {paired.pairs} images at guidance {figures['guidance']}"
    )
    return (head, *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows))


def _told(estimate: Estimate, digits: int, infinite: str = "not finite") -> str:
    if estimate.value is None:
        return infinite
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return f"{estimate.value:.{digits}f}{interval}"
