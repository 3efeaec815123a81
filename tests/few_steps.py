"""What the tests of few-step generators share: a bench whose roles may start from models of their own, networks of one
number, and what the method's noising is, written out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffstill.checks.bench import Bench, tiny_denoiser
from diffstill.diffusion.levels import karras_ratios, ratios, signal_and_noise, time_of
from diffstill.diffusion.prediction import PredictionType
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.methods import Batch, Setting
from diffstill.methods.base import Method
from diffstill.methods.unidad import UniDad
from diffstill.models.denoiser import Denoiser

LINEAR = NoiseSchedule.create("linear", 1000)


def source(seed: int = 1, kind: PredictionType = "epsilon", widths: tuple[int, ...] = (8, 16)) -> Denoiser:
    """A random U-Net under the linear schedule; three classes of 8 x 8 images."""
    made = tiny_denoiser(widths, seed, None, kind)
    made.schedule = LINEAR
    return made


class Roles(Bench):
    """A bench for Uni-DAD whose student is a copy of the teacher, unless ``initial`` says what a role starts from."""

    def __init__(self, teacher: Denoiser, initial: Mapping[str, Denoiser] | None = None, **options: Any) -> None:
        self.initial = dict(initial or {})
        super().__init__(UniDad, options, teacher, copy.copy(teacher))

    def method(self, dropout: float = 0.0, student: Denoiser | None = None) -> Method:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = student or self._student.with_network(copy.deepcopy(self._student.network))
            for module in made.network.modules():
                if isinstance(module, nn.Dropout):
                    module.p = dropout
            return UniDad(Setting(made, self.teacher(), None, self.initial), self.options)


def unidad(teacher: Denoiser | None = None, initial: Mapping[str, Denoiser] | None = None, **options: Any) -> Any:
    """The method around a teacher (a random one where none is given)."""
    return Roles(teacher or source(), initial, **options).method()


class Factor(nn.Module):
    """``prediction = weight x_t``."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.weight * x_t


def factor(weight: float, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3) -> Denoiser:
    return Denoiser(Factor(weight), LINEAR, classes, shape, "sample")


def differing(model: Denoiser, seed: int, size: float = 0.1) -> Denoiser:
    """A copy of a model with somewhat other weights."""
    network = copy.deepcopy(model.network)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draws))
    return model.with_network(network)


def noised(x: Tensor, batch: Batch, name: str, high: float, low: float = 0.0, top: float = 1.0) -> tuple[Tensor, ...]:
    """``(x_t, t, alpha, sigma)`` of the losses under the linear schedule, up to the ratio ``high``: one of a thousand
    Karras levels, of the share ``low`` to ``top``, by the batch's own draws."""
    table = karras_ratios(float(ratios(LINEAR)[0]), high)
    index = ((low + (top - low) * batch.uniform(f"level {name}")) * 1000).long().clamp(max=999)
    ratio = table[index]
    alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in signal_and_noise(ratio))
    return alpha * x + sigma * batch.normal(name), time_of(ratio, LINEAR).float(), alpha, sigma


def weights(model: Any) -> dict[str, Tensor]:
    network = model.network if isinstance(model, Denoiser) else model
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def slopes(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter, of those that have one."""
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
