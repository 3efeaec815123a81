"""``diffstill interpolate``, ``transfer``, ``img2img`` and ``inpaint``: what deterministic steps make possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import to_float, to_uint8
from ..diffusion.editing import img2img_sample, inpaint_sample, last_steps, partly_noised
from ..diffusion.interpolation import lerp, slerp
from ..diffusion.sampling import Predict, ddim_sample, image_noise, level, noise_source, usual_steps
from ..engine.runtime import Runtime
from ..errors import InputError
from ..evaluation.features import Extractor, extract_all
from ..evaluation.intervals import proportion
from ..evaluation.paired import psnr, squared_error
from ..evaluation.results import Estimate
from .finish import extractor_for
from .opened import (
    Batches,
    Drawer,
    How,
    Told,
    check_alike,
    check_picture,
    check_shape,
    data_of,
    draw_rows,
    drawer,
    held_out,
    labels_of,
    open_model,
    short,
    shown_noise,
)
from .ui import Ui

GREY = 128
"""What a masked pixel looks like."""
SHOWN = 12
"""Images of a transfer in the picture; its figures are of all."""
TOP = 0.05
"""How much of the image may be left in one model's noisiest step more than in another's that decodes its noise."""


def interpolate(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    how: How,
    *,
    teacher: str | None = None,
    teacher_steps: int | None = None,
    mode: Literal["slerp", "lerp"] = "slerp",
    frames: int = 9,
    label: str | None = None,
    pairs: int = 4,
) -> Told:
    """From one noise to another in ``frames`` pictures, a row a pair; the teacher's row below where one is named.

    One label is the class of all; of two, comma-separated, the first is that of the first noise and the second that of
    the other: between them their guided predictions are mixed as the noises are. Without any, pair p is of class
    ``p mod num_classes``.

    Raises:
        InputError: fewer than two frames, more than two labels, a teacher of other images, or see ``open_model``.
    """
    check_picture(out, pairs, "pairs")
    if frames < 2:
        raise InputError("frames", frames, "use 2 or more: the two ends are frames")
    drawers = {"student": drawer(open_model(source, runtime.device), how.guidance, how.steps, how.clip)}
    first = drawers["student"]
    if teacher is not None:
        opened = open_model(teacher, runtime.device, "teacher")
        check_alike(first.denoiser, opened.denoiser, "teacher")
        drawers["teacher"] = drawer(opened, how.guidance, teacher_steps, how.clip, steps_field="teacher-steps")
    names = first.model.class_names
    ends = labels_of(label, names, "label", 2) if label else []
    ends_of = [(ends[0], ends[-1]) if ends else (pair % len(names),) * 2 for pair in range(pairs)]
    rows = _frames(drawers, ends_of, frames, mode, how, ui)
    classes = [names[a] if a == b else f"{names[a]} → {names[b]}" for a, b in ends_of]
    titles = [f"{role}, {name}" if teacher else name for name in classes for role in drawers]
    draw_rows(out, rows, titles, ["0", *(f"{i}/{frames - 1}" for i in range(1, frames - 1)), "1"])
    return Told(out, {"mode": mode, "frames": frames, "labels": ends_of, "seed": how.seed})


def _frames(
    drawers: dict[str, Drawer], ends: Sequence[tuple[int, int]], frames: int, mode: str, how: How, ui: Ui
) -> list[Tensor]:
    """For each pair of ends one row (frames, C, H, W) uint8 a model; all models see the same noise."""
    pairs, mix = len(ends), lerp if mode == "lerp" else slerp
    shape = next(iter(drawers.values())).denoiser.sample_shape
    noise = image_noise(shape, how.seed, 0, 2 * pairs)
    weights = [i / (frames - 1) for i in range(frames)]
    mixed = torch.stack([mix(noise[0::2], noise[1::2], weight) for weight in weights], 1).flatten(0, 1)
    labels = torch.tensor(ends).repeat_interleave(frames, 0)
    rows = []
    with ui.bar("interpolate", len(drawers) * len(mixed)) as bar:
        batches = Batches(how.batch_size, bar)
        for by in drawers.values():
            drawn = batches(by.denoiser, _between(by), mixed, labels, torch.tensor(weights).repeat(pairs))
            rows.append(to_uint8(drawn).split(frames))
    return [row for of_pair in zip(*rows, strict=True) for row in of_pair]


def _between(by: Drawer) -> Callable[..., Tensor]:
    """Sampling at labels (B, 2), mixed by weights (B,); in one pass where both are the same."""

    def run(noise: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        first, second = by.predict(labels[:, 0]), by.predict(labels[:, 1])

        def mixed(x: Tensor, t: Tensor, scale: float) -> Tensor:
            return lerp(first(x, t, scale), second(x, t, scale), weights.view(-1, *[1] * (x.ndim - 1)))

        predict: Predict = first if bool((labels[:, 0] == labels[:, 1]).all()) else mixed
        return ddim_sample(predict, noise, by.schedule, by.scale, timesteps=by.timesteps, **by.how())

    return run


def transfer(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    how: How,
    *,
    origin: str,
    goal: str,
    to_model: str | None = None,
    encoder_steps: int | None = None,
    encode_guidance: str = "1",
    count: int = 8,
    data: str | None = None,
) -> Told:
    """Style transfer between classes or domains by dual implicit bridges (DDIB, 2203.08382).

    Test images of the class ``origin`` are encoded to noise with the model, by DDIM run backwards, and decoded as
    ``goal`` with ``to_model`` (the same one where none is named) at the asked guidance. Decoded as what they were, at
    the guidance of the encoding, they show what the way there and back costs; of an encoder, which draws no images,
    ``to_model`` decodes that too.

    Raises:
        InputError: classes, steps, guidance, models or data that do not fit each other.
    """
    check_picture(out, count)
    encoder, returning, decoder = _open_bridge(source, to_model, runtime.device, how, encode_guidance, encoder_steps)
    model, other = encoder.model, decoder.model
    start, end = labels_of(origin, model.class_names, "from")[0], labels_of(goal, other.class_names, "to")[0]
    splits, protocol = data_of(model, data)
    originals = held_out(splits, [start] * count)
    if other is not model:
        splits, protocol = data_of(other, None if other.lineage and other.lineage.recipe else data)
    extractor = extractor_for(protocol, splits, runtime, ui)
    starts, ends = torch.full((count,), start), torch.full((count,), end)
    with ui.bar("transfer", 3 * count) as bar:
        batches = Batches(how.batch_size, bar)
        noise = batches(encoder.denoiser, encoder.encode, to_float(originals), starts)
        back = to_uint8(batches(returning.denoiser, returning.decode, noise, starts))
        moved = to_uint8(batches(decoder.denoiser, decoder.decode, noise, ends))
    names = model.class_names[start], other.class_names[end]
    rows = [originals, shown_noise(noise, encoder.noisiest[1]), back, moved]
    titles = [f"test images, {names[0]}", "encoded", f"decoded as {names[0]}", f"decoded as {names[1]}"]
    draw_rows(out, [row[:SHOWN] for row in rows], titles)
    figures = {
        "model": encoder.name,
        "to_model": decoder.name,
        "from": names[0],
        "to": names[1],
        "images": count,
        "encoder_steps": encoder.steps,
        "steps": decoder.steps,
        "encode_guidance": str(encoder.scale),
        "guidance": str(decoder.scale),
    }
    measured, lines = _measured(originals, back, moved, end, names[1], extractor)
    return Told(out, {**figures, **measured}, lines)


def _measured(
    originals: Tensor, back: Tensor, moved: Tensor, goal: int, name: str, extractor: Extractor
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the way there and back costs, and how many of the transferred images are taken for ``goal``."""
    quality = float(psnr(squared_error(back.double() / 255, originals.double() / 255).mean()))
    line = f"reconstruction: {quality:.2f} dB PSNR over {len(back)} images"
    figures = {"classifier": extractor.info.name, "reconstruction_psnr": Estimate.of(quality).value}
    logits = extract_all(extractor, moved)[1] if extractor.classifies else None
    if logits is None:
        return {**figures, "called_goal": None}, (line,)
    called = proportion(int((logits.argmax(1) == goal).sum()), len(moved))
    share = f"called {name} by the classifier: {called.value:.0%} [{called.low:.0%}, {called.high:.0%}]"
    return {**figures, "called_goal": called.model_dump(mode="json")}, (line, share)


