"""Where a method is tried: a tiny real teacher and student, random images, real batches, a real trainer."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..data.dataset import ImageData
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule, spaced_indices
from ..engine.arm import Arm
from ..engine.loop import Progress, Trainer
from ..engine.runtime import Runtime
from ..engine.settings import TrainSettings
from ..engine.stream import BatchStream
from ..errors import InputError
from ..methods import Batch, Curriculum, Losses, Method, Options, Setting, TeacherOutputs
from ..models.adapters import FAMILIES
from ..models.denoiser import Denoiser

BATCH = 8
STEPS = 6
FEWER = 8
"""Steps of the students of methods that make fewer."""
WAY = 4
"""Steps of such a student's teacher for each of them."""


class Killed(Exception):
    """Stands for a crash in the middle of a training."""


class Bench:
    """Builds a method again and again from equal copies of the same networks, options and data.

    Args:
        teacher, student: used as they are (copied first); where one is None a tiny U-Net that fits the other is made.

    Raises:
        InputError: options that the method does not know, or networks that do not go together.
    """

    def __init__(
        self,
        method: type[Method],
        options: dict[str, Any] | None = None,
        teacher: Denoiser | None = None,
        student: Denoiser | None = None,
    ) -> None:
        self.method_class = method
        self.own_networks = teacher is not None or student is not None
        self.options = parse_options(method, options or {})
        # Losses on the clean image's error are for predictions that tell it also where nothing but noise is left.
        kind: PredictionType = "v_prediction" if method.scale_input or method.fewer_steps else "epsilon"
        family = "guided_unet2d" if method.scale_input else "unet2d"
        self._teacher = on_cpu(teacher) if teacher else tiny_denoiser((8, 16), 1, student, kind)
        self._student = on_cpu(student) if student else tiny_denoiser((8, 8), 2, teacher, kind, family)
        if method.fewer_steps and teacher is None and student is None:
            for steps in (WAY * FEWER, FEWER):
                indices = spaced_indices(self._teacher.schedule.T, steps, method.spacing)
                self._teacher = self._teacher.respaced(indices)
            self._student.schedule = self._teacher.schedule
        self.method()

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime("cpu")

    @cached_property
    def data(self) -> ImageData:
        return random_images(self._teacher)

    def teacher(self) -> Denoiser:
        """A frozen copy of the teacher."""
        return self._teacher.with_network(copy.deepcopy(self._teacher.network)).freeze()

    def method(self, dropout: float = 0.0, student: Denoiser | None = None) -> Method:
        """The method, new, with the student's dropout set."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a method may initialise roles of its own
            made = student or self._student.with_network(copy.deepcopy(self._student.network))
            for module in made.network.modules():
                if isinstance(module, nn.Dropout):
                    module.p = dropout
            return self.method_class(Setting(made, self.teacher(), self.curriculum()), self.options)

    def curriculum(self) -> Curriculum:
        """A frozen teacher's curriculum that is not its initial one."""
        made = Curriculum(self._teacher.schedule)
        with torch.no_grad():
            made.logits.copy_(torch.linspace(-1, 1, made.T))
        return made.freeze()

    def stream(self, size: int = BATCH) -> BatchStream:
        device = torch.device("cpu")
        return BatchStream(self.data, self._teacher.schedule, batch_size=size, seed=0, device=device)

    def batch(self, images_seen: int = 0, size: int = BATCH) -> Batch:
        return self.stream(size).batch(images_seen)

    def loss(self, method: Method, batch: Batch) -> Losses:
        """The loss of a batch, with the teacher's outputs where the method asks for some."""
        needs = method.teacher_needs
        return method.loss(batch, TeacherOutputs(method.teacher or self.teacher(), batch, needs) if needs else None)

    def trainer(
        self, folder: Path, *, dropout: float = 0.0, die_at: int | None = None, steps: int = STEPS, **settings: Any
    ) -> Trainer:
        """A trainer of one new arm. ``die_at``: raise ``Killed`` when that many steps are done and logged."""
        method = self.method(dropout)
        chosen = TrainSettings(
            images=steps * BATCH, batch_size=BATCH, **{"lr": 1e-3, "log_every": 1, "compile": False, **settings}
        )

        def told(progress: Progress) -> None:
            if die_at is not None and progress.images_seen >= die_at * BATCH:
                raise Killed

        return Trainer(
            [Arm("arm", method, chosen, self.runtime)],
            BatchStream(
                self.data,
                self._teacher.schedule,
                batch_size=BATCH,
                seed=0,
                device=self.runtime.device,
                rank=self.runtime.rank,
                world=self.runtime.world,
            ),
            chosen,
            self.runtime,
            folder,
            teacher=(method.teacher or self.teacher()) if method.teacher_needs else None,
            on_progress=told,
        )


def parse_options(method: type[Method], options: dict[str, Any]) -> Options:
    """Options of a method from plain data.

    Raises:
        InputError: the first that does not fit.
    """
    try:
        return method.options_class.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(["options", *map(str, first["loc"])])
        mend = f"{method.name} knows {', '.join(method.options_class.model_fields) or 'no options'}"
        raise InputError(place, first["input"], mend, problem=f"is not usable ({first['msg']})") from None


def on_cpu(denoiser: Denoiser) -> Denoiser:
    return denoiser.with_network(copy.deepcopy(denoiser.network).cpu().requires_grad_(True).train())


def tiny_denoiser(
    widths: tuple[int, ...],
    seed: int,
    like: Denoiser | None = None,
    kind: PredictionType = "epsilon",
    family: str = "unet2d",
) -> Denoiser:
    """A random U-Net of a few thousand parameters, for the images, classes and schedule of ``like``."""
    shape = like.sample_shape if like else (1, 8, 8)
    classes = like.num_classes if like else 3
    schedule = like.schedule if like else NoiseSchedule.create("cosine", 1000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FAMILIES[family].build(
            sample_shape=shape,
            num_classes=classes,
            block_out_channels=widths,
            layers_per_block=1,
            norm_num_groups=4,
        )
    made = Denoiser(network, schedule, classes, shape, like.prediction_type if like else kind)
    made.scale_range = (1.0, 2.0) if FAMILIES[family].takes_scale(network) else None
    return made


def random_images(denoiser: Denoiser, count: int = 5 * BATCH) -> ImageData:
    draws = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, *denoiser.sample_shape), generator=draws, dtype=torch.uint8)
    labels = torch.randint(denoiser.num_classes, (count,), generator=draws)
    return ImageData("random", "train", pixels, labels, tuple(map(str, range(denoiser.num_classes))))


def at_timesteps(batch: Batch, t: Tensor, schedule: NoiseSchedule) -> Batch:
    """The same images and noise at other timesteps (B,)."""
    return replace(batch, t=t, t_global=t, x_t=schedule.add_noise(batch.x0, batch.noise, t))


def timesteps_to_try(denoiser: Denoiser) -> Tensor:
    """Every timestep for small networks, else 64 of them; the first and the last always."""
    T = denoiser.schedule.T
    work = sum(p.numel() for p in denoiser.network.parameters()) * denoiser.sample_shape[1] * denoiser.sample_shape[2]
    count = T if work < 2e7 else min(T, 64)
    return torch.linspace(0, T - 1, count).round().long()
