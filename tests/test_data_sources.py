"""Digits and folders of images: the spec, splits that keep their promises, pixels; bad data is named in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import WHOLE, class_folders, load, nhwc, noise, refused, save
from PIL import Image
from pydantic import ValidationError

from diffstill.data.sources import DataSpec, load_data
from diffstill.data.sources.pixels import Looks, PixelFormat
from diffstill.data.sources.splits import apportion, stratified_split, stratified_subset
from diffstill.errors import InputError
from diffstill.jobs.finish import describe_data

# --- the spec


def test_spec_refuses_unknown_keys_and_bad_values() -> None:
    with pytest.raises(ValidationError):
        DataSpec(source="digits", sise=8)
    for field, value in [
        ("size", 0),
        ("limit", 0),
        ("val_fraction", 1.0),
        ("test_fraction", -0.1),
        ("split_seed", -1),
        ("class_names", ("a", "a")),
    ]:
        with pytest.raises(InputError) as caught:
            DataSpec(source="digits", **{field: value})
        assert caught.value.field == f"data.{field}"
    with pytest.raises(InputError, match="nothing is left to train on"):
        DataSpec(source="digits", val_fraction=0.5, test_fraction=0.5)


def test_parse_recognises_what_a_path_is(tmp_path: Path) -> None:
    class_folders(tmp_path / "pets", {"cat": 2, "dog": 2})
    np.savez(tmp_path / "a.npz", images=noise(4, 6, 6, 3), labels=np.array([0, 1, 0, 1]))
    assert DataSpec.parse("digits") == DataSpec(source="digits")
    for text in (str(tmp_path / "pets"), f"folder:{tmp_path / 'pets'}", str(tmp_path / "a.npz"), f"npz:{tmp_path}"):
        assert len(load_data(DataSpec.parse(text).model_copy(update=WHOLE)).train) == 4
    for text in ("digit", str(tmp_path / "missing"), "hub:", " "):
        with pytest.raises(InputError) as caught:
            DataSpec.parse(text)
        assert caught.value.field == "data.source"
    (tmp_path / "notes.txt").write_text("no")
    assert "not recognised" in str(refused(tmp_path / "notes.txt"))


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    table = page.partition("## All the fields")[2]
    assert {name for name in DataSpec.model_fields if f"`{name}`" not in table} == set()


# --- digits


def test_digits_are_the_real_ones_and_the_split_is_fixed() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1257, 180, 360)
    assert data.shape == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    bunch = load_digits()
    whole = load("digits", **WHOLE)
    assert torch.equal(whole.train.labels, torch.from_numpy(bunch.target))
    assert torch.equal(whole.train.images[:, 0], torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8))
    # Pinned: published numbers refer to this very split.
    assert [part.fingerprint() for part in (data.train, data.val, data.test)] == [
        "99976a676a63483d",
        "7db70bf5e4d03dfc",
        "1b8e4415b628dbf8",
    ]
    assert load("digits", split_seed=1).fingerprint() != data.fingerprint() == load("digits").fingerprint()


def test_what_a_receipt_tells_of_the_data() -> None:
    data = load("digits", limit=20)
    told = describe_data(data)
    assert (told.shape, told.fingerprint, told.skipped) == ((1, 8, 8), data.fingerprint(), 0)
    assert (told.splits["train"], told.per_class["train"]) == (20, [2] * 10)
    assert told.fingerprints == {part.split: part.fingerprint() for part in (data.train, data.val, data.test)}
    assert [sum(told.per_class[split]) for split in told.splits] == list(told.splits.values())
    assert data.left_out() is None


def test_digits_have_no_parts() -> None:
    assert refused("digits", test="digits").field == "data.test"


# --- splitting

labellings = st.lists(st.integers(0, 5), min_size=12, max_size=120).map(lambda x: np.array(x, np.int64))
fractions = st.sampled_from([0.0, 0.1, 0.15, 0.2, 0.35, 0.45])


@settings(max_examples=150, deadline=None)
@given(labellings, fractions, fractions, st.integers(0, 2**63 - 1))
def test_a_split_is_a_stratified_partition(labels: np.ndarray, val: float, test: float, seed: int) -> None:
    n = len(labels)
    try:
        parts = stratified_split(labels, val, test, seed)
    except InputError:
        asked = np.ceil(val * n - 1e-9) + np.ceil(test * n - 1e-9)
        assert asked > n - len(set(labels.tolist()))  # only where training could not keep one of each class
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all((np.diff(part) > 0).all() for part in parts)
    again = stratified_split(labels, val, test, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    counts = np.bincount(labels, minlength=6)
    train, held_val, held_test = (np.bincount(labels[part], minlength=6) for part in parts)
    assert (train[counts > 0] >= 1).all()
    asked = np.ceil(val * n - 1e-9) + np.ceil(test * n - 1e-9)
    fits = asked <= n - (counts > 0).sum()  # with one image of each class left to train on
    for held, fraction in ((held_val, val), (held_test, test)):
        total = np.ceil(fraction * n - 1e-9)
        assert held.sum() <= total
        assert (np.abs(held - counts * total / n) <= 1).all()
        if fits and (counts[counts > 0] >= 8).all():
            assert held.sum() == total


@settings(max_examples=100, deadline=None)
@given(labellings, st.integers(1, 130), st.integers(0, 9))
def test_a_limit_keeps_the_classes_in_proportion(labels: np.ndarray, size: int, seed: int) -> None:
    index = stratified_subset(labels, size, seed)
    kept = min(size, len(labels))
    counts = np.bincount(labels)
    assert len(set(index.tolist())) == len(index) == kept
    share = counts * kept / len(labels)
    assert (np.abs(np.bincount(labels[index], minlength=len(counts)) - share) <= 1).all()


def test_seeds_choose_different_images_uniformly() -> None:
    labels = np.zeros(40, np.int64)
    chosen = np.zeros(40)
    for seed in range(400):
        chosen[stratified_split(labels, 0.0, 0.25, seed)[2]] += 1
    # 400 draws of 10 in 40: 100 each, standard deviation 8.7.
    assert chosen.sum() == 4000
    assert np.abs(chosen - 100).max() < 45


def test_apportion_known_answer() -> None:
    counts = np.array([5, 3, 2])
    assert apportion(counts, 4, counts).tolist() == [2, 1, 1]  # shares 2, 1.2, 0.8
    assert apportion(counts, 4, np.array([1, 3, 2])).tolist() == [
        1,
        2,
        1,
    ]  # no room for the first: the next by remainder


def test_single_images_stay_in_training(tmp_path: Path) -> None:
    images, labels = noise(14, 4, 4), np.array([0] * 6 + [1] * 6 + [2, 3])
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    data = load(tmp_path / "a.npz")
    assert {2, 3} <= set(data.train.labels.tolist())
    assert data.num_classes == 4
    np.savez(tmp_path / "b.npz", images=images[:4], labels=np.arange(4))
    error = refused(tmp_path / "b.npz")
    assert error.field == "data.test_fraction"
    assert "4 images in 4 classes" in str(error)
    whole = load(tmp_path / "b.npz", **WHOLE)
    assert (len(whole.train), whole.test.shape, len(whole.val)) == (4, (1, 4, 4), 0)


# --- folders


def test_folder_reads_pixels_names_and_order(tmp_path: Path) -> None:
    images = class_folders(tmp_path / "pets", {"dog": 3, "cat": 2})
    for stray in ("cat/.hidden.png", "cat/notes.txt", "dog/Thumbs.db", "readme.json", ".git/x.png"):
        path = tmp_path / "pets" / stray
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not an image")
    data = load(f"folder:{tmp_path / 'pets'}", **WHOLE)
    assert data.name == "pets"
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert np.array_equal(nhwc(data.train.images), images)


def test_folder_with_its_own_splits(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 10, "dog": 10})
    tests = class_folders(tmp_path / "test", {"dog": 3})
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 3)
    assert data.test.labels.tolist() == [1, 1, 1]
    assert np.array_equal(nhwc(data.test.images), tests)
    class_folders(tmp_path / "valid", {"cat": 1, "dog": 1})
    assert len(load(tmp_path).val) == 2
    class_folders(tmp_path / "test", {"Dog": 1})
    assert "not one of the training classes (cat, dog)" in str(refused(tmp_path))
    class_folders(tmp_path / "extra", {"cat": 1})
    assert "extra" in str(refused(tmp_path))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    class_folders(tmp_path, {"train": 3, "plane": 3})
    assert load(tmp_path, **WHOLE).class_names == ("plane", "train")


def test_parts_named_by_the_spec(tmp_path: Path) -> None:
    class_folders(tmp_path / "all" / "learn", {"a": 4, "b": 4})
    class_folders(tmp_path / "all" / "held", {"a": 1, "b": 2})
    data = load(tmp_path / "all", train="learn", test="held", val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 3)
    data = load(tmp_path / "all" / "learn", test=str(tmp_path / "all" / "held"), val_fraction=0)
    assert (len(data.train), len(data.test)) == (8, 3)
    same = refused(tmp_path / "all" / "learn", test=str(tmp_path / "all" / "learn"))
    assert same.field == "data.test"
    assert "among the training images" in str(same)
    assert refused(tmp_path / "all", train="lern").field == "data.train"


def test_unreadable_images_are_named_or_skipped(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 4, "dog": 4}, side=32)
    torn = tmp_path / "cat" / "002.png"
    torn.write_bytes(torn.read_bytes()[:900])
    text = tmp_path / "dog" / "zz.jpg"
    text.write_text("<html>not found</html>")
    (tmp_path / "dog" / "zzz.png").write_bytes(b"")
    error = refused(tmp_path, **WHOLE)
    assert "skip_bad" in str(error)
    assert str(text) in str(error)  # its header already fails
    text.unlink()
    (tmp_path / "dog" / "zzz.png").unlink()
    error = refused(tmp_path, **WHOLE)
    assert str(torn) in str(error)
    assert error.field == "data.source"
    text.write_text("<html>not found</html>")
    data = load(tmp_path, **WHOLE, skip_bad=True)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    told = describe_data(data)
    assert (told.skipped, told.skipped_first) == (2, list(data.skipped))
    assert data.left_out() == f"2 unreadable images left out (data.skip_bad), the first: {data.skipped[0]}"
    good = [np.asarray(Image.open(tmp_path / "cat" / f"{i:03d}.png")) for i in (0, 1, 3)]
    assert np.array_equal(nhwc(data.train.images[:3]), np.stack(good))
    sized = load(tmp_path, **WHOLE, skip_bad=True, size=32, channels=3)
    assert sized.fingerprint() == data.fingerprint()
    for file in (tmp_path / "cat").iterdir():
        file.write_bytes(b"torn")
    assert "has no readable training image of class 'cat'" in str(refused(tmp_path, **WHOLE, skip_bad=True))


def test_folder_mistakes_have_one_line(tmp_path: Path) -> None:
    assert "does not exist" in str(refused(f"folder:{tmp_path}/no"))
    (tmp_path / "none").mkdir()
    assert "holds no class folders" in str(refused(tmp_path / "none"))
    save(tmp_path / "flat" / "a.png", noise(4, 4, 3))
    assert "holds images but no class folders" in str(refused(tmp_path / "flat"))
    assert "is a file" in str(refused(f"folder:{tmp_path}/flat/a.png"))
    class_folders(tmp_path / "gap", {"cat": 2})
    (tmp_path / "gap" / "dog").mkdir()
    error = refused(tmp_path / "gap")
    assert "without images" in str(error)
    assert "dog" in str(error)
    class_folders(tmp_path / "heldout" / "test", {"cat": 2})
    assert "no train folder" in str(refused(tmp_path / "heldout"))
    save(tmp_path / "sizes" / "a" / "0.png", noise(4, 4, 3))
    save(tmp_path / "sizes" / "a" / "1.png", noise(6, 6, 3))
    error = refused(tmp_path / "sizes", **WHOLE)
    assert error.field == "data.size"
    assert "is 4x4" in str(error)
    assert "is 6x6" in str(error)
    assert load(tmp_path / "sizes", **WHOLE, size=5).shape == (3, 5, 5)


# --- pixels


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 24),
    st.sampled_from([1, 3]),
    st.sampled_from(["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16"]),
    st.sampled_from(["lanczos", "bicubic", "bilinear", "box", "nearest"]),
)
def test_any_image_takes_the_form(w: int, h: int, side: int, channels: int, mode: str, resample: str) -> None:
    form = Looks(sizes={(w, h): "x"}).settle(DataSpec(source="digits", size=side, channels=channels, resample=resample))
    pixels = form.fit(Image.new(mode, (w, h), 200 if mode in ("L", "I;16") else None))
    assert pixels.shape == (channels, side, side)
    assert pixels.dtype == np.uint8
    assert pixels.min() == pixels.max()  # a flat image stays flat


def test_crop_takes_the_middle() -> None:
    image = noise(4, 10, 3)
    square = PixelFormat(3, 4).fit(Image.fromarray(image))
    assert np.array_equal(square.transpose(1, 2, 0), image[:, 3:7])
    assert np.array_equal(PixelFormat(3, 4).fit_block(image[None]), square[None])
    tall = PixelFormat(3, 4).fit(Image.fromarray(image.transpose(1, 0, 2)))
    assert np.array_equal(tall.transpose(2, 1, 0), image[:, 3:7])


def test_crop_none_refuses_what_is_not_square(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", noise(4, 6, 3))
    error = refused(tmp_path, **WHOLE, crop="none", size=4, channels=3)
    assert error.field == "data.crop"
    assert "6x4" in str(error)


def test_box_resize_is_the_mean() -> None:
    image = np.array([[0, 100], [100, 200]], np.uint8).repeat(2, 0).repeat(2, 1)
    assert PixelFormat(1, 2, Image.Resampling.BOX).fit(Image.fromarray(image)).tolist() == [[[0, 100], [100, 200]]]
    assert PixelFormat(1, 1, Image.Resampling.BOX).fit(Image.fromarray(image)).tolist() == [[[100]]]


def test_grey_colour_alpha_palette_and_depth(tmp_path: Path) -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (255, 0, 0, 255)
    save(tmp_path / "x" / "0.png", noise(4, 4))
    save(tmp_path / "x" / "1.png", np.full((4, 4), 257 * 100, np.uint16))
    grey = load(tmp_path, **WHOLE)
    assert grey.shape == (1, 4, 4)
    assert np.array_equal(grey.train.images[0, 0].numpy(), noise(4, 4))
    assert (grey.train.images[1] == 100).all()  # 16 bits are scaled, not clipped
    save(tmp_path / "x" / "2.png", red, mode="P")
    save(tmp_path / "x" / "3.png", clear)
    data = load(tmp_path, **WHOLE).train.images
    assert data.shape == (4, 3, 4, 4)
    assert np.array_equal(data[0].numpy(), np.stack([noise(4, 4)] * 3))
    assert np.array_equal(nhwc(data[2:3])[0], red)
    assert (nhwc(data[3:])[0, :2] == (255, 0, 0)).all()
    assert (data[3, :, 2:] == 255).all()  # transparent shows white
    assert load(tmp_path, **WHOLE, channels=1).train.images[2, 0, 0, 0] == 76  # ITU-R 601 luma of red


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    upright = noise(6, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown turned 90 degrees clockwise
    save(tmp_path / "a" / "0.png", np.rot90(upright, 1).copy(), exif=exif)
    assert np.array_equal(nhwc(load(tmp_path, **WHOLE).train.images)[0], upright)
