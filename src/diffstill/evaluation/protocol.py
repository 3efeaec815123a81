"""One protocol for every model: the same noise, labels, reference, extractor and guidance settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion.guidance import Constant, GuidanceSchedule, parse_guidance
from ..diffusion.sampling import ClipMode, count_nfe
from ..errors import InputError
from ..models.denoiser import Denoiser
from ..models.lineage import weights_sha256
from .cost import measure_cost
from .encoding import measure_encoding
from .features import Extractor, extract
from .frechet import FeatureStats, frechet_estimate
from .guidance_fidelity import check_comparable, measure_fidelity
from .intervals import mean_interval, pool, proportion
from .neighbours import KernelDistance, Manifold, precision_recall
from .processes import gather_rows, share
from .results import Cost, Estimate, Fidelity, ModelEvaluation, Protocol, ScalePoint
from .sampling import sample_images

if TYPE_CHECKING:
    from ..data.dataset import ImageData
    from ..data.sources import DataSplits

Progress = Callable[[float, str], None]
"""Called with the share of the work done, 0 to 1, and a few words on what is being done."""


@dataclass(frozen=True)
class EvalSettings:
    """How a model is measured; equal settings, equal protocol."""

    samples: int = 1000
    """Generated images a seed and guidance setting; distances are biased upward at small numbers, alike for all."""
    steps: int = 50
    guidance: tuple[str, ...] = ("1", "1.5", "2", "3", "4", "tag:1,4,5")
    seeds: tuple[int, ...] = (0,)
    """Sampling seeds. From three on, intervals come from their spread."""
    pairs: int = 2000
    """Held-out (x_t, t, y) for guidance fidelity."""
    batch_size: int = 500
    clip: ClipMode = "recompute"
    neighbours: int = 3
    """k of precision and recall."""
    neighbour_points: int = 10_000
    """Points a side at most for precision, recall and KID, whose cost grows with their square."""
    bootstrap: int = 200
    cost_batches: tuple[int, ...] = (1, 64)
    cost_seconds: float = 4.0
    """Time for the latency runs of one batch size; two runs are made in any case."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "pairs", "batch_size", "neighbours"), 1)
        least |= dict.fromkeys(("samples", "neighbour_points"), 2 * (self.neighbours + 1))
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"evaluation.{name}", getattr(self, name), f"use {low} or more")
        for name in ("guidance", "seeds"):
            if not getattr(self, name):
                raise InputError(f"evaluation.{name}", getattr(self, name), "give at least one")
        try:
            self.schedules()
        except ValueError as error:
            raise InputError("evaluation.guidance", list(self.guidance), str(error)) from None

    def schedules(self) -> list[GuidanceSchedule]:
        """The guidance settings, parsed."""
        return [parse_guidance(text) for text in self.guidance]