def _open_bridge(
    source: str, to_model: str | None, device: torch.device, how: How, encode_guidance: str, encoder_steps: int | None
) -> tuple[Drawer, Drawer, Drawer]:
    """The models that encode, decode as what it was, and decode as what it shall be; all end in the same noise."""
    model = open_model(source, device, encoders=True)
    if to_model is None and model.denoiser.sampler == "encode":
        mend = "name the model that draws, such as the encoder's teacher"
        raise InputError("to-model", None, mend, problem="is missing: the model is an encoder")
    other = model if to_model is None else open_model(to_model, device, "to-model")
    asked = {"guidance_field": "encode-guidance", "steps_field": "encoder-steps"}
    encoder = drawer(model, encode_guidance, encoder_steps, how.clip, **asked)
    same = usual_steps(other.denoiser.schedule.T, encoder.steps) if model.denoiser.sampler == "ddim" else None
    decoder = drawer(other, how.guidance, same if how.steps is None else how.steps, how.clip)
    check_shape(encoder.denoiser, decoder.denoiser, "to-model")
    left, needed = encoder.noisiest[0], decoder.noisiest[0]
    if abs(left - needed) > TOP:
        problem = f"starts from noise with {needed:.2f} of the image in it, where the model ends with {left:.2f}"
        raise InputError("to-model", decoder.name, "give two models whose noisiest steps are alike", problem=problem)
    if model.denoiser.sampler == "ddim":
        return encoder, encoder, decoder
    check_alike(encoder.denoiser, decoder.denoiser, "to-model")
    return encoder, drawer(other, encode_guidance, decoder.steps, how.clip, **asked), decoder


