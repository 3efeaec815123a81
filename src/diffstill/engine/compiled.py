"""torch.compile, kept only where the first gradients, or a frozen network's first outputs, equal eager's.

Inductor can compile a U-Net's forward right and its backward wrong (torch 2.13 on a CPU: the gradient stops at every
upsampling, without an error). A loss curve does not show it, so it is tested before the first step is taken.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 0.05
"""Allowed relative error of the whole gradient: above what bf16 rounding makes of it, below what a lost path does."""


def has_compiler(device: torch.device) -> bool:
    """Whether ``torch.compile`` finds what it needs: for the CPU the one C++ compiler that Inductor tries, for CUDA
    Triton."""
    if device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return shutil.which(os.environ.get("CXX", usual)) is not None
    return device.type == "cuda"


def compiled_fault(values: Callable[[], Tensor], what: str = "gradient") -> str | None:
    """What is wrong with the compiled form, None where nothing is.

    Args:
        values: computes all gradients (or outputs: ``what``) of one batch as one tensor, by way of the compiled
            network, without randomness.
    """
    with torch.compiler.set_stance("force_eager"):
        eager = values()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
            compiled = values()
        error = float((compiled - eager).norm() / eager.norm().clamp(min=1e-12))
    except Exception as failure:  # the compiler raises whatever its many parts raise
        return f"it failed with {type(failure).__name__}"
    return None if error <= TOLERANCE else f"its {what} is off by {error:.0%}"
