"""Typed results of an evaluation: what a receipt stores and a report draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Estimate(Result):
    """A number with its interval (``level`` two-sided; None where none was computed)."""

    value: float | None = Field(description="point estimate; null where it is not finite")
    low: float | None = None
    high: float | None = None
    level: float = 0.95

    @classmethod
    def of(cls, value: float, draws: Sequence[float] = (), level: float = 0.95) -> Estimate:
        """Percentile interval from bootstrap ``draws``."""
        good = sorted(d for d in draws if math.isfinite(d))
        low = high = None
        if len(good) >= 2:
            tail = (1 - level) / 2
            low = good[round(tail * (len(good) - 1))]
            high = good[round((1 - tail) * (len(good) - 1))]
        return cls(value=value if math.isfinite(value) else None, low=low, high=high, level=level)


class ExtractorInfo(Result):
    """The network whose features the distances live in."""

    name: str = Field(description="FID only for the 2015-12-05 Inception at 2048-d; otherwise FD-<something>")
    sha256: str
    dim: int
    accuracy: float | None = Field(None, description="test accuracy of the classifier, where it is one")
    resize: str = "none"


HELD_OUT = "held-out images"
EACH_OTHER = "the shots, each without itself"
NOTHING = "nothing: a single picture has no other to be near to"
"""What tells how near to the few images a new one of their domain lies (``FewShotProtocol.near_of``)."""


class FewShotProtocol(Result):
    """What has to be equal besides, where a model was made from a few images."""

    shots: int = Field(description="images trained on")
    shots_sha256: str
    diversity: str = Field(description="name and version of the definition")
    per_cluster: int = Field(description="samples a cluster that are compared, the first by index")
    near: float = Field(description="quantile of the distances of near_of; with held-out images chance of memorised")
    near_of: str = Field(
        HELD_OUT,
        description="whose distances to the nearest shot memorised and nearest_ratio are beside: held-out images, or, "
        "where there are no images but the shots, these themselves, each without itself",
    )
    distance: str = Field(description="between images: features of an extractor, pixels, LPIPS-vgg, LPIPS-alex")
    distance_sha256: str = ""
    source: str | None = Field(None, description="data set, split and number of the source domain's images")
    source_sha256: str = ""
    selection: str = Field(
        "none: the last weights are measured; no checkpoint and no number of steps is chosen by a figure against the "
        "test images. The best of several guidance settings is named after the fact, and looks better than it is",
        description="what these figures were used for: never to select what they measure",
    )

    @property
    def copies_known(self) -> bool:
        """Whether there is something to tell copies by."""
        return self.near_of != NOTHING

    @property
    def alone(self) -> bool:
        """Whether there are no images of the domain but those that were trained on."""
        return self.near_of != HELD_OUT


class Protocol(Result):
    """Everything that has to be equal for two numbers to be compared."""

    extractor: ExtractorInfo
    reference: str = Field(description="data set, split and number of reference images")
    reference_sha256: str
    samples: int
    sampler: str = "ddim"
    steps: int
    clip: str = "recompute"
    guidance: list[str]
    labels: str = "balanced: image i has class i mod num_classes"
    seeds: list[int]
    weights: str = "ema"
    pairs: int | None = Field(None, description="held-out (x_t, t, y) for guidance fidelity")
    neighbours: int | None = Field(None, description="k of precision and recall")
    neighbour_points: int | None = Field(None, description="images a side, at most, of precision, recall and KID")
    floor: Estimate | None = Field(None, description="the distance between real images, as floor_of says")
    floor_pixels: Estimate | None = Field(None, description="the same in pixels")
    floor_of: str = "test images against the training images"
    few_shot: FewShotProtocol | None = None

    def settings(self) -> dict[str, Any]:
        """What must be equal, as JSON: all but the floors, which are results."""
        return self.model_dump(mode="json", exclude={"floor", "floor_pixels"})


class FewShot(Result):
    """What only the few images explain: how varied samples are, whether they are copies, what was forgotten."""

    diversity: Estimate = Field(description="mean distance of pairs within the clusters of the nearest shot")
    real_diversity: Estimate = Field(description="the same of the held-out images; null where there are none")
    diversity_share: Estimate = Field(description="diversity / real_diversity, the latter taken as given")
    empty_clusters: float = Field(description="shots that are nearest to no sample, left out; mean over the seeds")
    singleton_clusters: float = Field(description="shots that are nearest to one sample, left out as well")
    cluster_sizes: list[int] = Field(description="samples nearest to each shot, all seeds together")
    memorised: Estimate = Field(description="share of samples nearer to a shot than 95 % of the protocol's near_of")
    nearest_ratio: Estimate = Field(description="mean distance to the nearest shot / that of the protocol's near_of")
    source_fd: Estimate | None = Field(None, description="Frechet distance to the source domain's images")
    target_source_fd: Estimate | None = Field(
        None, description="the same of the held-out images: where full adaptation arrives"
    )


class ScalePoint(Result):
    """Sample quality at one guidance setting."""

    guidance: str
    nfe: int
    fd: Estimate = Field(description="Frechet distance to the protocol's reference, in the extractor's features")
    fd_test: Estimate | None = Field(None, description="the same against the held-out test split")
    fd_pixels: Estimate | None = Field(
        None,
        description="fd of the pixels themselves, in [0, 1], of small images: a second opinion beside the features'",
    )
    kid: Estimate | None = None
    precision: Estimate | None = None
    recall: Estimate | None = None
    class_agreement: Estimate | None = Field(None, description="share of samples classified as the label asked for")
    inception_score: Estimate | None = Field(
        None,
        description="exp of the mean KL divergence of an image's class probabilities from their mean, over 10 parts; "
        "the Inception score only in the features of FID, elsewhere its analogue",
    )
    response: Estimate | None = Field(
        None, description="mean distance in features from the same noise and label at the sweep's first setting"
    )
    few_shot: FewShot | None = None


class FidelityBin(Result):
    """Guidance fidelity over one part of the held-out pairs."""

    label: str = Field(description='"all", "t 0-99", "class 3"')
    pairs: int
    ratio: Estimate = Field(description="mean |student gap| / mean |teacher gap|; 1 ideal, 0 collapsed")
    cosine: Estimate
    gap_mse: Estimate
    cond_mse: Estimate
    null_mse: Estimate
    best_rescale: Estimate = Field(description="a* = E[dS.dT]/E|dS|^2, the best scalar correction of the student's gap")


class Fidelity(Result):
    """Gap between the branches, student against teacher, at identical (x_t, t, y) (dash.md 5.1, D18)."""

    split: str
    seed: int
    overall: FidelityBin
    by_timestep: list[FidelityBin]
    by_class: list[FidelityBin]
    teacher_gap_rms: float = Field(description="root mean square of the teacher's gap: the unit of gap_mse")
    collapsed: bool = Field(description="overall ratio under 0.5")


class Encoding(Result):
    """How well an encoder's noise gives the images back, decoded by the first model's many steps.

    Errors are mean squares on the [-1, 1] scale."""

    steps: int
    images: int
    error: Estimate = Field(description="of images encoded by this model and decoded")
    coarse_error: Estimate = Field(description="the same with the decoder's own inversion in as many steps")
    fine_error: Estimate = Field(description="the same with the decoder's own inversion in its many steps")
    noise_mean: float
    noise_std: float = Field(description="1 for a perfect encoder")
    noise_error: Estimate = Field(description="mean squared distance of the noise to that of the many steps")


class Latency(Result):
    batch: int
    runs: int
    median_s: float
    p10_s: float
    p90_s: float
    images_per_s: float
    peak_memory_mb: float | None = None


class Cost(Result):
    parameters: int
    flops_forward: float = Field(description="2 x MAC of one forward of one image")
    nfe: int = Field(description="network evaluations an image at a guided scale")
    flops_image: float
    size_mb: float
    latency: list[Latency] = []
    device: str = "cpu"


class SubjectFigures(Result):
    """Of a text-to-image model of one subject: how near its pictures come to the few, and how varied they are.

    Distances are root mean squares of pixels on [-1, 1]: they tell copies and collapse, not likeness."""

    samples: int
    nearest: Estimate = Field(description="mean distance of samples to the nearest training image; 0 copies")
    spread: float | None = Field(description="mean distance of pairs of samples; 0 where all are one picture")
    real_spread: float | None = Field(description="the same of the training images; null for a single one")


class ModelEvaluation(Result):
    """All that was measured of one model."""

    name: str
    method: str = ""
    sha256: str = ""
    guided: bool = True
    steps: int | None = Field(
        None, description="sampling steps; the protocol's, but for a teacher of few-step students"
    )
    sampler: str = Field(
        "ddim", description="what its steps are made for: ddim, stochastic, renoise, encode; none: images as they came"
    )
    place: int | None = Field(None, description="in a chain of stages: which it is, from 0")
    cost: Cost | None = None
    sweep: list[ScalePoint] = []
    fidelity: Fidelity | None = None
    encoding: Encoding | None = Field(None, description="of an encoder, which draws no images")
    subject: SubjectFigures | None = Field(None, description="of a text-to-image model adapted to one subject")
    images: dict[str, str] = Field({}, description="picture name -> path relative to the run folder")

    @property
    def images_alone(self) -> bool:
        """Whether images stand in a model's place."""
        return self.sampler == "none"

    @property
    def best(self) -> ScalePoint | None:
        """The sweep's point with the lowest Frechet distance."""
        good = [point for point in self.sweep if point.fd.value is not None]
        return min(good, key=lambda point: point.fd.value or 0.0) if good else None