class Evaluator:
    """Measures models against one data set under one protocol.

    The reference is the training split and the held-out test split stands beside it. Their own distance is the
    floor: what fresh images of the data itself score, in the number that the test split has. With several processes
    each samples its share of the images; all return the same results.

    Args:
        data: needs a training split; without test images there is no floor and no ``fd_test``.
        extractor: on the device it is to run on. Models are evaluated on their own device.
    """

    def __init__(self, data: DataSplits, extractor: Extractor, settings: EvalSettings | None = None) -> None:
        self.data, self.extractor = data, extractor
        self.settings = settings or EvalSettings()
        if len(data.train) < 2 * (self.settings.neighbours + 1):
            raise InputError("data", f"{data.name} with {len(data.train)} training images", "use more images")
        self._reference, self._points = self._read_reference(data.train.images)
        self._manifold = Manifold(self._points, self.settings.neighbours)
        self._kernel_distance = KernelDistance(self._points)
        self._test: FeatureStats | None = None
        floor = None
        if len(data.test) >= 2:
            held_out = self._features(data.test.images)
            self._test, floor = FeatureStats.of(held_out), frechet_estimate(held_out, self._reference)
        self.protocol = Protocol(
            extractor=extractor.info,
            reference=f"{data.name} train, {len(data.train)} images",
            reference_sha256=data.train.fingerprint(),
            samples=self.settings.samples,
            steps=self.settings.steps,
            clip=self.settings.clip,
            guidance=[str(schedule) for schedule in self.settings.schedules()],
            seeds=list(self.settings.seeds),
            floor=floor,
        )

    def evaluate(
        self,
        denoiser: Denoiser,
        name: str,
        method: str = "",
        *,
        teacher: Denoiser | None = None,
        guided: bool = True,
        cost: bool = True,
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> ModelEvaluation:
        """Everything there is to measure of one model: the sweep, the cost, and fidelity where a teacher is given.

        Args:
            denoiser: with the weights to be evaluated (the EMA's).
            teacher: what the guidance gap is compared with, on held-out images; unguided students have none.
            guided: False measures one setting, scale 1 in one pass a step.
            steps: sampling steps, where they are not the protocol's (a teacher beside a student of fewer steps).

        Raises:
            InputError: the model does not fit the data, or the teacher does not fit the model.
        """
        if denoiser.sampler == "encode":
            return self._encoder(denoiser, name, method, teacher, cost)
        steps = steps or self.settings.steps
        self._check(denoiser, steps)
        schedules: list[GuidanceSchedule] = self.settings.schedules() if guided else [Constant(1.0)]
        compared = teacher if guided and len(self._held_out) else None
        if compared is not None:
            check_comparable(denoiser, compared, self._held_out)
        meter = _Meter(progress, self._work(denoiser, schedules, steps))
        anchors: dict[int, Tensor] = {}
        sweep = [self._point(denoiser, schedule, guided, steps, anchors, meter) for schedule in schedules]
        meter.say("guidance fidelity and cost")
        fidelity = self._fidelity(denoiser, compared) if compared is not None else None
        measured = self._cost(denoiser, guided, steps) if cost else None
        meter.finish()
        return ModelEvaluation(
            name=name,
            method=method,
            sha256=weights_sha256(denoiser.network),
            guided=guided,
            steps=steps,
            sampler=denoiser.sampler,
            cost=measured,
            sweep=sweep,
            fidelity=fidelity,
        )

    def _encoder(
        self, denoiser: Denoiser, name: str, method: str, teacher: Denoiser | None, cost: bool
    ) -> ModelEvaluation:
        """An encoder draws no images: its noise is decoded by the model it goes back to."""
        decoder = teacher.whole[0] if teacher is not None else None
        held = self._held_out
        known = decoder is not None and decoder.sampler == "ddim" and len(held)
        return ModelEvaluation(
            name=name,
            method=method,
            sha256=weights_sha256(denoiser.network),
            guided=denoiser.takes_scale,
            steps=denoiser.schedule.T,
            sampler=denoiser.sampler,
            cost=self._cost(denoiser, denoiser.takes_scale, denoiser.schedule.T) if cost else None,
            encoding=measure_encoding(denoiser, decoder, held) if known and decoder is not None else None,
        )

    def _point(
        self,
        denoiser: Denoiser,
        schedule: GuidanceSchedule,
        guided: bool,
        steps: int,
        anchors: dict[int, Tensor],
        meter: _Meter,
    ) -> ScalePoint:
        """One guidance setting, pooled over the seeds.

        Args:
            anchors: sampling seed -> features of the first setting's images, filled in by the first setting.
        """
        nfe = count_nfe(schedule, denoiser.schedule.T, steps, one_pass=denoiser.takes_scale)
        mine = share(self.settings.samples)
        found: dict[str, list[Estimate]] = {}
        for seed in self.settings.seeds:
            images = sample_images(
                denoiser,
                len(mine),
                guidance=schedule,
                steps=steps,
                seed=seed,
                batch_size=self.settings.batch_size,
                clip=self.settings.clip,
                first=mine.start,
                guided=guided,
                progress=lambda done: meter.at(done / len(mine) * nfe * self.settings.samples, f"guidance {schedule}"),
            )
            meter.add(nfe * self.settings.samples)
            features = gather_rows(extract(self.extractor, images, self.settings.batch_size))
            metrics = self._metrics(features, images, mine.start, denoiser.num_classes)
            if seed in anchors:
                metrics["response"] = mean_interval((features - anchors[seed]).norm(dim=1))
            anchors.setdefault(seed, features)
            for metric, estimate in metrics.items():
                found.setdefault(metric, []).append(estimate)
        return ScalePoint(guidance=str(schedule), nfe=nfe, **{metric: pool(each) for metric, each in found.items()})

    def _metrics(self, features: Tensor, images: Tensor, first: int, num_classes: int) -> dict[str, Estimate]:
        """The metrics of one seed: ``features`` (N, dim) of all images, ``images`` (n, C, H, W) uint8 this process's
        from index ``first`` on."""
        settings = self.settings
        points = features[: settings.neighbour_points]
        near = precision_recall(self._points, points, settings.neighbours, real_manifold=self._manifold)
        found = {
            "fd": frechet_estimate(features, self._reference),
            "kid": self._kernel_distance.estimate(points),
            "precision": near.precision,
            "recall": near.recall,
        }
        if self._test is not None:
            found["fd_test"] = frechet_estimate(features, self._test)
        logits = [self.extractor.classify(part) for part in images.split(settings.batch_size)]
        known = [part for part in logits if part is not None]
        if known:
            labels = torch.arange(first, first + len(images)) % num_classes
            right = gather_rows((torch.cat(known).argmax(1) == labels).long())
            found["class_agreement"] = proportion(int(right.sum()), len(right))
        return found

    def _fidelity(self, denoiser: Denoiser, teacher: Denoiser) -> Fidelity:
        return measure_fidelity(
            denoiser,
            teacher,
            self._held_out,
            pairs=self.settings.pairs,
            seed=self.settings.seeds[0],
            batch_size=self.settings.batch_size,
            bootstrap=self.settings.bootstrap,
        )

    def _cost(self, denoiser: Denoiser, guided: bool, steps: int) -> Cost:
        return measure_cost(
            denoiser,
            steps=steps,
            guided=guided,
            batches=self.settings.cost_batches,
            budget_s=self.settings.cost_seconds,
            clip=self.settings.clip,
        )

    @property
    def _held_out(self) -> ImageData:
        return self.data.test if len(self.data.test) else self.data.val

    def _read_reference(self, images: Tensor) -> tuple[FeatureStats, Tensor]:
        """Statistics of all images' features and a fixed random choice of the features themselves.

        Streamed: no process holds more features than a batch and the choice.
        """
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chosen = order[: self.settings.neighbour_points].sort().values
        mine, size = share(len(images)), self.settings.batch_size
        stats = FeatureStats(self.extractor.info.dim)
        kept = [torch.empty(0, self.extractor.info.dim)]
        for start in range(mine.start, mine.stop, size):
            stop = min(start + size, mine.stop)
            rows = extract(self.extractor, images[start:stop], size)
            stats.update(rows)
            kept.append(rows[chosen[(chosen >= start) & (chosen < stop)] - start])
        return stats.all_reduce(), gather_rows(torch.cat(kept))

    def _features(self, images: Tensor) -> Tensor:
        mine = share(len(images))
        return gather_rows(extract(self.extractor, images[mine.start : mine.stop], self.settings.batch_size))

    def _work(self, denoiser: Denoiser, schedules: list[GuidanceSchedule], steps: int) -> float:
        """Network evaluations of the sweep."""
        one_pass = denoiser.takes_scale
        once = sum(count_nfe(schedule, denoiser.schedule.T, steps, one_pass=one_pass) for schedule in schedules)
        return float(once * self.settings.samples * len(self.settings.seeds))

    def _check(self, denoiser: Denoiser, steps: int) -> None:
        if denoiser.sample_shape != self.data.shape:
            mend = f"evaluate it on data of that shape ({self.data.name} is {self.data.shape})"
            raise InputError("model.sample_shape", denoiser.sample_shape, mend)
        if denoiser.num_classes != self.data.num_classes:
            mend = f"evaluate it on its own data ({self.data.name} has {self.data.num_classes} classes)"
            raise InputError("model.num_classes", denoiser.num_classes, mend)
        if steps > denoiser.schedule.T:
            raise InputError("evaluation.steps", steps, f"use 1..{denoiser.schedule.T}")


class _Meter:
    """Turns network evaluations into a share of the work; the last tenth is for fidelity and cost."""

    def __init__(self, progress: Progress | None, total: float) -> None:
        self._progress, self._total, self._done = progress, total, 0.0

    def at(self, inside: float, note: str) -> None:
        if self._progress is not None:
            self._progress(0.9 * (self._done + inside) / self._total, note)

    def add(self, amount: float) -> None:
        self._done += amount

    def say(self, note: str) -> None:
        self.at(0.0, note)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(1.0, "done")
