"""torch.compile, kept only where the first gradients equal eager's.

Inductor can compile a U-Net's forward right and its backward wrong (torch 2.13 on a CPU: the gradient stops at every
upsampling, without an error). A loss curve does not show it, so it is tested before the first step is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 0.05
"""Allowed relative error of the whole gradient: above what bf16 rounding makes of it, below what a lost path does."""


def compiled_fault(gradients: Callable[[], Tensor]) -> str | None:
    """What is wrong with the compiled form, None where nothing is.

    Args:
        gradients: computes all gradients of one batch as a vector, by way of the compiled network, without randomness.
    """
    with torch.compiler.set_stance("force_eager"):
        eager = gradients()
    try:
        error = float((gradients() - eager).norm() / eager.norm().clamp(min=1e-12))
    except Exception as failure:  # the compiler raises whatever its many parts raise
        return f"it failed with {type(failure).__name__}"
    return None if error <= TOLERANCE else f"its gradient is off by {error:.0%}"
