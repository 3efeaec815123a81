"""Images in npz, lossless strips, parquet and hub datasets: what was written is read; bad data is named in one line."""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pictures import WHOLE, load, nhwc, noise, refused, write_strips
from PIL import Image

from diffstill.data.sources.parts import in_threads
from diffstill.data.sources.splits import stratified_split, stratified_subset

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


def test_npz_class_names_are_each_one_class(tmp_path: Path) -> None:
    names = np.array(["a", "a", "b"])
    np.savez(tmp_path / "a.npz", images=noise(6, 4, 4), labels=np.arange(6) % 3, class_names=names)
    assert "class_names' repeats a name; give each class its own" in str(refused(tmp_path / "a.npz", **WHOLE))


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
    assert "pip install '.[parquet]' in the checkout of diffstill" in str(refused(path))


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
    assert "pip install '.[data]' in the checkout of diffstill" in str(refused("hub:owner/name"))


def test_parquet_written_by_datasets_keeps_class_names(tmp_path: Path) -> None:
    images, labels = noise(8, 6, 6, 3), np.arange(8) % 2
    hub_dataset(images, labels, ["no", "yes"]).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", **WHOLE)
    assert data.class_names == ("no", "yes")
    assert np.array_equal(nhwc(data.train.images), images)


# --- the real thing, where DIFFSTILL_DATA says that it lies


def test_cifar10_as_published() -> None:
    root = Path(os.environ.get("DIFFSTILL_DATA", "")) / "cifar10"
    if not root.is_dir():
        pytest.skip("no CIFAR-10 under DIFFSTILL_DATA")
    data = load(f"npz:{root}/cifar10_train_p0.npz", test=f"{root}/cifar10_test.npz", limit=None)
    assert (data.shape, data.num_classes) == ((3, 32, 32), 10)
    assert data.train.labels.bincount().tolist() == [450] * 10
    assert data.val.labels.bincount().tolist() == [50] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    # Order and content of the official test batch: its first labels are known by heart, its mean is published.
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    mean = data.test.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4942, 0.4851, 0.4504], dtype=torch.float64), atol=1e-4)


def test_an_iterator_given_up_halfway_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    results = in_threads(lambda k: k * k, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert set(threading.enumerate()) == before
    assert list(results) == [k * k for k in range(3, 1000)]
