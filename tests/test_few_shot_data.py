"""Parts of a data set: some classes, no labels, a few shots; and the features that such data is measured in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import class_folders, load, noise, refused

from diffstill.data.batches import batch_indices
from diffstill.data.sources import DataSplits, whole_source
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.stream import BatchStream
from diffstill.evaluation.features import extract, make_extractor
from diffstill.jobs.finish import describe_data
from diffstill.recipe import load_recipe


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load("digits")


def rows(images: torch.Tensor) -> list[bytes]:
    """Each image's pixels, in a comparable order."""
    return sorted(image.numpy().tobytes() for image in images)


def every(data: DataSplits) -> list[bytes]:
    return rows(torch.cat([data.train.images, data.val.images, data.test.images]))


def of_class(data: DataSplits, split: str, label: int) -> torch.Tensor:
    part = getattr(data, split)
    return part.images[part.labels == label]


# --- classes


def test_classes_are_kept_in_the_order_given_and_no_image_changes_its_split(digits: DataSplits) -> None:
    some = load("digits", classes=[8, "1"])
    assert some.class_names == ("8", "1")
    for split in ("train", "val", "test"):
        assert len(getattr(some, split)) == sum(len(of_class(digits, split, label)) for label in (8, 1))
        for number, label in enumerate((8, 1)):
            assert torch.equal(of_class(some, split, number), of_class(digits, split, label))


def test_classes_with_a_minus_are_left_out() -> None:
    assert load("digits", classes=-8).class_names == tuple("012345679")
    assert load("digits", classes=["-0", "-9"]).class_names == tuple("12345678")
    kept, same = load("digits", classes=["-0", "-9"]), load("digits", classes=list(range(1, 9)))
    assert kept.fingerprint() == same.fingerprint()


def test_classes_come_out_of_yaml_and_the_command_line_as_names() -> None:
    recipe = load_recipe("digits-teacher", ["data.classes=[0, 1]"])
    assert recipe.data.classes == ("0", "1")
    assert load_recipe("digits-teacher", ["data.classes=-8"]).data.classes == ("-8",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["11"]}, "data.classes: '11' is no class of the data; use some of: 1"),
        ({"classes": ["-x"]}, "data.classes: 'x' is no class of the data; use some of: 0, 1, 2"),
        ({"classes": ["-x"]}, "7, 8, 9; or all, by data.classes=null"),
        ({"classes": ["1", "-2"]}, "data.classes: ['1', '-2'] mixes the two; name the classes to keep"),
        ({"classes": []}, "data.classes: [] is not usable; name one class or more, each once"),
        ({"classes": ["1", "1"]}, "data.classes: ['1', '1'] is not usable; name one class or more, each once"),
        ({"classes": [f"-{k}" for k in range(10)]}, "leaves no class; keep one or more"),
        ({"shots": 0}, "data.shots: 0 is not usable; use a whole number from 1"),
        (
            {"classes": [8], "shots": 175},
            "data.shots: 175 is more than the training images of class 8; there are 174; set data.shots=174, or fewer, "
            "or leave data.shots out",
        ),
        ({"unlabelled": True, "shots": 1798}, "data.shots: 1798 is more than the training images of class image"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    assert message in str(refused("digits", **options))


# --- labels and shots


def test_unlabelled_images_are_the_same_images(digits: DataSplits) -> None:
    plain = load("digits", unlabelled=True)
    assert plain.class_names == ("image",)
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(plain, split).images, getattr(digits, split).images)
        assert not getattr(plain, split).labels.any()
    few = load("digits", classes=[3, 5], unlabelled=True)
    assert torch.equal(few.test.images, load("digits", classes=[3, 5]).test.images)
    # A limit stays stratified by the classes that nobody is told.
    limited, told = load("digits", unlabelled=True, limit=20), load("digits", limit=20)
    assert torch.equal(limited.train.images, told.train.images)
    assert told.train.labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize("seed", [0, 7])
def test_shots_are_trained_on_and_all_other_images_tested_on(digits: DataSplits, seed: int) -> None:
    few = load("digits", classes=[8, 2], shots=10, split_seed=seed)
    assert few.few_shot
    assert not digits.few_shot
    assert (len(few.train), len(few.val)) == (20, 0)
    assert few.train.labels.bincount().tolist() == [10, 10]
    assert every(few) == every(load("digits", classes=[8, 2]))
    assert set(rows(few.train.images)).isdisjoint(rows(few.test.images))


def test_which_shots_follows_from_the_seed_alone() -> None:
    def shots(count: int, **options: Any) -> set[bytes]:
        return set(rows(load("digits", classes=[8], shots=count, **options).train.images))

    assert shots(5) == shots(5, limit=30) == shots(5, val_fraction=0.4, test_fraction=0.0)
    assert shots(5) < shots(10)
    assert shots(5) != shots(5, split_seed=1)
    assert len(load("digits", classes=[8], shots=5, limit=30).test) == 30


