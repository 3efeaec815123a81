"""What the before-and-after pictures share: opening models and test images, refusing, working in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import to_uint8
from ..data.sources import DataSpec, DataSplits, load_data
from ..diffusion.guidance import GuidanceSchedule
from ..diffusion.sampling import ALL_STEPS, ClipMode, Predict, ddim_timesteps, level, usual_steps
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, RunFailed, counted
from ..evaluation.encoding import decode, encode
from ..models.denoiser import Denoiser
from ..models.folder import LoadedModel, load_model
from ..recipe import EvaluationSpec, section_of
from ..report.pictures import grid, save_png
from .build import check_data
from .evaluate import check_own_steps, guidance_of, own_protocol, parse_labels
from .ui import Bar

LETTERS = 6
"""Of a class name, above a column."""


@dataclass(frozen=True)
class How:
    """What all of these commands take.

    Raises:
        InputError: a negative seed, or batches of nothing.
    """

    guidance: str | None = None
    """None: the model's own."""
    steps: int | None = None
    """None: 50, or all of a model of few."""
    seed: int = 0
    clip: ClipMode = "recompute"
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError("seed", self.seed, "use 0 or a greater whole number")
        if self.batch_size < 1:
            raise InputError("batch-size", self.batch_size, "use 1 or more")


