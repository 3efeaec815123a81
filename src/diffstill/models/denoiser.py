"""The one wrapper that every method talks to: a network, its noise schedule and its label vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.guidance import guide
from ..diffusion.levels import time_of
from ..diffusion.prediction import PredictionType, to_epsilon, to_x0
from ..diffusion.sampling import SamplerName
from ..diffusion.schedule import NoiseSchedule
from .adapters import family_of, unwrap
from .lineage import weights_sha256


class Denoiser:
    """A class-conditional denoiser, or an unconditional one of one class.

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
        self.exact_output = False
        """Under autocast, whether the layer that makes the prediction computes in float32: where a clean estimate is
        made of it at high noise, bf16's rounding of the prediction is multiplied by the ratio of noise to signal."""
        self.time_index: Tensor | None = None
        """(T,) int64 or float32: the time input that the network knows step i by; None where that is i itself."""
        self.origin: tuple[Denoiser, Tensor] | None = None
        """Of a respaced model: the model it was made of, and (T,) int64 which of that one's steps its own are."""
        self.scale_range: tuple[float, float] | None = None
        """Of a network that takes the guidance scale as an input: the scales it knows. None: it has two branches."""
        self.sampler: SamplerName = "ddim"
        """What its steps are made for: ``stochastic`` where each reaches two steps down (guided.md 3), ``encode`` where
        each goes up to the next noise level, ``renoise`` where each ends in a clean estimate (unidad.md 2)."""
        self.end: tuple[Tensor, Tensor] | None = None
        """Of an encoder: the signal and noise scale, (1,) float64, where its last step ends."""

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def unconditional(self) -> bool:
        """Whether there is one class: labels say nothing, there is no null branch and no guidance."""
        return self.num_classes == 1

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        """Raw prediction (B, C, H, W) float32 for noisy images, timesteps (B,) int64 and labels (B,) int64.

        Args:
            scale: (B,) guidance scales for a network that takes them; None: purely conditional.
        """
        if self.time_index is not None:
            self.time_index = self.time_index.to(t.device)
            t = self.time_index[t]
        given = (x_t, t, labels) if scale is None else (x_t, t, labels, scale)
        if self.autocast_dtype is None:
            return self._call(self.network, *given)
        exact = _exact_output(self.network) if self.exact_output else nullcontext()
        with torch.autocast(x_t.device.type, self.autocast_dtype), exact:
            out = self._call(self.network, *given)
        return out.float()

    @property
    def whole(self) -> tuple[Denoiser, Tensor]:
        """Of a respaced model: the one that it goes back to, and (T,) int64 which of that one's steps its own are."""
        model, steps = self, torch.arange(self.schedule.T)
        while model.origin is not None:
            model, inner = model.origin
            steps = inner.to(steps.device)[steps]
        return model, steps

    @property
    def takes_scale(self) -> bool:
        """Whether the network takes the guidance scale as an input: one pass at any scale."""
        return self.scale_range is not None

    def guided(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
        """Prediction at a guidance scale, a number or (B,): one pass where the network takes the scale or it is 1."""
        if self.takes_scale:
            same = scale if isinstance(scale, Tensor) else x_t.new_full((1,), scale)
            return self(x_t, t, labels, same.to(x_t).expand(len(x_t)))
        if isinstance(scale, Tensor):
            return guide(*self.branches(x_t, t, labels), scale.view(-1, *[1] * (x_t.ndim - 1)))
        if scale == 1.0:
            return self(x_t, t, labels)
        return guide(*self.branches(x_t, t, labels), scale)

    def null(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Prediction of the null branch."""
        return self(x_t, t, torch.full_like(t, self.null_label))

    def branches(self, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(cond, null)`` predictions at the same (x_t, t), in one batched forward (dash.md D13).

        Of a network that takes the scale, the branches that its answers at two scales imply, by the line through them.
        """
        twice = torch.cat([x_t, x_t]), torch.cat([t, t])
        if self.scale_range is None:
            null = torch.full_like(labels, self.null_label)
            first, second = self(*twice, torch.cat([labels, null])).chunk(2)
            return first, second
        low = max(1.0, self.scale_range[0])
        high = min(low + 1, self.scale_range[1])
        ends = (torch.full(labels.shape, scale, device=x_t.device) for scale in (low, high))
        scales = torch.cat([*ends])
        first, second = self(*twice, torch.cat([labels, labels]), scales).chunk(2)
        return tuple(guide(second, first, (s - low) / (high - low)) for s in (1.0, 0.0))  # type: ignore[return-value]

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
        other.exact_output = self.exact_output
        other.scale_range, other.sampler, other.end = self.scale_range, self.sampler, self.end
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
        other.scale_range = self.scale_range
        other.time_index = steps if self.time_index is None else self.time_index.to(steps.device)[steps]
        return other

    def renoising(self, ratios: Tensor, *, nearest: bool = False) -> Denoiser:
        """The same network as a generator of ``len(ratios)`` steps with fresh noise between them (unidad.md 2).

        Args:
            ratios: (K,) float64, falling noise-to-signal ratios; they need be none of the schedule's own.
            nearest: whether the network is told its nearest timestep, instead of a time between two.
        """
        rising = ratios.flip(0)
        levels = NoiseSchedule.of_levels(f"geometric-{len(ratios)}", 1 / (1 + rising.square()))
        other = Denoiser(self.network, levels, self.num_classes, self.sample_shape, self.prediction_type)
        known = time_of(rising, self.schedule, times=self.time_index, nearest=nearest)
        other.time_index = known if nearest else known.float()
        other.autocast_dtype, other.exact_output, other.sampler = self.autocast_dtype, self.exact_output, "renoise"
        return other

    @contextmanager
    def evaluating(self) -> Iterator[Denoiser]:
        """Eval mode, no grad and true float32 inside; the former mode afterwards, also after an exception."""
        was = self.network.training
        self.network.eval()
        try:
            with measuring(self.device):
                yield self
        finally:
            self.network.train(was)


@contextmanager
def _exact_output(network: nn.Module) -> Iterator[None]:
    """The last layer of forwards inside the block in float32."""
    inner = unwrap(network)
    layer = family_of(inner).last(inner)
    if layer is None:
        yield
        return

    def again(module: nn.Module, args: Any, output: Any) -> Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            made: Tensor = module.forward(args[0].float())
        return made

    handle = layer.register_forward_hook(again)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """No gradients; on CUDA no TF32 and no autotuned kernels, so that figures do not depend on the batch size."""
    if device.type != "cuda":
        with torch.no_grad():
            yield
        return
    matmul = torch.backends.cuda.matmul
    was = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        plain = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with torch.no_grad(), plain:
            yield
    finally:
        matmul.allow_tf32 = was


def identity(model: Denoiser, guided: bool = True) -> str:
    """SHA-256 of all that a model's outputs and samples depend on: weights, noise levels, and how both are read.

    Args:
        guided: whether its null branch is live.
    """
    read = [model.prediction_type, model.num_classes, guided, model.sampler, model.scale_range]
    time = None if model.time_index is None else model.time_index.tolist()
    end = None if model.end is None else [float(part) for part in model.end]
    facts = [weights_sha256(model.network), model.schedule.fingerprint(), *read, time, end]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
