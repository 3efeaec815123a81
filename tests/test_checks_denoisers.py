"""The conformance checks of denoisers: every rule catches one that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffstill.checks import check_denoiser
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.denoiser import Denoiser


class Net(nn.Module):
    """A sound network that is called as ``network(x_t, t, labels)``."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 1)
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x_t + self.table(labels).view(-1, 1, 1, 1) * (1 + t.view(-1, 1, 1, 1) / 1000)


class MixesRows(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(self.norm(x_t), t, labels)


class IgnoresLabels(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x_t, t, torch.zeros_like(labels))


class NullIsAClass(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x_t, t, labels.clamp(max=2))


class Noisy(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x_t, t, labels) + torch.randn_like(x_t)


class Half(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x_t, t, labels).half()


class Wide(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x_t, t, labels).repeat(1, 2, 1, 1)


class BreaksAtTheEnd(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x_t, t, labels) / (t != 999).view(-1, 1, 1, 1)


def denoiser(network: nn.Module, kind: Any = "epsilon") -> Denoiser:
    return Denoiser(network, NoiseSchedule.create("cosine", 1000), 3, (1, 8, 8), kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_sound_denoiser_conforms_and_is_left_as_it_was(kind: Any) -> None:
    made = denoiser(Net(), kind)
    report = check_denoiser(made)
    assert report.ok, str(report)
    assert not any(outcome.skipped for outcome in report.outcomes)
    assert made.network.training


@pytest.mark.parametrize(
    ("network", "broken"),
    [
        (MixesRows, {"rows independent"}),
        (IgnoresLabels, {"labels", "null label"}),
        (NullIsAClass, {"null label"}),
        (Noisy, {"deterministic", "rows independent", "branches"}),
        (Half, {"outputs"}),
        (Wide, {"outputs"}),
        (BreaksAtTheEnd, {"finite"}),
        (lambda: Net(3), {"null label", "branches"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_rule_catches_the_denoiser_that_breaks_it(network: Callable[[], nn.Module], broken: set[str]) -> None:
    report = check_denoiser(denoiser(network()))
    assert broken <= {outcome.name for outcome in report.outcomes if not outcome.ok}, str(report)


class WrongImage(Denoiser):
    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return 1.1 * super().x0(prediction, x_t, t)


def test_a_wrong_conversion_is_caught_by_two_rules() -> None:
    report = check_denoiser(WrongImage(Net(), NoiseSchedule.create("cosine", 1000), 3, (1, 8, 8)))
    assert {outcome.name for outcome in report.outcomes if not outcome.ok} == {"conversions", "scheduler"}


def test_an_unguided_denoiser_needs_no_null_label() -> None:
    report = check_denoiser(denoiser(Net(3)), guided=False)
    assert report.ok
    assert [o.name for o in report.outcomes if o.skipped] == ["null label", "branches"]