@dataclass(frozen=True)
class Drawer:
    """A model, and how it draws: everything that goes through its network in these commands."""

    model: LoadedModel
    scale: GuidanceSchedule
    steps: int
    clip: ClipMode

    @property
    def denoiser(self) -> Denoiser:
        return self.model.denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        return self.model.denoiser.schedule

    @property
    def name(self) -> str:
        return self.model.lineage.name if self.model.lineage else self.model.folder.name

    @property
    def timesteps(self) -> list[int]:
        """Descending: those of ordinary sampling."""
        return ddim_timesteps(self.schedule.T, self.steps)

    @property
    def noisiest(self) -> tuple[float, float]:
        """Signal and noise scale where encoding ends and decoding begins."""
        ends = self.denoiser.end
        return level(self.schedule, self.schedule.T - 1) if ends is None else (float(ends[0]), float(ends[1]))

    def predict(self, labels: Tensor) -> Predict:
        """``(x_t, t, scale) -> prediction`` for images of these classes (B,)."""

        def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
            return self.denoiser.guided(x, t, labels, scale)

        return predict

    def how(self) -> dict[str, Any]:
        """What every sampler wants to know."""
        return {"prediction_type": self.denoiser.prediction_type, "clip": self.clip}

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """From images (B, ...) up to noise, over evenly spaced levels or an encoder's own; nothing is clipped."""
        return encode(self.denoiser, images, labels, self.scale, steps=self.steps)

    def decode(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Back over the same levels to images."""
        return decode(self.denoiser, noise, labels, self.scale, steps=self.steps, clip=self.clip)


@dataclass(frozen=True)
class Told:
    """What a picture command hands back: where the picture is, its figures for machines, and lines for people."""

    out: Path
    figures: dict[str, Any]
    lines: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.figures}

    def as_text(self) -> str:
        return "\n".join([*self.lines, f"wrote {self.out}"])


def open_model(source: str, device: torch.device, field: str = "model", *, encoders: bool = False) -> LoadedModel:
    """A model whose steps are deterministic.

    Args:
        field: the argument or option that named it, which errors then name too.
        encoders: whether one that goes from images to noise alone will do.

    Raises:
        InputError: what ``load_model`` refuses, or a model that was trained for another sampler.
    """
    try:
        loaded = load_model(source, device)
    except InputError as error:
        raise error.renamed(field) from None
    if loaded.denoiser.sampler in ALL_STEPS:
        mend = "give one of deterministic steps: its teacher, say"
        raise InputError(field, source, mend, problem="takes random steps, and this needs deterministic ones")
    if loaded.denoiser.sampler == "encode" and not encoders:
        mend = "give a model that draws images; transfer takes it as the model to encode with"
        raise InputError(field, source, mend, problem="is an encoder, from images to noise")
    return loaded


def drawer(
    model: LoadedModel,
    guidance: str | None,
    steps: int | None,
    clip: ClipMode,
    *,
    guidance_field: str = "guidance",
    steps_field: str = "steps",
) -> Drawer:
    """The model with the asked guidance (None: its own) and steps (None: 50, or all of a model of few).

    Raises:
        InputError: a guidance or a number of steps that it does not have.
    """
    try:  # without a live guidance there is one way to sample it
        scale = guidance_of(guidance if guidance is not None or model.guided else "1", model)
    except InputError as error:
        raise error.renamed(guidance_field) from None
    T = model.denoiser.schedule.T
    if model.denoiser.sampler == "encode":
        if steps not in (None, T):
            raise InputError(steps_field, steps, f"use {T}, or leave it out: an encoder takes all its steps")
        return Drawer(model, scale, T, clip)
    check_own_steps(model.denoiser, steps, steps_field)
    return Drawer(model, scale, usual_steps(T) if steps is None else steps, clip)


def check_shape(mine: Denoiser, theirs: Denoiser, field: str) -> None:
    """Two models that can start from the same noise.

    Raises:
        InputError: images of another shape.
    """
    if mine.sample_shape != theirs.sample_shape:
        mend = f"give one of the model's images, {mine.sample_shape}"
        raise InputError(field, theirs.sample_shape, mend, problem="is another shape of images")


def check_alike(mine: Denoiser, theirs: Denoiser, field: str) -> None:
    """Two models that can start from the same noise and labels.

    Raises:
        InputError: other images or classes.
    """
    check_shape(mine, theirs, field)
    if mine.num_classes != theirs.num_classes:
        mend = f"give one of the model's {counted(mine.num_classes, 'class')}"
        raise InputError(field, counted(theirs.num_classes, "class"), mend, problem="does not fit")


def labels_of(text: str, class_names: Sequence[str], field: str, most: int = 1) -> list[int]:
    """One to ``most`` classes by number or name, comma-separated."""
    try:
        found = parse_labels(text, class_names) or []
    except InputError as error:
        raise error.renamed(field) from None
    if len(found) > most:
        raise InputError(field, text, "name one class" if most == 1 else f"name 1..{most} classes")
    return found


def check_picture(out: Path, count: int, field: str = "n") -> None:
    """What can be refused before a model is read."""
    if out.suffix.lower() != ".png":
        raise InputError("out", str(out), "name a .png file")
    if count < 1:
        raise InputError(field, count, "ask for one or more")


def data_of(model: LoadedModel, asked: str | None) -> tuple[DataSplits, EvaluationSpec]:
    """The images asked for, or those of the model's own recipe, and the recipe's protocol.

    Raises:
        InputError: neither is there, or the images do not fit the model.
    """
    recipe = model.lineage.recipe if model.lineage else {}
    if asked is None and not recipe:
        raise InputError("data", None, "name it with --data, e.g. --data digits", problem="is not known from the model")
    spec = DataSpec.parse(asked) if asked is not None else section_of(DataSpec, recipe.get("data", {}), "data")
    if asked is not None and model.denoiser.unconditional:  # it has no use for labels
        spec = spec.model_copy(update={"unlabelled": True})
    data = load_data(spec)
    check_data(data, model.denoiser, "model")
    return data, own_protocol(recipe)


def held_out(data: DataSplits, labels: Sequence[int]) -> Tensor:
    """One test image for each label, in order, none twice: (N, C, H, W) uint8. Without a test split, validation images.

    Raises:
        InputError: fewer images of a class than asked for, or none that were not trained on.
    """
    part = data.test if len(data.test) else data.val
    if not len(part):
        raise InputError("data", data.name, "name other images with --data", problem="was trained on, all of it")
    places = {label: torch.nonzero(part.labels == label).flatten().tolist() for label in set(labels)}
    for label, wanted in Counter(labels).items():
        if wanted > len(places[label]):
            problem = f"asks for {wanted} {part.split} images of class {data.class_names[label]}"
            raise InputError("n", len(labels), f"there are {len(places[label])}; ask for fewer", problem=problem)
    queues = {label: iter(found) for label, found in places.items()}
    return part.images[torch.tensor([next(queues[label]) for label in labels], dtype=torch.int64)]


class Batches:
    """Takes tensors through a model a batch at a time; the results, on the CPU, depend on no batch size."""

    def __init__(self, size: int, bar: Bar) -> None:
        self._size, self._bar, self._done = size, bar, 0

    def __call__(self, denoiser: Denoiser, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``run`` on matching slices of ``tensors`` (N, ...), without gradients. NaN becomes 0: it is shown as grey."""
        parts = []
        with denoiser.evaluating():
            for start in range(0, len(tensors[0]), self._size):
                given = (tensor[start : start + self._size].to(denoiser.device) for tensor in tensors)
                parts.append(run(*given).nan_to_num(0.0).cpu())
                self._done += len(parts[-1])
                self._bar.update(self._done)
        return torch.cat(parts)


def shown_noise(x: Tensor, sigma: float) -> Tensor:
    """Images (N, ...) float at noise level ``sigma`` as uint8, darkened so that two sigmas of noise fit the range."""
    return to_uint8(x / (1 + sigma))


def short(name: str) -> str:
    """A class name that fits above an image."""
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def draw_rows(out: Path, rows: Sequence[Tensor], labels: Sequence[str], columns: Sequence[str] = ()) -> None:
    """Writes rows of images (N, C, H, W) uint8, all of one N, one below the other.

    Raises:
        RunFailed: the file cannot be written.
    """
    picture = grid(torch.cat(list(rows)), len(rows[0]), row_labels=labels, column_labels=columns)
    try:
        save_png(picture, out)
    except OSError as error:
        raise RunFailed(f"cannot write {out}: {error}") from error
