"""The command line's before-and-after pictures: their options, and which job they are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .jobs.opened import How, Told

Job = Callable[[argparse.Namespace, Any, Any], "Told"]
"""``(arguments, runtime, ui) -> what was drawn``."""


class Command(Protocol):
    """How ``cli.build_parser`` declares a command."""

    def __call__(self, name: str, run: Any, text: str, example: str, *, out: str) -> argparse.ArgumentParser: ...


def sampling_options(made: argparse.ArgumentParser) -> None:
    """What all commands that sample take."""
    made.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    made.add_argument("--batch-size", type=int, default=256, help="images at once; changes no picture (default 256)")
    made.add_argument(
        "--clip",
        choices=("recompute", "paper", "none"),
        default="recompute",
        help="after x0 is clipped: the noise recomputed from it, or kept as in the paper; none: no clipping "
        "(default recompute)",
    )


def declare(command: Command, run: Callable[[argparse.Namespace], int]) -> None:
    """Declares the five commands; ``run`` carries ``arguments.job`` out and prints what it tells."""

    def picture(name: str, job: Job, text: str, example: str) -> argparse.ArgumentParser:
        made = command(name, run, text, example, out=f"{name}.png")
        made.set_defaults(job=job)
        made.add_argument("model", help="a model folder or hub id")
        made.add_argument("--steps", type=int, help="default: 50, or all of a model of fewer")
        sampling_options(made)
        return made

    def edit(name: str, job: Job, text: str, example: str) -> argparse.ArgumentParser:
        made = picture(name, job, text, example)
        made.add_argument("--guidance", default=None, help="2, tag:1,4,5 or interval:3,0.2,0.8 (default: the model's)")
        made.add_argument("-n", "--count", type=int, default=8, help="how many test images (default 8)")
        made.add_argument("--data", default=None, help="where they come from (default: the model's own data)")
        return made

    consistency = picture("consistency", _consistency, "compare student and teacher from the same noise",
                          "diffstill consistency runs/student/model --teacher runs/student/teacher")  # fmt: skip
    consistency.add_argument("--teacher", required=True, help="a model folder or hub id")
    consistency.add_argument("--teacher-steps", type=int, help="default: 50, or all of a model of fewer")
    consistency.add_argument("--guidance", default="1", help="of both (default 1)")
    consistency.add_argument("-n", "--count", type=int, default=256, help="how many images (default 256)")
    consistency.add_argument("--data", default=None, help="whose features measure (default: the model's own data)")

    between = picture("interpolate", _interpolate, "draw images on the way from one noise to another",
                      "diffstill interpolate runs/demo/model --label 3,8")  # fmt: skip
    between.add_argument("--guidance", default=None, help="2, tag:1,4,5 or interval:3,0.2,0.8 (default: the model's)")
    between.add_argument("--teacher", default=None, help="a row of this model's under each")
    between.add_argument("--teacher-steps", type=int, help="default: 50, or all of a model of fewer")
    between.add_argument("--mode", choices=("slerp", "lerp"), default="slerp", help="along the sphere, or straight")
    between.add_argument("--frames", type=int, default=9, help="pictures in a row (default 9)")
    between.add_argument("--label", default=None, help="a class, or the classes of the two ends (default: all in turn)")
    between.add_argument("--pairs", type=int, default=4, help="rows, each between noises of its own (default 4)")

    transfer = edit("transfer", _transfer, "encode test images of one class and decode them as another",
                    "diffstill transfer runs/demo/teacher --from 3 --to 8 --guidance 2")  # fmt: skip
    transfer.add_argument("--from", dest="origin", required=True, help="class of the test images, by number or name")
    transfer.add_argument("--to", dest="goal", required=True, help="what becomes of them")
    transfer.add_argument("--to-model", default=None, help="the model that decodes (default: the same)")
    transfer.add_argument("--encoder-steps", type=int, help="default: 50, or all of a model of fewer")
    transfer.add_argument("--encode-guidance", default="1", help="of the encoding and the reconstruction (default 1)")

    img2img = edit("img2img", _img2img, "noise test images part of the way, and denoise them",
                   "diffstill img2img runs/demo/teacher --from 3 --to 8 --strength 0.6")  # fmt: skip
    img2img.add_argument("--from", dest="origin", default=None, help="class of the test images (default: all in turn)")
    img2img.add_argument("--to", dest="goal", default=None, help="class to draw (default: what they are)")
    img2img.add_argument("--strength", type=float, default=0.6, help="share of the steps, 0 to 1 (default 0.6)")

    inpaint = edit("inpaint", _inpaint, "draw the masked part of test images anew",
                   "diffstill inpaint runs/demo/teacher --mask right")  # fmt: skip
    inpaint.add_argument("--mask", required=True, help="left, right, top, bottom, centre, or a PNG white where to draw")
    inpaint.add_argument("--labels", default=None, help="classes of the images, comma-separated (default: all in turn)")
    inpaint.add_argument("--resample", type=int, default=1, help="times that each step is taken (default 1)")


def _how(arguments: argparse.Namespace) -> How:
    from .jobs.opened import How

    return How(arguments.guidance, arguments.steps, arguments.seed, arguments.clip, arguments.batch_size)


def _out(arguments: argparse.Namespace) -> Path:
    return arguments.out or Path(f"{arguments.command}.png")


def _consistency(arguments: argparse.Namespace, runtime: Any, ui: Any) -> Told:
    from .jobs.consistency import consistency

    return consistency(
        arguments.model, _out(arguments), runtime, ui, _how(arguments), teacher=arguments.teacher,
        count=arguments.count, teacher_steps=arguments.teacher_steps, data=arguments.data,
    )  # fmt: skip


def _interpolate(arguments: argparse.Namespace, runtime: Any, ui: Any) -> Told:
    from .jobs.edit import interpolate

    return interpolate(
        arguments.model, _out(arguments), runtime, ui, _how(arguments), teacher=arguments.teacher,
        teacher_steps=arguments.teacher_steps, mode=arguments.mode, frames=arguments.frames, label=arguments.label,
        pairs=arguments.pairs,
    )  # fmt: skip


def _transfer(arguments: argparse.Namespace, runtime: Any, ui: Any) -> Told:
    from .jobs.edit import transfer

    return transfer(
        arguments.model, _out(arguments), runtime, ui, _how(arguments), origin=arguments.origin, goal=arguments.goal,
        to_model=arguments.to_model, encoder_steps=arguments.encoder_steps, encode_guidance=arguments.encode_guidance,
        count=arguments.count, data=arguments.data,
    )  # fmt: skip


def _img2img(arguments: argparse.Namespace, runtime: Any, ui: Any) -> Told:
    from .jobs.edit import img2img

    return img2img(
        arguments.model, _out(arguments), runtime, ui, _how(arguments), origin=arguments.origin, goal=arguments.goal,
        strength=arguments.strength, count=arguments.count, data=arguments.data,
    )  # fmt: skip


def _inpaint(arguments: argparse.Namespace, runtime: Any, ui: Any) -> Told:
    from .jobs.edit import inpaint

    return inpaint(
        arguments.model, _out(arguments), runtime, ui, _how(arguments), mask=arguments.mask, labels=arguments.labels,
        resample=arguments.resample, count=arguments.count, data=arguments.data,
    )  # fmt: skip
