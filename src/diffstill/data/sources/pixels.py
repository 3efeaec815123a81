"""From a picture as found to a square uint8 array: orientation, transparency, colour, crop, resize."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...errors import InputError
from .spec import DataSpec

Pixels = NDArray[np.uint8]
Blob = Path | bytes
"""An encoded image: a file, or its content."""

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})


@dataclass(frozen=True)
class PixelFormat:
    """What every image of a data set becomes: (channels, side, side) uint8."""

    channels: int
    side: int
    resample: Image.Resampling = Image.Resampling.LANCZOS
    found_grey: bool = False
    """Whether one channel was concluded from the images seen so far, not asked for: then no colour may be lost."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    def fit(self, image: Image.Image) -> Pixels:
        """(C, S, S): colour first (a palette cannot be resized), then the centre square, then the resize."""
        image = _in_colour(image, self.channels)
        width, height = image.size
        short = min(width, height)
        if width != height:
            left, top = (width - short) // 2, (height - short) // 2
            image = image.crop((left, top, left + short, top + short))
        if short != self.side:
            image = image.resize((self.side, self.side), self.resample)
        return np.asarray(image).reshape(self.side, self.side, self.channels).transpose(2, 0, 1)

    def fit_block(self, block: Pixels) -> Pixels:
        """(n, H, W, C) -> (n, channels, side, side); a view where the images have the form already.

        Raises:
            InputError: colour images where all were taken to be grey.
        """
        if self.channels == 1 and block.shape[3] == 3:
            if is_grey(block):
                block = block[..., :1]  # exactly what the conversion of equal channels gives
            elif self.found_grey:
                problem = "was taken for 1, but there are colour images beside grey ones"
                raise InputError("data.channels", None, "set it to 3, or to 1", problem=problem)
        if block.shape[1:] == (self.side, self.side, self.channels):
            return block.transpose(0, 3, 1, 2)
        grey = block.shape[3] == 1
        images = (Image.fromarray(image[..., 0] if grey else image) for image in block)
        return np.stack([self.fit(image) for image in images])


@dataclass
class Looks:
    """What is known of the images before any is decoded."""

    colour: bool = False
    sizes: dict[tuple[int, int], str] = field(default_factory=dict)
    """(width, height) -> an image that has it."""

    def add(self, size: tuple[int, int], colour: bool, where: str) -> None:
        self.colour |= colour
        self.sizes.setdefault(size, where)

    def settle(self, spec: DataSpec) -> PixelFormat:
        """The form that ``spec`` asks for and these images allow.

        Raises:
            InputError: non-square images with ``crop: none``, or differing sizes without ``size``.
        """
        shorts: dict[int, tuple[str, tuple[int, int]]] = {}
        for (width, height), where in self.sizes.items():
            if spec.crop == "none" and width != height:
                problem = f"refuses the non-square image {where} ({width}x{height})"
                mend = "set data.crop to center, or make the images square"
                raise InputError("data.crop", "none", mend, problem=problem)
            shorts.setdefault(min(width, height), (where, (width, height)))
        side = spec.size
        if side is None:
            if len(shorts) > 1:
                shown = [f"{where} is {w}x{h}" for where, (w, h) in list(shorts.values())[:2]]
                problem = f"does not fit images of different sizes ({', '.join(shown)})"
                raise InputError("data.size", None, "set it to the side wanted, in pixels", problem=problem)
            side = next(iter(shorts))
        resample = Image.Resampling[spec.resample.upper()]
        channels = spec.channels or (3 if self.colour else 1)
        return PixelFormat(channels, side, resample, found_grey=channels == 1 and spec.channels is None)


def is_grey(block: Pixels) -> bool:
    """Whether the three channels of (n, H, W, 3) are equal throughout."""
    return bool((block[..., 0] == block[..., 1]).all() and (block[..., 0] == block[..., 2]).all())


def look(blob: Blob) -> tuple[tuple[int, int], bool]:
    """((width, height), colour) from the header alone. Orientation swaps the two sides at most: here it is ignored."""
    with _opened(blob) as image:
        return image.size, image.mode not in GREY_MODES


def decode(blob: Blob, form: PixelFormat) -> Pixels:
    """(C, S, S) of one encoded image, turned upright as its EXIF orientation says; of an animation, the first frame."""
    with _opened(blob) as image:
        image.load()
        return form.fit(ImageOps.exif_transpose(image))


def _opened(blob: Blob) -> Image.Image:
    return Image.open(io.BytesIO(blob) if isinstance(blob, bytes) else blob)


def _in_colour(image: Image.Image, channels: int) -> Image.Image:
    """In mode L or RGB. Transparent pixels show white (their stored colour is arbitrary); 16 bits become 8."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "F":
        raise ValueError("holds floating-point pixels")
    elif image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("holds pixels outside 0..65535")
        image = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")
