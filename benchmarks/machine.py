"""What a figure was measured on, and whether the machine was quiet enough to believe it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffstill.engine.compiled import has_compiler
from diffstill.engine.runtime import native_bf16

BUSY_LOAD = 0.5
"""Load average a core above which other work competes with the measurement."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, device, versions, threads: JSON-able."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_native": native_bf16(device),
        "compiler": has_compiler(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "diffusers", "diffstill", "pillow")},
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Over the last minute; None where the system does not tell it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def warnings(device: torch.device) -> list[str]:
    """What makes the figures doubtful before anything is measured."""
    found = []
    load = load_average()
    if load is not None and load > BUSY_LOAD * cores():
        found.append(f"load average {load:g} on {cores()} cores: other work is running; do not publish these figures")
    if device.type == "cpu" and torch.get_num_threads() != cores():
        found.append(f"{torch.get_num_threads()} threads on {cores()} cores: set OMP_NUM_THREADS={cores()}")
    return found


def slug(device: torch.device) -> str:
    """A file name's worth of device: ``cpu``, ``nvidia-h200``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _cpu_info(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()
