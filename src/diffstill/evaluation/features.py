"""Feature extractors: the networks in whose features distances are measured, each with its name and hash.

Only the 2015-12-05 Inception network at 2048 features may be called FID; everything else is ``FD-<something>``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..data.dataset import to_float
from ..data.sources import DataSpec, load_data, whole_source
from ..disk import file_sha256
from ..errors import InputError
from ..models.denoiser import measuring
from ..models.lineage import weights_sha256
from .classifier import FEATURES, Trained, cached_classifier
from .inception import open_inception
from .results import ExtractorInfo

if TYPE_CHECKING:
    from ..data.dataset import ImageData
    from ..data.sources import DataSplits

FORMS = "use classifier, inception, inception:PATH or torchscript:PATH"


class Extractor(Protocol):
    """Images in, features and perhaps logits out; no gradients, eval mode, results on the CPU."""

    info: ExtractorInfo
    classifies: bool
    """Whether its logits are of the data set's own classes, in their order."""

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, info.dim) and logits (B, K), float32, of images (B, C, H, W) uint8 on any device, in one pass.

        The logits are of whatever classes the network knows; None where it knows none.
        """
        ...


class ClassifierExtractor:
    """Penultimate features (64) of the classifier trained on the data set; distances are named ``FD-<data set>``.

    Args:
        classifies: False where labels mean something else than they did in its training.
    """

    def __init__(self, trained: Trained, name: str, device: torch.device, *, classifies: bool = True) -> None:
        self._network, self._device, self.classifies = trained.network.to(device), device, classifies
        self.info = ExtractorInfo(
            name=f"FD-{name}", sha256=weights_sha256(trained.network), dim=FEATURES, accuracy=trained.accuracy
        )

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with measuring(self._device):
            features = self._network.features(to_float(images.to(self._device)))
            return features.cpu(), self._network.head(features).cpu()


class TorchScriptExtractor:
    """Any TorchScript module from images to features (B, D, ...), flattened, or to a pair of those and logits (B, K).

    Distances are named ``FD-<file stem>``. The module is given uint8 images; one that refuses those is given float32
    in [0, 1]. Resizing and normalisation are its own affair, so the file's hash says all there is to say. Logits as
    many as the data has classes are taken to be of these, and how often they are right on the test images is told.

    Raises:
        InputError: the file is missing or no TorchScript, or takes the data's images in neither form.
    """

    def __init__(self, path: Path, data: DataSplits, device: torch.device) -> None:
        if not path.is_file():
            mend = "give the path of a TorchScript file"
            raise InputError("extractor", f"torchscript:{path}", mend, problem="is missing")
        try:
            self._network: Any = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            mend = "save the network with torch.jit.script(...).save(path)"
            raise InputError("extractor", f"torchscript:{path}", mend, problem=_because(error)) from None
        self._device = device
        sample = data.train.images[:2]
        self._prepare = self._input_form(path, sample.to(device))
        features, logits = self.read(sample)
        own = logits is not None and logits.shape[1] == data.num_classes
        self.classifies = own and not (data.spec and data.spec.relabelled)
        right = _accuracy(self, data.test) if self.classifies else None
        self.info = ExtractorInfo(
            name=f"FD-{path.stem}", sha256=file_sha256(path), dim=features.shape[1], accuracy=right
        )

    @torch.no_grad()
    def _input_form(self, path: Path, sample: Tensor) -> Callable[[Tensor], Tensor]:
        forms: list[Callable[[Tensor], Tensor]] = [lambda images: images, lambda images: images.float() / 255]
        problem = ""
        for form in forms:
            try:
                out = self._run(form(sample))
            except RuntimeError as error:
                problem = _because(error)
                continue
            features, *logits = out if isinstance(out, tuple) else (out,)
            if _rows(features, sample) and (not logits or (len(logits) == 1 and _rows(logits[0], sample, ndim=2))):
                return form
            problem = "does not return one tensor with a row of float features an image, nor a pair of it and logits"
        mend = f"export a module that takes images {tuple(sample.shape[1:])} as uint8, or as float in [0, 1]"
        raise InputError("extractor", f"torchscript:{path}", mend, problem=problem)

    def _run(self, images: Tensor) -> Any:
        # As it is: on CUDA the fuser would compile a kernel for each group of operations and batch size.
        with torch.jit.optimized_execution(False):
            return self._network(images)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with measuring(self._device):
            out = self._run(self._prepare(images.to(self._device)))
        features, logits = out if isinstance(out, tuple) else (out, None)
        return features.flatten(1).float().cpu(), logits.float().cpu() if logits is not None else None


def make_extractor(
    spec: str,
    data: DataSplits,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
    *,
    source: DataSpec | None = None,
    progress: Callable[[float], None] | None = None,
) -> Extractor:
    """An extractor from ``"classifier"``, ``"inception[:PATH]"`` or ``"torchscript:PATH"``.

    Args:
        data: its whole source is what the classifier is trained on; the others meet its images and classes.
        cache_dir: where trained classifiers are kept; None: ``$DIFFSTILL_CACHE`` or ``~/.cache/diffstill``.
        source: the domain that few-shot data is adapted from, whose whole source the classifier is trained on where
            the data's own has no two classes to tell apart.
        progress: called with the share done, in [0, 1], if a classifier has to be trained.

    Raises:
        InputError: an unknown form, or an extractor that cannot be had.
    """
    device = torch.device(device)
    kind, _, path = spec.partition(":")
    if kind == "classifier" and not path:
        # Of few images or some classes of a source it is trained on them all: it must know a class that is held out.
        whole = whole_source(data)
        own = whole.num_classes > 1
        learnt = whole if own else _source_with_classes(data, source)
        trained = cached_classifier(learnt, cache_dir or default_cache(), device, progress=progress)
        classifies = own and not (data.spec and data.spec.relabelled)
        return ClassifierExtractor(trained, learnt.name, device, classifies=classifies)
    if kind == "inception":
        return open_inception(Path(path).expanduser() if path else None, default_cache(), device)
    if kind == "torchscript" and path:
        return TorchScriptExtractor(Path(path).expanduser(), data, device)
    raise InputError("extractor", spec, FORMS, problem="is not understood")


def check_extractor(spec: str, data: DataSplits, source: DataSpec | None = None) -> None:
    """What ``make_extractor`` would refuse; no classifier is trained, and nothing is written.

    Raises:
        InputError: as ``make_extractor``.
    """
    if spec != "classifier":
        make_extractor(spec, data, source=source)
    elif whole_source(data).num_classes < 2:
        _source_with_classes(data, source)


def _source_with_classes(data: DataSplits, source: DataSpec | None) -> DataSplits:
    """The whole of the source domain, for data whose own source is all of one class.

    Raises:
        InputError: there is none, or one that has no classes either or another shape of images.
    """
    mend, problem = "use inception or torchscript:PATH", f"has nothing to learn, for {data.name} is all of one class"
    if not data.few_shot:
        raise InputError("extractor", "classifier", mend, problem=problem)
    mend = f"name the source domain, with its classes, in evaluation.source, or {mend}"
    if source is None:
        raise InputError("extractor", "classifier", mend, problem=problem)
    whole = whole_source(load_data(source))
    if whole.num_classes < 2:
        problem += f", and so is {whole.name}"
        raise InputError("extractor", "classifier", mend, problem=problem)
    check_source_shape(whole.train, data)
    return whole


def check_source_shape(source: ImageData, data: DataSplits) -> None:
    """Raises InputError unless the source domain's images are of the data's shape."""
    if source.shape != data.shape:
        mend = f"bring it to the shape of {data.name}, {data.shape}, by its size and channels"
        raise InputError("evaluation.source", f"{source.name} {source.shape}", mend)


def default_cache() -> Path:
    """``$DIFFSTILL_CACHE``, or ``~/.cache/diffstill``."""
    return Path(os.environ.get("DIFFSTILL_CACHE") or "~/.cache/diffstill").expanduser()


def extract(extractor: Extractor, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features (N, dim) float32 of images (N, C, H, W) uint8, a batch at a time."""
    parts = [extractor.read(part)[0] for part in images.split(batch_size)] if len(images) else []
    return torch.cat(parts) if parts else torch.empty(0, extractor.info.dim)