def test_shots_of_unlabelled_images_are_so_many_in_all() -> None:
    few = load("digits", unlabelled=True, shots=7)
    assert (len(few.train), len(few.val), len(few.test)) == (7, 0, 1790)


@pytest.mark.parametrize("kind", ["npz", "folder", "parquet"])
def test_every_kind_of_source_gives_its_shots_from_its_training_part(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        for split, count in (("train", 6), ("val", 3), ("test", 4)):
            class_folders(tmp_path / split, {"cat": count, "dog": count, "owl": count})
    else:
        labels = np.repeat(["cat", "dog", "owl"], 6), np.repeat(["cat", "dog", "owl"], 4)
        images = noise(18, 6, 6, 3, seed=1), noise(12, 6, 6, 3, seed=2)
        if kind == "npz":
            np.savez(
                tmp_path / "x.npz", x_train=images[0], y_train=labels[0], x_test=images[1], y_test=labels[1]
            )  # fmt: skip
        else:
            _parquet(tmp_path, images, labels)
    source = f"{kind}:{tmp_path}"
    few = load(source, classes=["owl", "cat"], shots=2, val_fraction=0.0)
    whole = load(source, val_fraction=0.0)
    assert few.class_names == ("owl", "cat")
    held = 7 if kind == "folder" else 4
    assert (len(few.train), len(few.val), len(few.test)) == (4, 0, 2 * (4 + held))
    for number, label in enumerate((2, 0)):
        assert set(rows(of_class(few, "train", number))) <= set(rows(of_class(whole, "train", label)))
        told = [of_class(whole, split, label) for split in ("train", "val", "test")]
        mine = [of_class(few, split, number) for split in ("train", "test")]
        assert rows(torch.cat(mine)) == rows(torch.cat(told))


def _parquet(root: Path, images: tuple[np.ndarray, ...], labels: tuple[np.ndarray, ...]) -> None:
    import io

    from PIL import Image

    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, part, own in zip(("train", "test"), images, labels, strict=True):
        encoded = []
        for image in part:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        parquet.write_table(arrow.table({"image": encoded, "label": own.tolist()}), root / f"{name}.parquet")


def test_fingerprint_and_description_tell_the_choice(digits: DataSplits) -> None:
    made = [
        digits,
        load("digits", classes=[8]),
        load("digits", unlabelled=True),
        load("digits", classes=[8], unlabelled=True),
        load("digits", shots=3),
        load("digits", shots=3, split_seed=1),
    ]
    assert len({data.fingerprint() for data in made}) == len(made)
    told = describe_data(load("digits", classes=[8, 1], shots=3))
    assert told.classes == ["8", "1"]
    assert told.per_class == {"train": [3, 3], "val": [0, 0], "test": [174 - 3, 182 - 3]}


# --- training on fewer images than a batch


def test_a_batch_may_be_larger_than_the_data() -> None:
    few = load("digits", unlabelled=True, shots=3)
    stream = BatchStream(
        few.train, NoiseSchedule.create("cosine", 100), batch_size=16, seed=1, device=torch.device("cpu")
    )
    seen = []
    for step in range(6):
        index = batch_indices(3, 1, 16 * step, 16)
        # Any batch is the same whether asked for in order or alone.
        assert torch.equal(index, torch.cat([batch_indices(3, 1, 16 * step + k, 1) for k in range(16)]))
        batch = stream.batch(16 * step)
        assert torch.equal(batch.x0, few.train.images[index].float() / 127.5 - 1)
        seen.append(index)
    assert torch.cat(seen).bincount().tolist() == [32, 32, 32]


# --- the features it is measured in


def test_features_come_from_the_whole_source_whatever_is_left_out(tmp_path: Path) -> None:
    whole = load("digits", limit=60)
    reference = make_extractor("classifier", whole, tmp_path)
    images = of_class(load("digits"), "test", 8)
    for options in ({"classes": ["-8"]}, {"unlabelled": True}, {"classes": [8], "shots": 5}, {"shots": 2}):
        part = load("digits", limit=60, **options)
        assert whole_source(part).fingerprint() == whole.fingerprint()
        extractor = make_extractor("classifier", part, tmp_path)
        assert extractor.info == reference.info
        assert torch.equal(extract(extractor, images), extract(reference, images))
        # Labels that mean something else cannot be agreed with.
        relabelled = "classes" in options or "unlabelled" in options
        assert extractor.classifies is not relabelled
    assert len(list(tmp_path.iterdir())) == 1
    assert whole_source(whole) is whole


def test_the_whole_source_has_the_form_of_its_part(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 10, "dog": 10}, side=6)
    part = load(tmp_path, classes=["dog"], size=4, channels=1)
    assert whole_source(part).shape == part.shape == (1, 4, 4)
    assert whole_source(part).class_names == ("cat", "dog")
