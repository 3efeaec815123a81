"""One protocol for every model: the same noise, labels, reference, extractor and guidance settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion.guidance import Constant, GuidanceSchedule
from ..diffusion.sampling import count_nfe
from ..errors import InputError
from ..models.denoiser import Denoiser
from ..models.lineage import weights_sha256
from .cost import measure_cost
from .distances import Distance, FeatureDistance
from .encoding import measure_encoding
from .features import Extractor, extract, extract_all
from .few_shot import FewShotFigures, pooled, repeated
from .frechet import FeatureStats, frechet_estimate
from .guidance_fidelity import check_comparable, measure_fidelity
from .inception_score import inception_score
from .intervals import mean_interval, pool, proportion
from .processes import gather_rows, share
from .reference import Reference, check_reference, floors, read_statistics
from .results import Cost, Estimate, FewShot, Fidelity, ModelEvaluation, Protocol, ScalePoint
from .samples import SampleStore
from .sampling import sample_images
from .settings import EvalSettings

if TYPE_CHECKING:
    from ..data.dataset import ImageData
    from ..data.sources import DataSplits

Progress = Callable[[float, str], None]
"""Called with the share of the work done, 0 to 1, and a few words on what is being done."""
REPLICATED = "shots-replicated"
"""The name of what does nothing but repeat the few images."""


class Evaluator:
    """Measures models against one data set under one protocol.

    The reference is the training split and the held-out test split stands beside it. Their own distance is the
    floor: what fresh images of the data itself score, in the number that the test split has. With several processes
    each samples its share of the images; all return the same results.

    A model made from a few images (the training split) is measured otherwise: the reference is the test split, all
    other images of the domain. The few are too few to be one, and a model that repeats them would look perfect. The
    floor is the distance between two halves of the test images, and samples are looked at for diversity, copies of
    the few, and what is left of the source domain. Where the few are all the images there are, they are the reference
    after all: the protocol says so, there is no floor, and what only other images could tell is null.

    Args:
        data: needs a training split; without test images there is no floor and no ``fd_test``.
        extractor: on the device it is to run on. Models are evaluated on their own device.
        few_shot: None: as the data says.
        source: images of the domain that a few-shot model was adapted from.
        distance: between images, for diversity and copies; None: in the extractor's features.
        store: where the images that are drawn are kept, and taken from where they are there; None: nowhere.

    Raises:
        InputError: too few images to be the reference, or a source that does not fit the data.
    """

    def __init__(
        self,
        data: DataSplits,
        extractor: Extractor,
        settings: EvalSettings | None = None,
        *,
        few_shot: bool | None = None,
        source: ImageData | None = None,
        distance: Distance | None = None,
        store: SampleStore | None = None,
    ) -> None:
        self.data, self.extractor, self.store = data, extractor, store
        self.settings = settings or EvalSettings()
        few = bool(getattr(data, "few_shot", False)) if few_shot is None else few_shot
        check_reference(data, few, source, self.settings.neighbours)
        alone = few and not len(data.test)
        reference = data.test if few and not alone else data.train
        self._reference = Reference(reference, extractor, self.settings, alone)
        self._test: FeatureStats | None = None
        self.few_shot: FewShotFigures | None = None
        held_out = self._features(data.test.images) if len(data.test) else torch.empty(0, extractor.info.dim)
        if few:
            known = None if source is None else (source, read_statistics(source.images, extractor, self.settings)[0])
            distance = distance or FeatureDistance(extractor)
            self.few_shot = FewShotFigures(data.train, data.test, held_out, extractor, distance, known)
        elif len(held_out) >= 2:
            self._test = FeatureStats.of(held_out)
        floor, floor_pixels, floor_of = floors(data.test.images, held_out, self._reference, few)
        self.protocol = Protocol(
            extractor=extractor.info,
            reference=self._reference.described(),
            reference_sha256=reference.fingerprint(),
            samples=self.settings.samples,
            steps=self.settings.steps,
            clip=self.settings.clip,
            guidance=[str(schedule) for schedule in self.settings.schedules()],
            seeds=list(self.settings.seeds),
            pairs=self.settings.pairs,
            neighbours=self.settings.neighbours,
            neighbour_points=self.settings.neighbour_points,
            floor=floor,
            floor_pixels=floor_pixels,
            floor_of=floor_of,
            few_shot=self.few_shot.protocol if self.few_shot else None,
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
        sweep = [self._point(denoiser, name, schedule, guided, steps, anchors, meter) for schedule in schedules]
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

    def replicate(self) -> ModelEvaluation:
        """The few images themselves, repeated to as many as a model draws, in a model's place: what a perfect memory
        scores. A model that is not better than this row in distance *and* diversity has learnt nothing else.

        Raises:
            ValueError: the data is not few-shot.
        """
        if self.few_shot is None:
            raise ValueError("only of few-shot data")
        mine = share(self.settings.samples)
        images = repeated(self.data.train, mine)
        features, metrics = self._metrics(images, torch.tensor(mine) % self.data.num_classes)
        point = ScalePoint(guidance="none", nfe=0, few_shot=self.few_shot.measure(images, features), **metrics)
        sha256 = self.few_shot.protocol.shots_sha256
        return ModelEvaluation(name=REPLICATED, sha256=sha256, guided=False, sampler="none", sweep=[point])

    def measure_images(self, pictures: ImageData, name: str, *, labelled: bool) -> ModelEvaluation:
        """Images from anywhere in a model's place, all of them, whatever the protocol's number of samples is.

        Args:
            labelled: whether their labels are the data set's own.

        Raises:
            InputError: images of another shape, or too few.
        """
        if pictures.shape != self.data.shape:
            mend = f"bring them to the shape of {self.data.name}, {self.data.shape}; diffstill resizes no samples"
            raise InputError("samples", f"{name} {pictures.shape}", mend)
        if len(pictures) < 2 * (self.settings.neighbours + 1):
            raise InputError("samples", f"{name} with {len(pictures)} images", "use more images")
        # Files may be sorted by class; what looks at the first images, or at parts of them, must not see a few classes.
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
        pictures, mine = pictures.subset(order), share(len(pictures))
        images, labels = pictures.images[mine.start : mine.stop], pictures.labels[mine.start : mine.stop]
        features, metrics = self._metrics(images, labels if labelled else None)
        few = self.few_shot.measure(images, features) if self.few_shot is not None else None
        point = ScalePoint(guidance="none", nfe=0, few_shot=few, **metrics)
        return ModelEvaluation(name=name, sha256=pictures.fingerprint(), guided=False, sampler="none", sweep=[point])

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
        name: str,
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
        few: list[FewShot] = []
        for seed in self.settings.seeds:
            images = self._drawn(
                denoiser, name, schedule, seed, steps, guided,
                progress=lambda done: meter.at(done / len(mine) * nfe * self.settings.samples, f"guidance {schedule}"),
            )  # fmt: skip
            meter.add(nfe * self.settings.samples)
            features, metrics = self._metrics(images, torch.tensor(mine) % denoiser.num_classes)
            if self.few_shot is not None:
                few.append(self.few_shot.measure(images, features))
            if seed in anchors:
                metrics["response"] = mean_interval((features - anchors[seed]).norm(dim=1))
            anchors.setdefault(seed, features)
            for metric, estimate in metrics.items():
                found.setdefault(metric, []).append(estimate)
        estimates = {metric: pool(each) for metric, each in found.items()}
        return ScalePoint(guidance=str(schedule), nfe=nfe, few_shot=pooled(few) if few else None, **estimates)

    def _drawn(
        self,
        denoiser: Denoiser,
        name: str,
        schedule: GuidanceSchedule,
        seed: int,
        steps: int,
        guided: bool,
        progress: Callable[[int], None],
    ) -> Tensor:
        """This process's images of one setting and seed, (n, C, H, W) uint8; from the store where it has them."""
        mine = share(self.settings.samples)
        made = {
            "model": weights_sha256(denoiser.network),
            "levels": denoiser.schedule.fingerprint(),
            "sampler": denoiser.sampler,
            "guidance": str(schedule) if guided else "none",
            "steps": steps,
            "seed": seed,
            "clip": self.settings.clip,
            "first": mine.start,
            "count": len(mine),
        }
        held = self.store.held(name, made) if self.store is not None else None
        if held is not None:
            return held

        def draw(first: int, count: int) -> Tensor:
            return sample_images(
                denoiser,
                count,
                guidance=schedule,
                steps=steps,
                seed=seed,
                batch_size=self.settings.batch_size,
                clip=self.settings.clip,
                first=first,
                guided=guided,
                progress=lambda done: progress(first - mine.start + done),
            )

        if self.store is None:
            return draw(mine.start, len(mine))
        return self.store.drawn(name, made, draw, torch.tensor(mine) % denoiser.num_classes)

    def _metrics(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, dict[str, Estimate]]:
        """The features (N, dim) of all processes' images and what follows from them.

        Args:
            images: (n, C, H, W) uint8, this process's.
            labels: (n,) int64, the classes that were asked for; None where nobody asked.
        """
        own, logits = extract_all(self.extractor, images, self.settings.batch_size)
        features = gather_rows(own)
        found = self._reference.measure(features, images)
        if self._test is not None:
            found["fd_test"] = frechet_estimate(features, self._test)
        if logits is not None:
            found["inception_score"] = inception_score(gather_rows(logits))
        if logits is not None and labels is not None and self.extractor.classifies:
            right = gather_rows((logits.argmax(1) == labels).long())
            found["class_agreement"] = proportion(int(right.sum()), len(right))
        return features, found

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
