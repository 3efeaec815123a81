"""Sources of images: every kind reads what was written, bad data is named in one line, splits keep their promises."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydantic import ValidationError

from diffstill.data.sources import DataSpec, DataSplits, load_data
from diffstill.data.sources.pixels import Looks, PixelFormat
from diffstill.data.sources.splits import apportion, stratified_split, stratified_subset
from diffstill.errors import InputError

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load(source: object, **options: object) -> DataSplits:
    return load_data(DataSpec(source=str(source), **options))


def refused(source: object, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def save(path: Path, images: np.ndarray, mode: str | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(images)
    (image.convert(mode) if mode else image).save(path, **options)


def class_folders(root: Path, classes: dict[str, int], side: int = 6) -> np.ndarray:
    """PNG noise; returns the images in the order of class name, then file name."""
    images = noise(sum(classes.values()), side, side, 3)
    rest = iter(images)
    for name in sorted(classes):
        for i in range(classes[name]):
            save(root / name / f"{i:03d}.png", next(rest))
    return images


def nhwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def write_strips(path: Path, images: np.ndarray, labels: np.ndarray, per_strip: int, **extra: object) -> None:
    encoded = []
    for start in range(0, len(images), per_strip):
        strip = images[start : start + per_strip]
        file = io.BytesIO()
        Image.fromarray(strip.reshape(-1, *strip.shape[2:])).save(file, "WEBP", lossless=True, exact=True)
        encoded.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, encoded)])
    np.savez(path, webp=np.frombuffer(b"".join(encoded), np.uint8), offsets=offsets, labels=labels, **extra)


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


def test_describe_is_what_a_receipt_needs() -> None:
    data = load("digits", limit=20)
    told = data.describe()
    assert told["spec"] == {"source": "digits", "limit": 20}
    assert told["shape"] == [1, 8, 8]
    assert told["sha256"] == data.fingerprint()
    assert told["splits"]["train"] == {"images": 20, "sha256": data.train.fingerprint(), "per_class": [2] * 10}
    assert told["skipped"] == {"images": 0, "first": []}


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
    for held, fraction in ((held_val, val), (held_test, test)):
        total = np.ceil(fraction * n - 1e-9)
        assert held.sum() <= total
        assert (np.abs(held - counts * total / n) <= 1).all()
        if (counts[counts > 0] >= 8).all():
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
    assert data.describe()["skipped"]["images"] == 2
    good = [np.asarray(Image.open(tmp_path / "cat" / f"{i:03d}.png")) for i in (0, 1, 3)]
    assert np.array_equal(nhwc(data.train.images[:3]), np.stack(good))
    sized = load(tmp_path, **WHOLE, skip_bad=True, size=32, channels=3)
    assert sized.fingerprint() == data.fingerprint()


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


# --- npz


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(3, 9), st.integers(4, 7), st.just(0), st.sampled_from([1, 3]))),
    st.randoms(use_true_random=False),
)
def test_npz_layouts_are_equal(tmp_path_factory: pytest.TempPathFactory, like: np.ndarray, random: object) -> None:
    n, side, _, channels = like.shape
    images, labels = noise(n, side, side, channels, seed=n), np.arange(n) % 2
    folder = tmp_path_factory.mktemp("npz")
    forms = {"nhwc": images, "nchw": images.transpose(0, 3, 1, 2), "fortran": np.asfortranarray(images)}
    forms |= {"nhw": images[..., 0]} if channels == 1 else {}
    for name, array in forms.items():
        write = np.savez_compressed if name == "nchw" else np.savez
        write(folder / f"{name}.npz", x=array, y=labels[:, None].astype(np.uint8))
        data = load(folder / f"{name}.npz", **WHOLE)
        assert np.array_equal(nhwc(data.train.images), images)
        assert data.train.labels.tolist() == labels.tolist()


def test_npz_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = noise(50, 5, 5, 3), np.arange(50) % 2
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    monkeypatch.setattr("diffstill.data.sources.npzfile.BLOCK_BYTES", 75 * 7)
    data = load(tmp_path / "a.npz", limit=6)
    train, val, test = stratified_split(labels, 0.1, 0.2, 0)
    for part, index in ((data.train, train), (data.val, val), (data.test, test)):
        kept = index[stratified_subset(labels[index], 6, 0)]
        assert np.array_equal(nhwc(part.images), images[kept])
        assert part.labels.tolist() == labels[kept].tolist()


def test_npz_ambiguous_layout_is_asked_for(tmp_path: Path) -> None:
    images = noise(6, 3, 3, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) % 2)
    assert refused(tmp_path / "a.npz").field == "data.layout"
    assert np.array_equal(load(tmp_path / "a.npz", **WHOLE, layout="NCHW").train.images.numpy(), images)
    assert np.array_equal(nhwc(load(tmp_path / "a.npz", **WHOLE, layout="NHWC").train.images), images)
    np.savez(tmp_path / "b.npz", images=noise(6, 5, 5, 3), labels=np.arange(6) % 2)
    assert "without 1 or 3 channels as NCHW" in str(refused(tmp_path / "b.npz", layout="NCHW"))


def test_npz_with_several_splits_and_files(tmp_path: Path) -> None:
    images, labels = noise(30, 4, 4, 3), np.arange(30) % 3
    keras = {"x_train": images[:20], "y_train": labels[:20], "x_test": images[20:], "y_test": labels[20:]}
    np.savez(tmp_path / "keras.npz", **keras)
    data = load(tmp_path / "keras.npz", val_fraction=0)
    assert np.array_equal(nhwc(data.train.images), images[:20])
    assert np.array_equal(nhwc(data.test.images), images[20:])
    named = {f"{split}_{what}": keras[f"{key}_{split}"] for split in ("train", "test")
             for what, key in (("images", "x"), ("labels", "y"))}  # fmt: skip
    np.savez(tmp_path / "med.npz", **named)
    assert load(tmp_path / "med.npz", val_fraction=0).fingerprint() == data.fingerprint()
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, rows in (("train_p0", slice(0, 12)), ("train_p1", slice(12, 20)), ("test", slice(20, 30))):
        np.savez(folder / f"{name}.npz", images=images[rows], labels=labels[rows])
    for source, options in [
        (folder, {}),
        (f"npz:{folder}/*.npz", {}),
        (f"npz:{folder}/train_p0.npz,{folder}/train_p1.npz", {"test": f"{folder}/test.npz"}),
        (f"npz:{folder}/train_p*.npz", {"test": f"npz:{folder}/test.npz"}),
        (folder, {"train": "train_p0.npz,train_p1.npz", "test": "test.npz"}),
        (folder, {"train": "train_p*.npz", "test": "test.npz"}),
    ]:
        assert load(source, val_fraction=0, **options).fingerprint() == data.fingerprint()
    assert "among the training images" in str(refused(f"npz:{folder}/test.npz", test=f"{folder}/test.npz"))
    np.savez(folder / "more.npz", images=images, labels=labels)
    assert "more.npz" in str(refused(folder))  # never joined with the test images by accident
    assert refused(f"npz:{folder}/test.npz", train="x.npz").field == "data.train"


def test_npz_class_names_and_string_labels(tmp_path: Path) -> None:
    images = noise(8, 4, 4)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(8) % 2, class_names=np.array(["zero", "one", "two"]))
    data = load(tmp_path / "a.npz", **WHOLE)
    assert data.class_names == ("zero", "one", "two")
    np.savez(tmp_path / "b.npz", images=images, labels=np.array(["b", "a"] * 4))
    data = load(tmp_path / "b.npz", **WHOLE)
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [1, 0] * 4
    assert load(tmp_path / "b.npz", **WHOLE, class_names=("b", "a")).train.labels.tolist() == [0, 1] * 4
    # Test labels numbered in another order are matched by name.
    np.savez(tmp_path / "c.npz", images=images, labels=np.arange(8) % 2, class_names=np.array(["one", "zero"]))
    joint = load(tmp_path / "a.npz", test=str(tmp_path / "c.npz"), val_fraction=0)
    assert joint.test.labels.tolist() == [1, 0] * 4
    assert "'zero' is not one of the training classes (a, b)" in str(
        refused(tmp_path / "b.npz", test=str(tmp_path / "a.npz"))
    )
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(8) % 2)
    assert "both have class names" in str(refused(tmp_path / "d.npz", test=str(tmp_path / "b.npz")))
    assert load(tmp_path / "d.npz", **WHOLE, class_names=("no", "yes")).class_names == ("no", "yes")
    assert refused(tmp_path / "d.npz", **WHOLE, class_names=("no",)).field == "data.source"
    assert refused(tmp_path / "a.npz", **WHOLE, class_names=("no",)).field == "data.class_names"


def test_classes_are_counted_over_all_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "tr.npz", images=noise(6, 4, 4), labels=np.arange(6) % 2)
    np.savez(tmp_path / "te.npz", images=noise(3, 4, 4), labels=np.arange(3))
    assert load(tmp_path / "tr.npz", test=str(tmp_path / "te.npz"), val_fraction=0).num_classes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.arange(8) / 2}, "float64 labels"),
        ({"labels": np.array([0.0, np.nan] * 4)}, "missing (NaN) labels"),
        ({"labels": np.array([0, 1, -1, 1] * 2)}, "negative label -1 at image 2"),
        ({"labels": np.array([0, 255] * 4)}, "numbers 2 classes from 0 to 255"),
        ({"labels": np.array([1, 2] * 4)}, "numbers 2 classes from 1 to 2"),
        ({"labels": np.eye(8, dtype=np.uint8)}, "labels of shape (8, 8)"),
        ({"labels": np.arange(7)}, "8 images and 7 labels"),
        ({"labels": np.array([None] * 8)}, "pickled objects"),
        ({"images": np.array([None] * 8)}, "pickled objects"),
        ({"images": np.random.rand(8, 4, 4, 3)}, "holds float64 values"),
        ({"images": np.zeros((8, 4, 4, 3), np.int64)}, "holds int64 values"),
        ({"images": noise(8, 48)}, "has the shape (8, 48)"),
        ({"images": noise(8, 4, 4, 4)}, "without 1 or 3 channels"),
        ({"images": noise(0, 4, 4, 3)}, "has the shape (0, 4, 4, 3)"),
        ({"class_names": np.arange(2)}, "class_names"),
        ({"class_names": np.array(["only"])}, "label 1 where there are 1 class names"),
    ],
)
def test_npz_mistakes_have_one_line(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **({"images": noise(8, 4, 4, 3), "labels": np.arange(8) % 2} | change))
    error = refused(tmp_path / "a.npz")
    assert error.field == "data.source"
    assert message in str(error)


def test_npz_keys_can_be_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pics=noise(8, 4, 4), y=np.arange(8) % 2, kind=np.arange(8) % 4)
    assert "set data.image_key to one of its keys: pics, y, kind" in str(refused(tmp_path / "a.npz"))
    data = load(tmp_path / "a.npz", **WHOLE, image_key="pics", label_key="kind")
    assert data.num_classes == 4
    np.savez(tmp_path / "b.npz", x=noise(8, 4, 4), y=np.arange(8) % 2, kind=np.arange(8) % 4, class_names=["no", "yes"])
    assert load(tmp_path / "b.npz", **WHOLE).class_names == ("no", "yes")
    assert load(tmp_path / "b.npz", **WHOLE, label_key="kind").class_names == ("0", "1", "2", "3")
    assert "has no key nope" in str(refused(tmp_path / "a.npz", image_key="nope"))


def test_npz_that_is_damaged_or_a_pickle(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return os.makedirs, (str(tmp_path / "exploded"), "x")

    (tmp_path / "a.npz").write_bytes(pickle.dumps(Bomb()))
    assert "cannot be read" in str(refused(tmp_path / "a.npz"))
    box = np.empty(8, object)
    box[:] = [Bomb() for _ in range(8)]
    for name in ("images", "labels", "class_names"):
        arrays = {"images": noise(8, 4, 4), "labels": np.arange(8) % 2, "class_names": np.array(["a", "b"])}
        np.savez(tmp_path / "b.npz", **(arrays | {name: box}))
        assert f"b.npz:{name}" in str(refused(tmp_path / "b.npz"))
    assert not (tmp_path / "exploded").exists()
    np.savez(tmp_path / "c.npz", images=noise(8, 40, 40), labels=np.arange(8) % 2)
    whole = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(whole[:5000])
    assert "cannot be read" in str(refused(tmp_path / "c.npz"))
    flipped = bytearray(whole)
    flipped[3000] ^= 255  # inside the pixels: the archive's checksum notices
    (tmp_path / "c.npz").write_bytes(flipped)
    assert "CRC" in str(refused(tmp_path / "c.npz", **WHOLE))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("images.npy", b"not an array")
    assert "cannot be read" in str(refused(tmp_path / "d.npz"))


# --- strips


@pytest.mark.parametrize("grey", [False, True])
def test_strips_are_bit_exact(tmp_path: Path, grey: bool) -> None:
    images, labels = noise(23, 6, 6, *(() if grey else (3,))), (np.arange(23) % 4).astype(np.uint8)
    names = np.array(["a", "b", "c", "d"])
    write_strips(tmp_path / "train.npz", images, labels, 5, index=np.arange(23), class_names=names)
    write_strips(tmp_path / "test.npz", images[:7], labels[:7], 7)
    data = load(tmp_path, val_fraction=0)
    assert data.shape == (1 if grey else 3, 6, 6)
    assert np.array_equal(nhwc(data.train.images).squeeze(), images)
    assert np.array_equal(nhwc(data.test.images).squeeze(), images[:7])
    assert data.train.labels.tolist() == labels.tolist()
    assert data.class_names == ("a", "b", "c", "d")
    few = load(f"npz:{tmp_path}/train.npz", limit=3, val_fraction=0, test_fraction=0.2)
    train, _, _ = stratified_split(labels.astype(np.int64), 0.0, 0.2, 0)
    kept = train[stratified_subset(labels[train].astype(np.int64), 3, 0)]
    assert np.array_equal(nhwc(few.train.images).squeeze(), images[kept])
    assert load(tmp_path, val_fraction=0, channels=3).shape == (3, 6, 6)


def test_a_rare_colour_image_is_not_lost_in_grey(tmp_path: Path) -> None:
    images = np.repeat(noise(40, 4, 4, 1), 3, axis=3)
    images[1, 0, 0] = (255, 0, 0)
    write_strips(tmp_path / "a.npz", images, np.arange(40) % 2, 1)
    assert refused(tmp_path / "a.npz", **WHOLE).field == "data.channels"
    assert np.array_equal(nhwc(load(tmp_path / "a.npz", **WHOLE, channels=3).train.images), images)
    assert load(tmp_path / "a.npz", **WHOLE, channels=1).train.images[1, 0, 0, 0] == 76


def test_strip_mistakes_have_one_line(tmp_path: Path) -> None:
    images, labels, path = noise(10, 6, 6, 3), np.arange(10) % 2, tmp_path / "a.npz"
    write_strips(path, images, labels[:9], 5)
    assert "10 images and 9 labels" in str(refused(path))
    write_strips(path, images[:, :5], labels, 1)
    assert "not square images" in str(refused(path))
    write_strips(path, images, labels, 5)
    good = dict(np.load(path))
    for offsets in (good["offsets"] * 2, good["offsets"][::-1], good["offsets"] / 1.0, good["offsets"][:1]):
        np.savez(path, **(good | {"offsets": offsets}))
        assert "a.npz:offsets" in str(refused(path))
    np.savez(path, **(good | {"webp": np.zeros_like(good["webp"])}))
    assert "cannot be read" in str(refused(path))


# --- parquet and hub


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_parquet_round_trip(tmp_path: Path, struct: bool, named: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images, labels = noise(20, 6, 6, 3), np.arange(20) % 2
    cells = [encoded(image) for image in images]
    table = pa.table(
        {
            "id": list(range(20)),
            "image": [{"bytes": cell, "path": None} for cell in cells] if struct else cells,
            "label": [("dog", "cat")[k] for k in labels] if named else labels,
        }
    )
    pq.write_table(table.slice(0, 16), tmp_path / "train-00000-of-00001.parquet", row_group_size=3)
    pq.write_table(table.slice(16, 4), tmp_path / "test-00000-of-00001.parquet")
    data = load(f"parquet:{tmp_path}", val_fraction=0.25)
    train, val, _ = stratified_split(labels[:16], 0.25, 0.0, 0)
    assert np.array_equal(nhwc(data.train.images), images[train])
    assert np.array_equal(nhwc(data.val.images), images[val])
    assert np.array_equal(nhwc(data.test.images), images[16:])
    assert data.class_names == (("cat", "dog") if named else ("0", "1"))
    assert data.test.labels.tolist() == [1 - k if named else k for k in labels[16:]]
    assert load(tmp_path, val_fraction=0.25).fingerprint() == data.fingerprint()


def test_parquet_mistakes_have_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"

    def write(**columns: object) -> None:
        pq.write_table(pa.table(columns), path)

    cells = [encoded(image) for image in noise(4, 6, 6, 3)]
    write(image=[*cells[:3], None], label=[0, 1, 0, 1])
    assert "row 3" in str(refused(path, **WHOLE))
    assert len(load(path, **WHOLE, skip_bad=True).train) == 3
    write(image=cells, label=[0, 1, None, 1])
    assert "missing (NaN)" in str(refused(path))
    write(image=cells, label=[0.5, 1, 0, 1])
    assert "float64" in str(refused(path))
    write(a=cells, b=cells, label=[0, 1, 0, 1])
    error = refused(path)
    assert error.field == "data.image_key"
    assert "use one of: a, b" in str(error)
    assert len(load(path, **WHOLE, image_key="b").train) == 4
    write(image=cells, group=[0, 1, 0, 1], other=[0, 1, 0, 1])
    assert refused(path).field == "data.label_key"
    write(label=[0, 1, 0, 1])
    assert refused(path).field == "data.image_key"
    path.write_bytes(b"no parquet")
    assert "cannot be read as parquet" in str(refused(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'diffstill[parquet]'" in str(refused(path))


def hub_dataset(images: np.ndarray, labels: np.ndarray, names: list[str] | None) -> object:
    datasets = pytest.importorskip("datasets")
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names) if names else None}
    features["fine_label"] = features["fine_label"] or datasets.Value("int64")
    columns = {"img": [Image.fromarray(image) for image in images], "fine_label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_hub_datasets_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images, labels = noise(24, 6, 6, 3), np.arange(24) % 2
    parts = {"train": slice(0, 16), "test": slice(16, 20), "extra": slice(20, 24)}
    whole = datasets.DatasetDict({k: hub_dataset(images[s], labels[s], ["no", "yes"]) for k, s in parts.items()})
    whole.save_to_disk(tmp_path / "saved")
    data = load(f"hub:{tmp_path / 'saved'}", val_fraction=0)
    assert data.class_names == ("no", "yes")
    assert np.array_equal(nhwc(data.train.images), images[:16])
    assert np.array_equal(nhwc(data.test.images), images[16:20])
    assert load(tmp_path / "saved", val_fraction=0).fingerprint() == data.fingerprint()
    other = load(tmp_path / "saved", val_fraction=0, train="test", test="extra")
    assert np.array_equal(nhwc(other.train.images), images[16:20])
    assert np.array_equal(nhwc(other.test.images), images[20:])
    apart = load(tmp_path / "saved", train="test", val_fraction=0, test_fraction=0.5)
    assert (len(apart.train), len(apart.test)) == (2, 2)  # the split now trained on is no longer the test split
    error = refused(tmp_path / "saved", test="tset")
    assert error.field == "data.test"
    assert "use one of: train, test, extra" in str(error)
    assert "training split too" in str(refused(tmp_path / "saved", test="train"))
    hub_dataset(images, labels - 1, None).save_to_disk(tmp_path / "one")
    assert "negative label -1" in str(refused(tmp_path / "one"))
    hub_dataset(images, labels, None).save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one").test) == 5


def test_hub_without_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'diffstill[data]'" in str(refused("hub:owner/name"))


def test_parquet_written_by_datasets_keeps_class_names(tmp_path: Path) -> None:
    images, labels = noise(8, 6, 6, 3), np.arange(8) % 2
    hub_dataset(images, labels, ["no", "yes"]).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", **WHOLE)
    assert data.class_names == ("no", "yes")
    assert np.array_equal(nhwc(data.train.images), images)


# --- the real thing, where it lies beside the checkout


def test_cifar10_as_published() -> None:
    root = Path(os.environ.get("DIFFSTILL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10"
    if not root.is_dir():
        pytest.skip("no local CIFAR-10")
    data = load(f"npz:{root}/cifar10_train_p0.npz", test=f"{root}/cifar10_test.npz", limit=None)
    assert (data.shape, data.num_classes) == ((3, 32, 32), 10)
    assert data.train.labels.bincount().tolist() == [450] * 10
    assert data.val.labels.bincount().tolist() == [50] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    # Order and content of the official test batch: its first labels are known by heart, its mean is published.
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    mean = data.test.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4942, 0.4851, 0.4504], dtype=torch.float64), atol=1e-4)
