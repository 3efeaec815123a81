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
from ..data.sources import whole_source
from ..disk import file_sha256
from ..errors import InputError
from ..models.lineage import weights_sha256
from .classifier import FEATURES, Trained, cached_classifier
from .results import ExtractorInfo

if TYPE_CHECKING:
    from ..data.sources import DataSplits

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
FORMS = "use classifier, inception, inception:PATH or torchscript:PATH"


class Extractor(Protocol):
    """Images in, features out; no gradients, eval mode, results on the CPU."""

    info: ExtractorInfo

    def features(self, images: Tensor) -> Tensor:
        """(B, info.dim) float32 of images (B, C, H, W) uint8 on any device."""
        ...

    def classify(self, images: Tensor) -> Tensor | None:
        """Logits (B, num_classes) float32, or None where the network is no classifier of the data set."""
        ...


class ClassifierExtractor:
    """Penultimate features (64) of the classifier trained on the data set; distances are named ``FD-<data set>``.

    Args:
        classifies: False where labels mean something else than they did in its training.
    """

    def __init__(self, trained: Trained, name: str, device: torch.device, *, classifies: bool = True) -> None:
        self._network, self._device, self._classifies = trained.network.to(device), device, classifies
        self.info = ExtractorInfo(
            name=f"FD-{name}", sha256=weights_sha256(trained.network), dim=FEATURES, accuracy=trained.accuracy
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self._network.features(to_float(images.to(self._device))).cpu()

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor | None:
        return self._network(to_float(images.to(self._device))).cpu() if self._classifies else None


class InceptionExtractor:
    """The FID network: torch-fidelity's port of the 2015-12-05 Inception, 2048 features, TF1 bilinear to 299 px.

    Grey images are repeated over three channels. Nothing is ever downloaded.

    Args:
        weights: the port's weight file; None looks where torch hub and torch-fidelity keep it.

    Raises:
        InputError: the extra is not installed, or the file is missing or is not the published one (by SHA-256).
    """

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        path = _inception_weights(weights)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            mend = "pip install 'diffstill[eval]' and a torchvision that fits your torch, or use classifier"
            raise InputError("extractor", "inception", mend, problem=f"cannot be loaded ({error})") from None
        # The published hash was verified above: the library's own torch.load meets that file and no other.
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        self._network, self._device = network.to(device).eval(), device
        self.info = ExtractorInfo(name="FID", sha256=INCEPTION_SHA256, dim=2048, resize="tf1-bilinear 299")

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return self._network(rgb.to(self._device))[0].float().cpu()

    def classify(self, images: Tensor) -> Tensor | None:
        return None


class TorchScriptExtractor:
    """Any TorchScript module from images to features (B, D, ...), flattened; distances are named ``FD-<file stem>``.

    It is given uint8 images; one that refuses those is given float32 in [0, 1]. Resizing and normalisation are the
    module's own affair, so the file's hash says all there is to say.

    Raises:
        InputError: the file is missing or no TorchScript, or takes neither form of ``sample``.
    """

    def __init__(self, path: Path, sample: Tensor, device: torch.device) -> None:
        if not path.is_file():
            mend = "give the path of a TorchScript file"
            raise InputError("extractor", f"torchscript:{path}", mend, problem="is missing")
        try:
            self._network: Any = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            mend = "save the network with torch.jit.script(...).save(path)"
            raise InputError("extractor", f"torchscript:{path}", mend, problem=_because(error)) from None
        self._device = device
        self._prepare = self._input_form(path, sample[:2].to(device))
        dim = self.features(sample[:2]).shape[1]
        self.info = ExtractorInfo(name=f"FD-{path.stem}", sha256=file_sha256(path), dim=dim)

    @torch.no_grad()
    def _input_form(self, path: Path, sample: Tensor) -> Callable[[Tensor], Tensor]:
        forms: list[Callable[[Tensor], Tensor]] = [lambda images: images, lambda images: images.float() / 255]
        problem = ""
        for form in forms:
            try:
                out = self._network(form(sample))
            except RuntimeError as error:
                problem = _because(error)
                continue
            if isinstance(out, Tensor) and out.ndim >= 2 and len(out) == len(sample) and out.is_floating_point():
                return form
            problem = "does not return one tensor with a row of float features an image"
        mend = f"export a module that takes images {tuple(sample.shape[1:])} as uint8, or as float in [0, 1]"
        raise InputError("extractor", f"torchscript:{path}", mend, problem=problem)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self._network(self._prepare(images.to(self._device))).flatten(1).float().cpu()

    def classify(self, images: Tensor) -> Tensor | None:
        return None


def make_extractor(
    spec: str, data: DataSplits, cache_dir: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """An extractor from ``"classifier"``, ``"inception[:PATH]"`` or ``"torchscript:PATH"``.

    Args:
        data: its whole source is what the classifier is trained on; gives a sample to the others.
        cache_dir: where trained classifiers are kept; None: ``$DIFFSTILL_CACHE`` or ``~/.cache/diffstill``.

    Raises:
        InputError: an unknown form, or an extractor that cannot be had.
    """
    device = torch.device(device)
    kind, _, path = spec.partition(":")
    if kind == "classifier" and not path:
        # Of few images or some classes of a source it is trained on them all: it must know a class that is held out.
        trained = cached_classifier(whole_source(data), cache_dir or default_cache(), device)
        return ClassifierExtractor(trained, data.name, device, classifies=not (data.spec and data.spec.relabelled))
    if kind == "inception":
        return InceptionExtractor(Path(path).expanduser() if path else None, device)
    if kind == "torchscript" and path:
        return TorchScriptExtractor(Path(path).expanduser(), data.train.images, device)
    raise InputError("extractor", spec, FORMS, problem="is not understood")


def default_cache() -> Path:
    """``$DIFFSTILL_CACHE``, or ``~/.cache/diffstill``."""
    return Path(os.environ.get("DIFFSTILL_CACHE") or "~/.cache/diffstill").expanduser()


def extract(extractor: Extractor, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features (N, dim) float32 of images (N, C, H, W) uint8, a batch at a time."""
    parts = [extractor.features(part) for part in images.split(batch_size)] if len(images) else []
    return torch.cat(parts) if parts else torch.empty(0, extractor.info.dim)


def _inception_weights(given: Path | None) -> Path:
    """The weight file, verified.

    Raises:
        InputError: it is missing, or another file.
    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints", default_cache()]
    places = [given] if given else [folder / name for folder in folders for name in INCEPTION_FILES]
    path = next((place for place in places if place.is_file()), None)
    mend = f"fetch {INCEPTION_FILES[0]} (torch-fidelity release v0.2.0) and give inception:PATH, or use classifier"
    if path is None:
        problem = "is missing" if given else f"has no weights in {folders[0]} or {folders[1]}"
        raise InputError("extractor", f"inception:{given}" if given else "inception", mend, problem=problem)
    found = file_sha256(path)
    if found != INCEPTION_SHA256:
        raise InputError("extractor", f"inception:{path}", mend, problem=f"is another file (sha256 {found[:8]}...)")
    return path


def _because(error: Exception) -> str:
    """The last telling line of a library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"cannot be used ({lines[-1][:120] if lines else type(error).__name__})"
