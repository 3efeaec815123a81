"""Grids of sample images as PNG files, large enough to see and readable on a light or a dark page."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 48
"""Images are enlarged by the whole number that brings them nearest to this many pixels."""
GAP = 3
BAND = 14
"""Pixels between two bands of pairs."""
NEUTRAL = (128, 128, 128, 255)
"""Grey that is readable on white and on black: the margins are transparent."""


def enlargement(height: int) -> int:
    """The whole factor at which images of ``height`` pixels are shown: 8 -> 6, 28 -> 2, 64 -> 1."""
    return max(1, round(TILE / height))


def grid(
    images: Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    factor: int | None = None,
) -> Image.Image:
    """Lay images out in rows, left to right, on a transparent ground.

    Args:
        images: (N, C, H, W) uint8, C = 1 (grey) or 3 (RGB); the last row may be short.
        columns: images in a row.
        row_labels: one a row, in the left margin; none leaves no margin. The same for ``column_labels`` above.
        factor: whole enlargement (nearest neighbour); by default ``enlargement(H)``.

    Returns:
        An RGBA picture.

    Raises:
        ValueError: another dtype or shape, no image, or a wrong number of labels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be (N > 0, 1 or 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}")
    rows = -(-len(images) // columns)
    if len(row_labels) not in (0, rows) or len(column_labels) not in (0, columns):
        raise ValueError(f"{rows} rows and {columns} columns need as many labels, or none")
    factor = factor or enlargement(images.shape[2])
    height, width = images.shape[2] * factor, images.shape[3] * factor
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 13)
    left = max((round(font.getlength(_line(label))) + 8 for label in row_labels), default=0)
    top = 20 if column_labels else 0
    size = (left + columns * (width + GAP) - GAP, top + rows * (height + GAP) - GAP)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    pixels = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    for index, tile in enumerate(pixels):
        row, column = divmod(index, columns)
        enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + column * (width + GAP), top + row * (height + GAP)))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(row_labels):
        place = (left - 8, top + row * (height + GAP) + height / 2)
        draw.text(place, _line(label), fill=NEUTRAL, font=font, anchor="rm")
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + GAP) + width / 2, 8), _line(label), fill=NEUTRAL, font=font, anchor="mm")
    return sheet


def plain(image: Tensor) -> Image.Image:
    """One image (C, H, W) uint8 as it is, grey or RGB."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def _line(label: str) -> str:
    """Without breaks, which cannot be drawn in one line."""
    return " ".join(label.split())


def class_grid(images: Tensor, labels: Tensor, class_names: Sequence[str], per_class: int = 8) -> Image.Image:
    """The first ``per_class`` images of each class, one row a class, named in the margin.

    Two models sampled with the same labels and noise give grids that compare place by place.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in 0..len(class_names)-1. Classes with fewer than ``per_class`` images shorten all rows;
            classes with none are left out.
    """
    places = [torch.nonzero(labels == c).flatten() for c in range(len(class_names))]
    shown = [(name, place) for name, place in zip(class_names, places, strict=True) if len(place)]
    columns = min([per_class, *(len(place) for _, place in shown)])
    picked = torch.cat([place[:columns] for _, place in shown]) if shown else torch.empty(0, dtype=torch.int64)
    return grid(images[picked], columns, row_labels=[name for name, _ in shown])


def pairs_grid(
    above: Tensor, below: Tensor, names: tuple[str, str], notes: Sequence[str], columns: int = 8
) -> Image.Image:
    """Images with their partners underneath, ``columns`` pairs in a band.

    Args:
        above, below: (N > 0, C, H, W) uint8; ``below[i]`` stands under ``above[i]``.
        names: of the two rows.
        notes: one a pair, above it.
    """
    bands = []
    for start in range(0, len(above), columns):
        part = slice(start, start + columns)
        held = len(above[part])
        bands.append(grid(torch.cat([above[part], below[part]]), held, row_labels=names, column_labels=notes[part]))
    sheet = Image.new("RGBA", (bands[0].width, sum(b.height + BAND for b in bands) - BAND), (0, 0, 0, 0))
    for number, band in enumerate(bands):
        sheet.paste(band, (0, number * (bands[0].height + BAND)))
    return sheet


def png(picture: Image.Image) -> bytes:
    """The picture as PNG; equal pixels give equal bytes."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(picture: Image.Image, path: str | Path) -> Path:
    """Write a PNG file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(png(picture))
    os.replace(beside, path)
    return path


def data_uri(content: bytes) -> str:
    """PNG bytes as a ``data:`` URI, so that a page carries its pictures."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
