"""``diffstill eval IMAGES``: samples that are on disk already, from any program, measured as a model's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..data.dataset import ImageData
from ..data.sources import DataSpec, DataSplits, load_data
from ..data.sources.folder import is_flat
from ..engine.runtime import Runtime
from ..errors import InputError
from ..recipe import EvaluationSpec, override_section
from ..report.page import write_report
from ..report.pictures import class_grid, grid, save_png
from ..report.receipt import Receipt, environment
from .evaluate import label_number
from .finish import GRID_PER_CLASS, baselines_of, check_out, describe_data, draw_shots, evaluator_for
from .train import Finished
from .ui import Ui

KINDS = ("npz", "folder", "parquet")
SHOWN, SHOWN_CLASSES = 80, 20
"""Images in the picture of unlabelled ones; classes in that of labelled ones."""


def holds_images(text: str) -> bool:
    """Whether a command line's MODEL names images instead: ``npz:``, ``folder:`` or ``parquet:`` and a path, an
    ``.npz`` or ``.parquet`` file, or a folder of image files."""
    path = Path(text).expanduser()
    if text.partition(":")[0] in KINDS and ":" in text:
        return True
    return path.suffix.lower() in (".npz", ".parquet") or is_flat(path)


def refuse_pictures(text: str) -> None:
    """For what is taken for a model.

    Raises:
        InputError: a folder of class folders, which only ``folder:`` tells from a model's.
    """
    path = Path(text).expanduser()
    held = any((path / inner / "model_index.json").exists() for inner in (".", "model"))
    if path.is_dir() and not held and any(map(is_flat, path.iterdir())):
        mend = f"for pictures in class folders write folder:{text}"
        raise InputError("model", text, mend, problem="has no model_index.json")


def open_images(text: str, shape: tuple[int, int, int] | None = None) -> tuple[ImageData, bool]:
    """All images of a source in one split, in its order; whether they have labels.

    Args:
        shape: of the images that they are compared with.

    Raises:
        InputError: no images, or one that cannot be read.
    """
    try:
        parts = _load(DataSpec.parse(text).model_copy(update={"val_fraction": 0.0, "test_fraction": 0.0}))
    except InputError as error:
        if error.field == "data.size":
            form = f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'colour'}" if shape else "one size"
            mend = f"bring the pictures to {form}; samples are not resized"
            raise InputError("samples", text, mend, problem="holds images of different sizes") from None
        # What only the data section of a recipe could set is no mend of samples.
        said = str(error).partition(": ")[2].partition(", or set data.")[0]
        raise InputError.about("samples", said) from None
    each = [part for part in (parts.train, parts.val, parts.test) if len(part)]
    images, labels = (torch.cat([getattr(part, name) for part in each]) for name in ("images", "labels"))
    return ImageData(parts.name, "samples", images, labels, parts.class_names), parts.labelled


def _load(spec: DataSpec) -> DataSplits:
    """With its labels, or where it has none that can be used, without; what then is wrong is wrong with the images."""
    try:
        return load_data(spec)
    except InputError:
        return load_data(spec.model_copy(update={"unlabelled": True}))


def protocol_of_images(overrides: Sequence[str]) -> EvaluationSpec:
    """The protocol asked for on the command line (``extractor=inception``)."""
    return override_section(EvaluationSpec(), overrides, "evaluation")


def evaluate_images(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    *,
    data: str | None,
    data_overrides: Sequence[str] = (),
    spec: EvaluationSpec | None = None,
) -> Finished:
    """Measures images against a data set and writes a receipt and a report.

    Args:
        data: the reference; required.
        data_overrides: ``key=value`` of the reference's data section.

    Raises:
        InputError: images that do not fit the data, or options that do not go with images.
    """
    if data is None:
        mend = "name the images to compare with: --data digits, --data npz:cifar10"
        raise InputError("data", None, mend, problem="is not known from images")
    check_out(out)
    splits = load_data(override_section(DataSpec.parse(data), data_overrides, "data"))
    pictures, labelled = open_images(source, splits.shape)
    protocol = (spec or EvaluationSpec()).model_copy(update={"samples": len(pictures)})
    evaluator = evaluator_for(protocol, splits, runtime, ui)
    named = _relabelled(pictures, splits) if labelled else None
    pictures, known = named or pictures, named is not None
    with ui.bar(f"measure {len(pictures)} images", 1.0) as bar:
        bar.update(0.0)
        found = evaluator.measure_images(pictures, pictures.name, labelled=known)
        bar.update(1.0)
    told = {"samples": len(pictures), "sampler": "none", "steps": 0, "guidance": ["none"], "seeds": [], "weights": ""}
    told |= {"labels": "as stored" if known else "none"}
    receipt = Receipt(
        kind="eval",
        name=pictures.name,
        seed=0,
        environment=environment(runtime.device),
        data=describe_data(splits),
        protocol=evaluator.protocol.model_copy(update=told),
        models={"samples": found},
        baselines=baselines_of(evaluator),
    )
    if runtime.is_main:
        path = save_png(_picture(pictures, splits, known), out / "pictures" / "samples-grid.png")
        found.images["grid"] = str(path.relative_to(out))
        draw_shots(receipt.baselines, splits, out)
        write_report(receipt, out, out / "report.html")
        receipt.save(out / "receipt.json")
    runtime.barrier()
    return Finished(out, receipt)


def _relabelled(pictures: ImageData, data: DataSplits) -> ImageData | None:
    """The pictures with the data's labels: classes are matched by name, or names that are numbers are the labels
    themselves. None where some class is not the data's."""
    known = {name: label for label, name in enumerate(data.class_names)}
    if not set(pictures.class_names) <= known.keys():
        numbers = {name: label_number(name, data.num_classes) for name in pictures.class_names}
        known = {name: number for name, number in numbers.items() if number is not None}
        if len(known) < pictures.num_classes:
            return None
    table = torch.tensor([known[name] for name in pictures.class_names])
    return replace(pictures, labels=table[pictures.labels], class_names=data.class_names)


def _picture(pictures: ImageData, data: DataSplits, labelled: bool) -> Image.Image:
    """The first images of each class, or of all."""
    if not labelled:
        return grid(pictures.images[:SHOWN], 10)
    few = pictures.labels < SHOWN_CLASSES
    return class_grid(pictures.images[few], pictures.labels[few], data.class_names, GRID_PER_CLASS)
