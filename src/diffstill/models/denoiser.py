"""The one wrapper that every method talks to: a network, its noise schedule and its label vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..diffusion.prediction import PredictionType, to_epsilon, to_x0
from ..diffusion.schedule import NoiseSchedule
from .adapters import family_of


class Denoiser:
    """A class-conditional denoiser.

    Labels are 0..num_classes-1; ``null_label`` (= num_classes) is the extra row that stands for "no class".
    The wrapper is no ``nn.Module`` on purpose: it owns no parameters, so replacing ``network`` by its DDP or
    compiled form changes no state-dict key.

    Args:
        network: any module that the family's adapter can call as ``(x_t, t, labels) -> prediction``.
        schedule: the noise schedule it was (or will be) trained with.
        num_classes: number of real classes.
        sample_shape: (C, H, W).
        prediction_type: what the network outputs.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        num_classes: int,
        sample_shape: tuple[int, int, int],
        prediction_type: PredictionType = "epsilon",
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.num_classes = num_classes
        self.sample_shape = sample_shape
        self.prediction_type: PredictionType = prediction_type
        self._call = family_of(network).call
        self.autocast_dtype: torch.dtype | None = None
        """When set, forwards run under autocast of this dtype; outputs are float32 either way."""
        self.time_index: Tensor | None = None
        """(T,) int64: the time input that the network knows step i by; None where that is i itself."""
        self.origin: tuple[Denoiser, Tensor] | None = None
        """Of a respaced model: the model it was made of, and (T,) int64 which of that one's steps its own are."""

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Raw prediction (B, C, H, W) float32 for noisy images, timesteps (B,) int64 and labels (B,) int64."""
        if self.time_index is not None:
            self.time_index = self.time_index.to(t.device)
            t = self.time_index[t]
        if self.autocast_dtype is None:
            return self._call(self.network, x_t, t, labels)
        with torch.autocast(x_t.device.type, self.autocast_dtype):
            out = self._call(self.network, x_t, t, labels)
        return out.float()

    def null(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Prediction of the null branch."""
        return self(x_t, t, torch.full_like(t, self.null_label))

    def branches(self, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(cond, null)`` predictions at the same (x_t, t), in one batched forward (dash.md D13)."""
        both = self(
            torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, self.null_label)])
        )
        cond, null = both.chunk(2)
        return cond, null

    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Clean-image estimate that a raw prediction implies."""
        alpha, sigma = self.schedule.at(t, x_t.ndim, x_t.dtype)
        return to_x0(prediction, x_t, alpha, sigma, self.prediction_type)

    def epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Noise estimate that a raw prediction implies."""
        alpha, sigma = self.schedule.at(t, x_t.ndim, x_t.dtype)
        return to_epsilon(prediction, x_t, alpha, sigma, self.prediction_type)

    def freeze(self) -> Denoiser:
        """Eval mode and no gradients: what a teacher must be. Returns self."""
        self.network.eval().requires_grad_(False)
        return self

    def with_network(self, network: nn.Module) -> Denoiser:
        """The same schedule and vocabulary around another network (an EMA copy, a student)."""
        other = Denoiser(network, self.schedule, self.num_classes, self.sample_shape, self.prediction_type)
        other.autocast_dtype, other.time_index = self.autocast_dtype, self.time_index
        if self.origin is not None:
            other.origin = self.origin[0].with_network(network), self.origin[1]
        return other

    def respaced(self, indices: Sequence[int]) -> Denoiser:
        """The same network as a model of ``len(indices)`` steps: step i is its timestep ``indices[i]``.

        Sampled over all its steps it is this model strided over ``indices``.

        Raises:
            ValueError: see ``NoiseSchedule.respace``.
        """
        schedule, steps = self.schedule.respace(indices), torch.as_tensor(list(indices))
        other = Denoiser(self.network, schedule, self.num_classes, self.sample_shape, self.prediction_type)
        other.autocast_dtype, other.origin = self.autocast_dtype, (self, steps)
        other.time_index = steps if self.time_index is None else self.time_index.to(steps.device)[steps]
        return other

    @contextmanager
    def evaluating(self) -> Iterator[Denoiser]:
        """Eval mode, no grad and true float32 inside; the former mode afterwards, also after an exception."""
        was = self.network.training
        self.network.eval()
        try:
            with torch.no_grad(), _true_float32(self.device):
                yield self
        finally:
            self.network.train(was)


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """No TF32 and no autotuned kernels on CUDA: what is measured must not depend on the batch size."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    was = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = was
