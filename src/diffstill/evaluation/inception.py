"""The FID network: torch-fidelity's port of the 2015-12-05 Inception, with the published weights.

The port is one file that needs nothing but torch. The package around it imports torchvision, which many have not or
have for another torch, so the file is imported by itself where the package cannot be.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..disk import file_sha256
from ..errors import InputError
from ..models.denoiser import measuring
from .results import ExtractorInfo

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
PACKAGE = "torch_fidelity"
PORT = f"{PACKAGE}.feature_extractor_inceptionv3"
LAYERS = ("2048", "logits_unbiased")
"""What is read, by torch-fidelity's names; the Inception score, too, is of logits without the last layer's bias."""


class InceptionExtractor:
    """The 2048 features and 1008 logits of an Inception of 2015-12-05, images brought to 299 px by TF1's bilinear rule.

    Grey images are repeated over three channels.

    Args:
        network: from ``inception_network``.
        sha256: of the file of its weights. Distances are named FID with the published one, ``FD-inception`` otherwise.
    """

    classifies = False

    def __init__(self, network: nn.Module, sha256: str, device: torch.device) -> None:
        self._network, self._device = network.to(device).eval(), device
        name = "FID" if sha256 == INCEPTION_SHA256 else "FD-inception"
        self.info = ExtractorInfo(name=name, sha256=sha256, dim=int(LAYERS[0]), resize="tf1-bilinear 299")

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        with measuring(self._device):
            features, logits = self._network(rgb.to(self._device))
        return features.float().cpu(), logits.float().cpu()


def open_inception(weights: Path | None, cache_dir: Path, device: torch.device) -> InceptionExtractor:
    """The FID network. Nothing is ever downloaded.

    Args:
        weights: the port's weight file; None looks in torch hub's ``checkpoints`` folder and in ``cache_dir``.

    Raises:
        InputError: the file is missing or is not the published one (by SHA-256), or torch-fidelity is not installed.
    """
    path = _published_weights(weights, cache_dir)
    return InceptionExtractor(inception_network(path), INCEPTION_SHA256, device)


def inception_network(weights: Path) -> nn.Module:
    """The port with weights from a file: (B, 3, H, W) uint8 to the tensors of ``LAYERS``.

    The library unpickles the file: it has to be one that is trusted.

    Raises:
        InputError: torch-fidelity is not installed.
    """
    try:
        port = _import_port()
    except Exception as error:
        mend = "pip install --no-deps torch-fidelity, or use classifier"
        raise InputError("extractor", "inception", mend, problem=f"cannot be loaded ({error})") from None
    return port.FeatureExtractorInceptionV3("inception", list(LAYERS), feature_extractor_weights_path=str(weights))


@contextmanager
def bare_package(name: str) -> Iterator[None]:
    """Within it, an installed package's modules can be imported though the package's own ``__init__`` cannot run.

    Afterwards ``sys.modules`` holds of the package what it held before, so that a later import finds no half of it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    known = _forget(name)
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"no package named {name!r}", name=name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        yield
    finally:
        _forget(name)
        sys.modules.update(known)


def _import_port() -> ModuleType:
    known = _modules(PACKAGE)
    try:
        return importlib.import_module(PORT)
    except Exception:  # a torchvision of another torch raises RuntimeError, OSError or AttributeError
        _forget(PACKAGE)
        sys.modules.update(known)
    with bare_package(PACKAGE):
        return importlib.import_module(PORT)


def _modules(package: str) -> dict[str, ModuleType]:
    return {key: known for key, known in sys.modules.items() if key == package or key.startswith(f"{package}.")}


def _forget(package: str) -> dict[str, ModuleType]:
    """Takes a package and its modules out of ``sys.modules``."""
    known = _modules(package)
    for key in known:
        del sys.modules[key]
    return known


def _published_weights(given: Path | None, cache_dir: Path) -> Path:
    """The weight file, verified.

    Raises:
        InputError: it is missing, or another file.
    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints", cache_dir]
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