def img2img(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    how: How,
    *,
    origin: str | None = None,
    goal: str | None = None,
    strength: float = 0.6,
    count: int = 8,
    data: str | None = None,
) -> Told:
    """Test images noised to the level from which ``strength`` of the steps are left to go, and denoised as ``goal``.

    Without ``origin`` image i is of class ``i mod num_classes``; without ``goal`` each stays what it is.

    Raises:
        InputError: a strength outside 0..1; classes or data that do not fit, or see ``open_model``.
    """
    check_picture(out, count)
    if not 0 <= strength <= 1:
        raise InputError("strength", strength, "use 0 (the image as it is) .. 1 (all of it drawn anew)")
    by = drawer(open_model(source, runtime.device), how.guidance, how.steps, how.clip)
    starts, ends = _classes(by, origin, count, "from"), _classes(by, goal, count, "to") if goal else None
    originals = held_out(data_of(by.model, data)[0], starts)
    ends = ends or starts
    noise = image_noise(by.denoiser.sample_shape, how.seed, 0, count)
    noised = partly_noised(to_float(originals), noise, by.schedule, by.timesteps, strength)

    def run(images: Tensor, drawn: Tensor, labels: Tensor) -> Tensor:
        return img2img_sample(
            by.predict(labels), images, drawn, by.schedule, by.scale, timesteps=by.timesteps, strength=strength,
            **by.how(),
        )  # fmt: skip

    with ui.bar("img2img", count) as bar:
        made = Batches(how.batch_size, bar)(by.denoiser, run, to_float(originals), noise, torch.tensor(ends))
    left = last_steps(by.timesteps, strength)
    rows = [originals, shown_noise(noised, level(by.schedule, left[0] if left else -1)[1]), to_uint8(made)]
    titles = ["test images", f"noised, {len(left)} of {by.steps} steps", "drawn"]
    draw_rows(out, rows, titles, _columns(by, starts, ends))
    figures = {"model": by.name, "strength": strength, "steps": by.steps, "steps_taken": len(left)}
    return Told(out, {**figures, "guidance": str(by.scale), "from": starts, "to": ends, "seed": how.seed})