def extract_all(extractor: Extractor, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor | None]:
    """Features (N, dim) and logits (N, K) float32 of images (N, C, H, W) uint8, a batch at a time.

    Of no images, too, the logits have their K columns: a process without a share must know what the others gather.
    """
    if not len(images):
        features, logits = extractor.read(images.new_zeros(1, *images.shape[1:]))
        return features[:0], logits[:0] if logits is not None else None
    parts = [extractor.read(part) for part in images.split(batch_size)]
    known = [logits for _, logits in parts if logits is not None]
    return torch.cat([features for features, _ in parts]), torch.cat(known) if known else None


def _accuracy(extractor: Extractor, data: ImageData, batch_size: int = 500) -> float | None:
    """Share of images classified right, in [0, 1]; None for an empty split."""
    if not len(data):
        return None
    right = 0
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        logits = extractor.read(images)[1]
        right += int((logits.argmax(1) == labels).sum()) if logits is not None else 0
    return right / len(data)


def _rows(out: Any, sample: Tensor, ndim: int | None = None) -> bool:
    """Whether a module's output has a row of floats an image."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return False
    return out.ndim >= 2 and len(out) == len(sample) and ndim in (None, out.ndim)


def _because(error: Exception) -> str:
    """The last telling line of a library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"cannot be used ({lines[-1][:120] if lines else type(error).__name__})"
