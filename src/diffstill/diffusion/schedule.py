"""Discrete noise schedules: ``x_t = alpha_t x_0 + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor


def cosine_betas(num_train_timesteps: int, offset: float = 0.008, lo: float = 1e-4, hi: float = 0.9999) -> Tensor:
    """Cosine schedule of Nichol & Dhariwal (2102.09672, Eq. 17) with betas clipped to ``[lo, hi]``, (T,) float64."""
    grid = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    curve = torch.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - curve[1:] / curve[:-1]).clamp(lo, hi)


FLOAT32_BETA = 1 - 2**-23
"""The largest beta that is not 1 in float32."""
Spacing = Literal["leading", "trailing"]


def spaced_indices(T: int, steps: int, spacing: Spacing = "leading") -> list[int]:
    """``steps`` evenly spaced timesteps of 0..T-1, increasing (sfddm.md 2.1).

    ``leading`` starts at 0: ``floor(i T / steps)``, which is the released ``i * int(T / steps)`` where that divides,
    and loses no timesteps at the noisy end where it does not. ``trailing`` ends at T-1: ``floor((i+1) T / steps) - 1``.

    Raises:
        ValueError: unless ``1 <= steps <= T``; one ``leading`` step, which would hardly denoise at all.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps {steps} must lie in 1..{T}")
    if spacing == "trailing":
        return [(i + 1) * T // steps - 1 for i in range(steps)]
    if steps == 1:
        raise ValueError("one leading step is timestep 0 alone, which returns the noise; use trailing")
    return [i * T // steps for i in range(steps)]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A table of betas and everything that follows from it. Timesteps are integers 0 (clean) .. T-1 (noise)."""

    name: str
    betas: Tensor
    """(T,) float64, each in (0, 1)."""

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or self.betas.numel() == 0 or self.betas.dtype != torch.float64:
            raise ValueError("betas must be a non-empty 1-D float64 tensor")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("betas must lie strictly between 0 and 1")

    @classmethod
    def create(cls, name: str = "cosine", num_train_timesteps: int = 1000) -> NoiseSchedule:
        """``cosine`` (DASH's), ``linear`` (DDPM: 1e-4..0.02 at T=1000) or ``scaled_linear`` (Stable Diffusion)."""
        T = num_train_timesteps
        if name == "cosine":
            betas = cosine_betas(T)
        elif name == "linear":
            betas = (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)).clamp(max=0.9999)
        elif name == "scaled_linear":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2 * (1000 / T)
            betas = betas.clamp(max=0.9999)
        else:
            raise ValueError(f"unknown schedule {name!r}; one of cosine, linear, scaled_linear")
        return cls(name, betas)

    @classmethod
    def of_levels(cls, name: str, alphas_cumprod: Tensor) -> NoiseSchedule:
        """The schedule whose steps have these signal levels ``alpha_t^2``, (T,) float64 and falling."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        return cls(name, (1 - alphas_cumprod / before).clamp(max=FLOAT32_BETA))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """From any diffusers scheduler with a ``betas`` table (DDPM, DDIM, DPM-Solver...).

        Raises:
            ValueError: betas outside (0, 1), or signal levels that are not their product: zero terminal SNR, shifts.
        """
        name = scheduler.config.get("diffstill_schedule") or scheduler.config.get("beta_schedule", "trained")
        trained = scheduler.config.get("trained_betas")
        betas = torch.tensor(trained, dtype=torch.float64) if trained is not None else scheduler.betas.double()
        made = cls(str(name), betas)
        levels = getattr(scheduler, "alphas_cumprod", None)
        if levels is not None and not torch.allclose(levels.double(), made.alphas_cumprod, rtol=1e-3, atol=1e-6):
            raise ValueError("its noise levels are not those of its betas: rescaled or shifted")
        return made

    @property
    def T(self) -> int:
        """Number of training timesteps."""
        return self.betas.numel()

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64: ``prod_{i<=t} (1 - beta_i)``, equal to ``alpha_t^2``."""
        cached = self.__dict__.get("_abar")
        if cached is None:
            cached = torch.cumprod(1 - self.betas, 0)
            object.__setattr__(self, "_abar", cached)
        return cached

    @property
    def alphas(self) -> Tensor:
        """(T,) float64 signal scale ``alpha_t``."""
        return self.alphas_cumprod.sqrt()

    @property
    def sigmas(self) -> Tensor:
        """(T,) float64 noise scale ``sigma_t``."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def snr(self) -> Tensor:
        """(T,) float64 ``alpha^2 / (sigma^2 + 1e-8)`` (the guard is DASH's, dash.md 2.3)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod + 1e-8)

    def at(self, t: Tensor, ndim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)`` for timesteps ``t`` (B,) int64, shaped (B, 1, ...) to broadcast over ``ndim`` dims."""
        alphas, sigmas = self._tables(t.device, dtype)
        shape = (-1,) + (1,) * (ndim - 1)
        return alphas[t].view(shape), sigmas[t].view(shape)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cache: dict[Any, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_cache", {})
        key = (device, dtype)
        if key not in cache:
            cache[key] = (self.alphas.to(device, dtype), self.sigmas.to(device, dtype))
        return cache[key]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` (B, ...) in ``x0``'s dtype from clean ``x0`` in [-1, 1], standard-normal ``noise`` and ``t`` (B,)."""
        alpha, sigma = self.at(t, x0.ndim, x0.dtype)
        return alpha * x0 + sigma * noise

    def respace(self, indices: Sequence[int]) -> NoiseSchedule:
        """The schedule whose step i has the noise level of this one's step ``indices[i]`` (sfddm.md 2.1).

        ``1 - beta'_i = abar[indices[i]] / abar[indices[i - 1]]``: a whole diffusion model of ``len(indices)`` steps,
        whose posterior is that of this chain restricted to the chosen steps. Betas are kept below 1 in float32, the
        type of diffusers' table: else the noisiest step of a ``trailing`` cosine schedule would have no signal.

        Args:
            indices: increasing, within 0..T-1; any spacing, any start.

        Raises:
            ValueError: no indices, unsorted or repeated ones, or one out of range.
        """
        chosen = list(indices)
        if not chosen or any(b <= a for a, b in pairwise(chosen)):
            raise ValueError(f"timesteps {chosen} must be a non-empty increasing sequence")
        if chosen[0] < 0 or chosen[-1] >= self.T:
            raise ValueError(f"timesteps {chosen[0]}..{chosen[-1]} must lie in 0..{self.T - 1}")
        return NoiseSchedule.of_levels(f"{self.name}-{len(chosen)}", self.alphas_cumprod[chosen])

    def steps_in(self, other: NoiseSchedule) -> list[int] | None:
        """Which steps of ``other`` have this schedule's noise levels; None where it has not all of them.

        The inverse of ``respace``: what it rounded (tables in float32, betas kept below 1) counts as equal.
        """
        mine, theirs = self.alphas_cumprod, other.alphas_cumprod
        found = (mine[:, None] - theirs[None, :]).abs().argmin(1)
        near = torch.allclose(mine, theirs[found], rtol=1e-4, atol=1e-6)
        return found.tolist() if near and bool((found.diff() > 0).all()) else None

    def fingerprint(self) -> str:
        """Hash of the beta table; two models can share a curriculum only if theirs are equal."""
        return hashlib.sha256(self.betas.numpy().tobytes()).hexdigest()[:16]

    def same_as(self, other: NoiseSchedule) -> bool:
        """Equal length and equal tables up to float32 rounding (a table that went through diffusers is float32)."""
        return self.T == other.T and torch.allclose(self.alphas_cumprod, other.alphas_cumprod, rtol=1e-4, atol=1e-6)