def inpaint(
    source: str,
    out: Path,
    runtime: Runtime,
    ui: Ui,
    how: How,
    *,
    mask: str,
    labels: str | None = None,
    resample: int = 1,
    count: int = 8,
    data: str | None = None,
) -> Told:
    """Test images whose masked part is drawn anew; what is not masked stays, to the last bit.

    Image i is of the i-th of ``labels``, again from the first where there are more images, or of class
    ``i mod num_classes``; it is drawn as that class.

    Args:
        mask: left, right, top, bottom, centre, or a PNG of the images' size that is white where they are drawn anew.
        resample: times that each step is taken, see ``inpaint_sample``.

    Raises:
        InputError: a mask that cannot be read or masks nothing; labels or data that do not fit, or see ``open_model``.
    """
    check_picture(out, count)
    if resample < 1:
        raise InputError("resample", resample, "use 1 or more")
    by = drawer(open_model(source, runtime.device), how.guidance, how.steps, how.clip)
    masked = read_mask(mask, by.denoiser.sample_shape)
    classes = _classes(by, labels, count, "labels", most=count)
    originals = held_out(data_of(by.model, data)[0], classes)

    def run(images: Tensor, y: Tensor, index: Tensor) -> Tensor:
        fresh = noise_source(by.denoiser.sample_shape, how.seed, int(index[0]), len(index), images.device)
        return inpaint_sample(
            by.predict(y), images, masked.to(images.device), fresh, by.schedule, by.scale, timesteps=by.timesteps,
            resample=resample, **by.how(),
        )  # fmt: skip

    with ui.bar("inpaint", count) as bar:
        batches = Batches(how.batch_size, bar)
        made = batches(by.denoiser, run, to_float(originals), torch.tensor(classes), torch.arange(count))
    rows = [originals, originals.masked_fill(masked, GREY), to_uint8(made)]
    draw_rows(out, rows, ["test images", "masked", "drawn anew"], _columns(by, classes, classes))
    figures = {"model": by.name, "mask": mask, "resample": resample, "steps": by.steps, "guidance": str(by.scale)}
    return Told(out, {**figures, "labels": classes, "seed": how.seed})


def read_mask(text: str, shape: tuple[int, int, int]) -> Tensor:
    """(1, 1, H, W) bool, True where images (C, H, W) are drawn anew: half of them, the middle, or a PNG's white.

    Raises:
        InputError: neither a name nor a readable picture of that size, or one that masks nothing.
    """
    height, width = shape[1:]
    masked = torch.zeros(height, width, dtype=torch.bool)
    halves = {
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width - width // 2, None)),
        "top": (slice(0, height // 2), slice(None)),
        "bottom": (slice(height - height // 2, None), slice(None)),
        "centre": (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)),
    }
    if text in halves:
        masked[halves[text]] = True
    else:
        masked = _picture_mask(text, width, height, ", ".join(halves))
    if not bool(masked.any()):
        raise InputError("mask", text, "paint white what is to be drawn anew", problem="masks nothing")
    return masked[None, None]


def _picture_mask(text: str, width: int, height: int, names: str) -> Tensor:
    forms = f"use {names}, or the path of a black-and-white PNG of {width}x{height} pixels"
    if not Path(text).is_file():
        raise InputError("mask", text, forms, problem="is neither a name nor a file")
    try:
        with Image.open(text) as picture:
            grey = picture.convert("L")
    except (OSError, ValueError) as error:
        raise InputError("mask", text, forms, problem=f"cannot be read ({type(error).__name__})") from None
    if grey.size != (width, height):
        raise InputError("mask", text, forms, problem=f"is {grey.size[0]}x{grey.size[1]} pixels")
    return torch.tensor(list(grey.tobytes())).view(height, width) > 127


def _classes(by: Drawer, text: str | None, count: int, field: str, most: int = 1) -> list[int]:
    """The class of each of ``count`` images: those named in turn, or all there are."""
    names = by.model.class_names
    found = labels_of(text, names, field, most) if text else list(range(len(names)))
    return [found[i % len(found)] for i in range(count)]


def _columns(by: Drawer, starts: Sequence[int], ends: Sequence[int]) -> list[str]:
    names = by.model.class_names
    return [short(names[a] if a == b else f"{names[a]}→{names[b]}") for a, b in zip(starts, ends, strict=True)]
