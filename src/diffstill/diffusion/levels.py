"""Noise levels told by the ratio of noise to signal, ``ratio = sigma_t / alpha_t`` (snr^-1/2), and the times a network
knows them by.

``x_t / alpha_t = x_0 + ratio n`` is the variance-exploding form of the same process: ``alpha^2 = 1 / (1 + ratio^2)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import NoiseSchedule


def signal_and_noise(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """``(alpha, sigma)`` of a ratio, in its shape and type; ``alpha^2 + sigma^2 = 1``."""
    alpha = (1 + ratio.square()).rsqrt()
    return alpha, ratio * alpha


def ratios(schedule: NoiseSchedule) -> Tensor:
    """(T,) float64, increasing: the ratio at each of a schedule's timesteps."""
    return (1 / schedule.alphas_cumprod - 1).sqrt()


def karras_ratios(low: float, high: float, count: int = 1000, rho: float = 7.0) -> Tensor:
    """(count,) float64, increasing from ``low`` to ``high``: evenly spaced in ``ratio^(1/rho)`` (Karras et al.,
    2206.00364, Eq. 5)."""
    place = torch.linspace(0, 1, count, dtype=torch.float64)
    return (low ** (1 / rho) + place * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def geometric_ratios(high: float, low: float, count: int) -> Tensor:
    """(count,) float64, falling from ``high`` to ``low``, both included; one value is ``high`` (unidad.md 2).

    Raises:
        ValueError: ``count`` under 1, or with several unless ``0 < low < high``.
    """
    if count < 1:
        raise ValueError(f"{count} levels: give 1 or more")
    if count == 1 and high > 0:
        return torch.tensor([high], dtype=torch.float64)
    if not 0 < low < high:
        raise ValueError(f"levels from {high:g} down to {low:g}: both must be positive, the first the larger")
    place = torch.linspace(0, 1, count, dtype=torch.float64)
    return high * (low / high) ** place


def time_of(ratio: Tensor, schedule: NoiseSchedule, *, times: Tensor | None = None, nearest: bool = False) -> Tensor:
    """The time input for a noise level, in ``ratio``'s shape: float64, linear in log ratio between a schedule's own.

    Args:
        ratio: positive; beyond the schedule's range it is given the end's time.
        times: (T,) what the network knows the schedule's steps by; None: their numbers.
        nearest: the step of nearest signal level ``alpha^2`` instead, int64.
    """
    table = ratios(schedule).to(ratio.device)
    known = (torch.arange(schedule.T) if times is None else times).to(ratio.device)
    given = ratio.double()
    if nearest:
        levels = schedule.alphas_cumprod.to(ratio.device)
        return known[(1 / (1 + given.square())[..., None] - levels).abs().argmin(-1)]
    above = torch.searchsorted(table, given).clamp(1, schedule.T - 1)
    low, high = table[above - 1].log(), table[above].log()
    share = ((given.log() - low) / (high - low)).clamp(0, 1)
    return torch.lerp(known[above - 1].double(), known[above].double(), share)


class LevelTable:
    """Noise levels that losses draw from: ``karras_ratios`` with the scales and time inputs that they mean.

    Args:
        times, nearest: see ``time_of``.
    """

    def __init__(
        self,
        low: float,
        high: float,
        schedule: NoiseSchedule,
        *,
        times: Tensor | None = None,
        nearest: bool = False,
        count: int = 1000,
    ) -> None:
        ratio = karras_ratios(low, high, count)
        t = time_of(ratio, schedule, times=times, nearest=nearest)
        self.alphas, self.sigmas = (scale.float() for scale in signal_and_noise(ratio))
        self.times = t if nearest else t.float()

    def to(self, device: torch.device) -> LevelTable:
        """The same table on a device."""
        self.alphas, self.sigmas, self.times = (v.to(device) for v in (self.alphas, self.sigmas, self.times))
        return self

    def at(self, place: Tensor, ndim: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(alpha, sigma, t)`` at places (B,) in [0, 1) of the table, 0 the cleanest; scales (B, 1, ...) to broadcast
        over ``ndim`` dims."""
        count = len(self.times)
        chosen = (place * count).long().clamp(max=count - 1)
        shape = (-1,) + (1,) * (ndim - 1)
        return self.alphas[chosen].view(shape), self.sigmas[chosen].view(shape), self.times[chosen]
