"""Whether the guidance dial survived: the student's guidance gap against the teacher's (dash.md 5.1, D18).

The gap ``d = cond - null`` is measured at identical (x_t, t, y) and in epsilon units for every prediction type.
Ratio and cosine alone hide a drift common to both branches, so each branch's own error always stands beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..data.dataset import ImageData, to_float
from ..diffusion.guidance import guidance_gap
from ..diffusion.sampling import image_noise
from ..errors import InputError
from ..models.denoiser import Denoiser
from .processes import gather_rows, share
from .results import Estimate, Fidelity, FidelityBin

COLLAPSE = 0.5
"""An overall ratio below this raises the alarm (the released evaluator's threshold)."""
COLUMNS = ("student", "teacher", "cosine", "defined", "gap", "cond", "null", "dot", "student_sq", "teacher_sq")
"""Per pair: the gaps' norms, their cosine and whether it is defined, squared errors, dot product, squared norms."""


@dataclass(frozen=True)
class Pairs:
    """Which images, timesteps and noise a measurement uses: a pure function of (seed, number, data)."""

    image: Tensor
    """(n,) int64 index into the split; every image comes once before any comes twice."""
    t: Tensor
    """(n,) int64 uniform in 0..T-1."""
    seed: int

    @classmethod
    def draw(cls, data: ImageData, T: int, pairs: int, seed: int) -> Pairs:
        if len(data) == 0 or pairs < 1:
            raise InputError("pairs", pairs, f"use 1 or more, and a split with images ({data.split} has {len(data)})")
        generator = torch.Generator().manual_seed(seed)
        cycles = [torch.randperm(len(data), generator=generator) for _ in range(-(-pairs // len(data)))]
        return cls(torch.cat(cycles)[:pairs], torch.randint(0, T, (pairs,), generator=generator), seed)

    def batch(self, data: ImageData, denoiser: Denoiser, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, labels)`` of pairs ``first .. stop - 1`` on the denoiser's device; the noise is the pair's own."""
        index, t = self.image[first:stop], self.t[first:stop].to(denoiser.device)
        x0 = to_float(data.images[index].to(denoiser.device))
        noise = image_noise(data.shape, self.seed, first, stop - first, denoiser.device)
        return denoiser.schedule.add_noise(x0, noise, t), t, data.labels[index].to(denoiser.device)


def epsilon_branches(denoiser: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(cond, null)`` as noise estimates (B, C, H, W) float32, whatever the network predicts."""
    cond, null = denoiser.branches(x_t, t, labels)
    return denoiser.epsilon(cond, x_t, t), denoiser.epsilon(null, x_t, t)


def compare_branches(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Per-pair quantities (B, len(COLUMNS)) float64 from the two models' ``(cond, null)`` (B, C, H, W).

    Norms run over all pixels, squared errors are means over pixels. The cosine is 0 where the student's gap is zero
    and left undefined (``defined`` 0) where the teacher's is.
    """
    (s_cond, s_null), (t_cond, t_null) = (
        # MPS has no float64.
        tuple((b.cpu() if b.device.type == "mps" else b).double().flatten(1) for b in branches)
        for branches in (student, teacher)
    )
    s_gap, t_gap = guidance_gap(s_cond, s_null), guidance_gap(t_cond, t_null)
    s_sq, t_sq, dot = s_gap.square().sum(1), t_gap.square().sum(1), (s_gap * t_gap).sum(1)
    cosine = torch.where((s_sq > 0) & (t_sq > 0), dot / (s_sq * t_sq).sqrt(), 0.0)
    errors = [(a - b).square().mean(1) for a, b in ((s_gap, t_gap), (s_cond, t_cond), (s_null, t_null))]
    return torch.stack([s_sq.sqrt(), t_sq.sqrt(), cosine, (t_sq > 0).double(), *errors, dot, s_sq, t_sq], 1)


def measure_fidelity(
    student: Denoiser,
    teacher: Denoiser,
    data: ImageData,
    *,
    pairs: int = 10_000,
    seed: int = 0,
    batch_size: int = 512,
    bootstrap: int = 200,
    bins: int = 10,
) -> Fidelity:
    """Guidance fidelity of ``student`` against ``teacher`` on ``pairs`` noisy images of ``data``.

    The pairs depend on (data, pairs, seed) alone, so all models measured with one seed see the same ones. Intervals
    are percentile bootstraps over images: where the split is cycled, pairs that share an image move together.

    Args:
        pairs: cycles through the split with fresh noise and timesteps where it is smaller.
        bootstrap: number of resamples; 0 for no intervals.
        bins: equal timestep ranges reported apart.

    Raises:
        InputError: the two models differ in schedule, classes or shape, so no (x_t, t, y) is common to them; or the
            data does not fit them.
    """
    check_comparable(student, teacher, data)
    drawn = Pairs.draw(data, teacher.schedule.T, pairs, seed)
    mine = share(pairs)
    tables = [torch.empty(0, len(COLUMNS), dtype=torch.float64)]
    with student.evaluating(), teacher.evaluating():
        for first in range(mine.start, mine.stop, batch_size):
            inputs = drawn.batch(data, teacher, first, min(first + batch_size, mine.stop))
            tables.append(
                compare_branches(epsilon_branches(student, *inputs), epsilon_branches(teacher, *inputs)).cpu()
            )
    table = gather_rows(torch.cat(tables))
    weights = _resampled(drawn.image, bootstrap, seed)
    labels = data.labels[drawn.image]
    everything = _summary("all", table, weights)
    ratio = everything.ratio.value
    return Fidelity(
        split=data.split,
        seed=seed,
        overall=everything,
        by_timestep=_by_timestep(table, weights, drawn.t, teacher.schedule.T, bins),
        by_class=[
            _summary(f"class {k}", table[labels == k], weights[:, labels == k])
            for k in range(data.num_classes)
            if bool((labels == k).any())
        ],
        teacher_gap_rms=math.sqrt(float(table[:, COLUMNS.index("teacher_sq")].mean()) / math.prod(data.shape)),
        collapsed=ratio is not None and ratio < COLLAPSE,
    )


class FidelityProbe:
    """A small fixed measurement for the collapse alarm during training: the teacher's outputs are computed once.

    Args:
        teacher: frozen; not kept.
        data: the validation split.
        pairs: 128 give the ratio to a few per cent.
    """

    def __init__(self, teacher: Denoiser, data: ImageData, *, pairs: int = 128, seed: int = 0) -> None:
        drawn = Pairs.draw(data, teacher.schedule.T, pairs, seed)
        self._inputs = drawn.batch(data, teacher, 0, pairs)
        with teacher.evaluating():
            self._teacher = epsilon_branches(teacher, *self._inputs)

    def __call__(self, student: Denoiser) -> dict[str, float]:
        """``ratio``, ``cosine``, ``gap_mse``, ``cond_mse`` and ``null_mse`` of the student, as in ``FidelityBin``."""
        with student.evaluating():
            table = compare_branches(epsilon_branches(student, *self._inputs), self._teacher)
        values = _statistics(table.mean(0, keepdim=True).cpu())
        return {name: float(value) for name, value in values.items() if name != "best_rescale"}


def check_comparable(student: Denoiser, teacher: Denoiser, data: ImageData) -> None:
    """Raises InputError unless both models share schedule, classes and shape with each other and with ``data``."""
    for name, mine, theirs in (
        ("num_classes", student.num_classes, teacher.num_classes),
        ("sample_shape", student.sample_shape, teacher.sample_shape),
    ):
        if mine != theirs:
            raise InputError(f"student.{name}", mine, f"compare with a teacher of the same {name} (it has {theirs})")
    if not student.schedule.same_as(teacher.schedule):
        mend = f"compare models of one noise schedule (the teacher has {teacher.schedule.name}, T={teacher.schedule.T})"
        raise InputError("student.schedule", f"{student.schedule.name}, T={student.schedule.T}", mend)
    if data.shape != teacher.sample_shape or data.num_classes > teacher.num_classes:
        mend = f"use data of shape {teacher.sample_shape} with at most {teacher.num_classes} classes"
        raise InputError("data", f"{data.name} {data.shape}, {data.num_classes} classes", mend)


def _statistics(means: Tensor) -> dict[str, Tensor]:
    """The six reported quantities (R,) from weighted column means (R, len(COLUMNS)); NaN where undefined."""
    column = dict(zip(COLUMNS, means.unbind(1), strict=True))
    return {
        "ratio": column["student"] / column["teacher"],
        "cosine": column["cosine"] / column["defined"],
        "gap_mse": column["gap"],
        "cond_mse": column["cond"],
        "null_mse": column["null"],
        "best_rescale": column["dot"] / column["student_sq"],
    }


def _resampled(image: Tensor, draws: int, seed: int) -> Tensor:
    """Bootstrap weights (draws, n) float64: how often each pair's image was drawn, images drawn with replacement."""
    distinct, member = image.unique(return_inverse=True)
    count = len(distinct)
    generator = torch.Generator().manual_seed(seed + 1)
    chosen = torch.randint(0, count, (draws, count), generator=generator)
    times = torch.zeros(draws, count, dtype=torch.float64)
    times.scatter_add_(1, chosen, torch.ones_like(times))
    return times[:, member]


def _summary(label: str, table: Tensor, weights: Tensor) -> FidelityBin:
    """One bin from its pairs' rows (n, columns) and bootstrap weights (draws, n)."""
    values = _statistics(table.mean(0, keepdim=True))
    # A resample may miss a small bin altogether: 0/0 is NaN, which Estimate.of leaves out.
    draws = _statistics(weights @ table / weights.sum(1, keepdim=True))
    estimates = {name: Estimate.of(float(value), draws[name].tolist()) for name, value in values.items()}
    return FidelityBin(label=label, pairs=len(table), **estimates)


def _by_timestep(table: Tensor, weights: Tensor, t: Tensor, T: int, bins: int) -> list[FidelityBin]:
    """Equal ranges of timesteps; those that no pair fell into are left out."""
    edges = [T * i // bins for i in range(bins + 1)]
    found = []
    for low, high in pairwise(edges):
        inside = (t >= low) & (t < high)
        if bool(inside.any()):
            found.append(_summary(f"t {low}-{high - 1}", table[inside], weights[:, inside]))
    return found
