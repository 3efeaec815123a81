"""Grids of samples as they are drawn, saved and embedded."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import fabricated
import numpy as np
import pytest
import torch
from PIL import Image

from diffstill.report import pictures


def test_grid_is_the_images_enlarged() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = pictures.grid(images, 3, factor=2)
    assert sheet.size == (3 * (12 + pictures.GAP) - pictures.GAP, 2 * (16 + pictures.GAP) - pictures.GAP)
    pixels = np.asarray(sheet)
    for index in range(5):
        top, left = (index // 3) * (16 + pictures.GAP), (index % 3) * (12 + pictures.GAP)
        tile = pixels[top : top + 16, left : left + 12]
        wanted = images[index].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        assert np.array_equal(tile[..., :3], wanted)
        assert (tile[..., 3] == 255).all()
    assert (pixels[:, 12 : 12 + pictures.GAP, 3] == 0).all(), "gaps are transparent"
    assert [pictures.enlargement(side) for side in (8, 16, 28, 32, 64, 512)] == [6, 3, 2, 2, 1, 1]


def test_class_grid_has_a_row_a_class_in_the_given_order() -> None:
    labels = torch.tensor([2, 0, 2, 0, 1, 0])
    images = (10 * torch.arange(6, dtype=torch.uint8) + 5)[:, None, None, None].expand(6, 1, 8, 8).contiguous()
    sheet = np.asarray(pictures.class_grid(images, labels, ["a", "b", "c", "never drawn"], per_class=2))
    tile = 48 + pictures.GAP
    column = sheet[24::tile, -20]
    assert column[:, 0].tolist() == [15, 45, 5], "one a row: class b has only one image, so all rows have one"
    left = sheet.shape[1] - (2 * tile - pictures.GAP)
    assert all(sheet[row * tile : (row + 1) * tile, :left, 3].any() for row in range(3)), "each row has its name"


def test_grid_refuses_what_it_cannot_draw() -> None:
    good = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for images in (good.float(), good[0], good[:0], torch.zeros(4, 2, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            pictures.grid(images, 2)
    with pytest.raises(ValueError, match="as many labels"):
        pictures.grid(good, 2, row_labels=["one"])


def test_a_label_with_line_breaks_is_drawn_in_one_line() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    broken, plain = (
        pictures.grid(images, 2, row_labels=[label, "b"], column_labels=[label, "d"]) for label in ("a\r\nx", "a x")
    )
    assert pictures.png(broken) == pictures.png(plain)


def test_png_round_trip(tmp_path: Path) -> None:
    images, labels = fabricated.digits()
    sheet = pictures.class_grid(images, labels, fabricated.CLASSES)
    path = pictures.save_png(sheet, tmp_path / "new" / "grid.png")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(sheet))
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    uri = pictures.data_uri(path.read_bytes())
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(content)))), np.asarray(sheet))
