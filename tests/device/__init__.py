"""A second device for machines without a GPU: see device.cpp."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "other"


def other_device(build: Path) -> torch.device:
    """Builds (about a minute) and registers the device, once a process.

    It changes what this process takes for an accelerator: keep it out of a process with other tests.

    Raises:
        RuntimeError: no C++ compiler, or no ninja.
    """
    build.mkdir(parents=True, exist_ok=True)
    cpp_extension.load(
        "other_device",
        [str(Path(__file__).with_name("device.cpp"))],
        extra_cflags=["-O0"],
        build_directory=str(build),
        is_python_module=False,
    )
    module = types.ModuleType(f"torch.{NAME}")
    facts = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
    }
    for name, fact in facts.items():
        setattr(module, name, fact)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)
