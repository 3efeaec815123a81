"""Distances between single images: what diversity, memorisation and nearest neighbours are measured in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data.dataset import to_float, to_uint8
from ..disk import file_sha256
from ..errors import InputError, install
from ..models.denoiser import measuring
from .features import Extractor, extract

FORMS = "use features, pixels, lpips:vgg or lpips:alex"
Network = Callable[[Tensor, Tensor], Tensor]
"""(B, 3, H, W) twice, float in [-1, 1], to B distances in any shape."""


class Distance(ABC):
    """A distance between images, in two halves: what is kept of an image, and how two of those compare."""

    name: str
    sha256: str = ""
    """Of the network behind it, where there is one."""

    @abstractmethod
    def of(self, images: Tensor) -> Tensor:
        """Points (N, ...) of images (N, C, H, W) float in [-1, 1]."""

    @abstractmethod
    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, M) float64 distances of points (N, ...) and (M, ...), on the CPU."""

    def points(self, images: Tensor) -> Tensor:
        """Points (N, ...) of images (N, C, H, W) uint8.

        Raises:
            ValueError: another dtype: floats would leave it open whether 1 is white or nearly black.
        """
        check_uint8(images)
        return self.of(to_float(images))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, M) float64 distances of images (N, C, H, W) and (M, C, H, W) uint8."""
        return self.between(self.points(a), self.points(b))


def check_uint8(images: Tensor) -> None:
    """Raises ValueError unless images are (N, C, H, W) uint8."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W) uint8 in 0..255, not {tuple(images.shape)} {images.dtype}")


class FeatureDistance(Distance):
    """Euclidean distance in an extractor's features."""

    def __init__(self, extractor: Extractor, batch_size: int = 500) -> None:
        self.extractor, self._batch_size = extractor, batch_size
        self.name, self.sha256 = f"features of {extractor.info.name}", extractor.info.sha256

    def of(self, images: Tensor) -> Tensor:
        return self.points(to_uint8(images))

    def points(self, images: Tensor) -> Tensor:
        check_uint8(images)
        return extract(self.extractor, images, self._batch_size)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        return euclidean(a, b)


class PixelDistance(Distance):
    """Root mean square difference of the pixels on [-1, 1]: 2 between black and white."""

    name = "pixels"

    def of(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        return euclidean(a, b) / a.shape[1] ** 0.5


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float64 distances of rows (N, D) and (M, D), exactly 0 for equal ones."""
    return torch.cdist(a.cpu().double(), b.cpu().double(), compute_mode="donot_use_mm_for_euclid_dist")


class LpipsDistance(Distance):
    """LPIPS (Zhang et al., 1801.03924) by the package of its authors; grey images are repeated over three channels.

    Nothing is downloaded: torchvision's weights have to lie in torch hub's folder.

    Args:
        net: ``vgg`` or ``alex``.
        network: what stands in for the package's network, whose input and output it shares.
        pairs: image pairs a forward pass.

    Raises:
        InputError: an unknown net, the package is not installed, or the weights are missing or not the published ones.
    """

    WEIGHTS = {"vgg": ("vgg16-397923af.pth",), "alex": ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")}
    """Torchvision's files; their names end in the first digits of their SHA-256."""
    LEAST = {"vgg": 16, "alex": 31}
    """Smallest side: below it the last feature map is empty."""

    def __init__(
        self, net: str = "vgg", device: torch.device | str = "cpu", network: Network | None = None, pairs: int = 64
    ) -> None:
        if net not in self.WEIGHTS:
            raise InputError("distance", f"lpips:{net}", FORMS, problem="is not understood")
        self.name, self._net, self._device, self._pairs = f"LPIPS-{net}", net, torch.device(device), pairs
        self._network = network if network is not None else self._load(net)

    def _load(self, net: str) -> Network:
        asked, folder = f"lpips:{net}", Path(torch.hub.get_dir()) / "checkpoints"
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # torchvision's operators raise the latter beside another torch
            mend = f"{install('eval')}, and a torchvision that fits your torch, or use features"
            raise InputError("distance", asked, mend, problem=f"cannot be loaded ({error})") from None
        path = next((folder / name for name in self.WEIGHTS[net] if (folder / name).is_file()), None)
        mend = f"put torchvision's {self.WEIGHTS[net][0]} into {folder}, or use features"
        if path is None:
            raise InputError("distance", asked, mend, problem="has no weights")
        self.sha256 = file_sha256(path)
        if not self.sha256.startswith(path.stem.rpartition("-")[2]):
            raise InputError("distance", asked, mend, problem=f"has a damaged {path.name}")
        # The library's own torch.load meets the file whose hash was verified above, and its own linear layers.
        network: Network = lpips.LPIPS(net=net, verbose=False).to(self._device).eval()
        return network

    def of(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.LEAST[self._net]:
            mend = f"use images of {self.LEAST[self._net]} pixels or more a side, or features"
            raise InputError("distance", self.name, mend, problem=f"does not go with images {tuple(images.shape[2:])}")
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = torch.cartesian_prod(torch.arange(len(a)), torch.arange(len(b))).unbind(1)
        with measuring(self._device):
            found = [
                self._network(a[i].to(self._device), b[j].to(self._device)).flatten().cpu().double()
                for i, j in zip(rows.split(self._pairs), columns.split(self._pairs), strict=True)
            ]
        return torch.cat(found).view(len(a), len(b)) if len(rows) else torch.zeros(len(a), len(b), dtype=torch.float64)


def make_distance(spec: str, extractor: Extractor, device: torch.device | str = "cpu") -> Distance:
    """A distance from ``features`` (the extractor's), ``pixels``, ``lpips:vgg`` or ``lpips:alex``.

    Raises:
        InputError: an unknown form, or a distance that cannot be had.
    """
    kind, _, net = spec.partition(":")
    if kind == "lpips":
        return LpipsDistance(net, device)
    if spec == "features":
        return FeatureDistance(extractor)
    if spec == "pixels":
        return PixelDistance()
    raise InputError("distance", spec, FORMS, problem="is not understood")
