"""Classifier-free guidance (Ho & Salimans 2022): the one place where the formula stands.

Its text also travels inside every exported model folder, as part of ``pipeline.py``; it imports torch and nothing else.
``guidance_scale`` s = 1 is purely conditional; the papers' ``w`` of Meng et al. is s - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

from torch import Tensor


def guide(cond: Tensor, null: Tensor, scale: Union[float, Tensor]) -> Tensor:  # noqa: UP007 (travels to older Pythons)
    """Guided prediction ``null + s (cond - null)``; ``scale`` is a float or broadcasts against the predictions."""
    return null + scale * (cond - null)


def guidance_gap(cond: Tensor, null: Tensor) -> Tensor:
    """``cond - null`` at the same (x_t, t, y): what the guidance scale multiplies at every step."""
    return cond - null


@dataclass(frozen=True)
class Constant:
    """The same scale at every timestep."""

    scale: float

    def __call__(self, t: int, T: int) -> float:
        return self.scale

    def __str__(self) -> str:
        return f"{self.scale:g}"


@dataclass(frozen=True)
class TAG:
    """Timestep-Adaptive Guidance of DASH (2606.00798, Eq. 3): ``s_min + (s_max - s_min) sigmoid(beta (0.5 - t/T))``."""

    s_min: float = 1.0
    s_max: float = 4.0
    beta: float = 5.0

    def __call__(self, t: int, T: int) -> float:
        # The sigmoid by way of tanh, which does not overflow for a sharp beta.
        return self.s_min + (self.s_max - self.s_min) * (1 + math.tanh(self.beta * (0.5 - t / T) / 2)) / 2

    def __str__(self) -> str:
        return f"tag:{self.s_min:g},{self.s_max:g},{self.beta:g}"


@dataclass(frozen=True)
class Interval:
    """Scale ``s`` where ``lo <= t/T < hi``, purely conditional elsewhere (Kynkäänniemi et al., 2404.07724)."""

    scale: float
    lo: float = 0.0
    hi: float = 1.0

    def __call__(self, t: int, T: int) -> float:
        return self.scale if self.lo <= t / T < self.hi else 1.0

    def __str__(self) -> str:
        return f"interval:{self.scale:g},{self.lo:g},{self.hi:g}"


GuidanceSchedule = Union[Constant, TAG, Interval]  # noqa: UP007


def parse_guidance(text: Union[str, float, GuidanceSchedule]) -> GuidanceSchedule:  # noqa: UP007
    """``"2"``, ``"tag"``, ``"tag:1,4,5"`` (s_min, s_max, beta) or ``"interval:3,0.2,0.8"`` (s, lo, hi in parts of T).

    Raises:
        ValueError: for anything else, with the accepted forms in the message.
    """
    if isinstance(text, (Constant, TAG, Interval)):
        return text
    forms = "use a number such as 2, tag, tag:1,4,5 or interval:3,0.2,0.8"
    name, _, rest = str(text).strip().partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
        if name == "tag" and len(numbers) <= 3:
            made: GuidanceSchedule = TAG(*numbers)
        elif name == "interval" and 1 <= len(numbers) <= 3:
            made = Interval(*numbers)
        elif not rest:
            made, numbers = Constant(float(name)), [float(name)]
        else:
            raise ValueError
    except ValueError:
        raise ValueError(f"guidance {text!r} is not understood; {forms}") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"guidance {text!r} is not finite; {forms}")
    return made
