"""What a figure was measured on, what that machine can do, and whether it was quiet enough to believe it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from step import set_autotune
from timing import Stopwatch

from diffstill import __version__
from diffstill.engine.compiled import has_compiler
from diffstill.engine.runtime import native_bf16
from diffstill.evaluation.cost import MEGABYTE
from diffstill.report.receipt import environment

BUSY_LOAD = 0.5
"""Load average a core above which other work competes with the measurement."""
PRODUCT_S = 0.05
"""Seconds that the matrix product should take by which a device's rate is measured."""
SMALLEST, LARGEST = 256, 16384
"""Sides of its matrices. The largest are 1 GiB in float32, and take the fastest devices 10 ms and more."""
PRODUCTS = 5
"""The best of so many is taken."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, device, versions, threads, commit: JSON-able."""
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
        "packages": {name: version(name) for name in ("torch", "diffusers", "pillow")} | {"diffstill": __version__},
        "git_commit": environment().git_commit,
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


class _Product:
    """A square matrix product. Random numbers, since zeros spare a GPU so much power that it runs faster."""

    def __init__(self, side: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flops = 2.0 * side**3
        self.a, self.b = (torch.randn((side, side), dtype=dtype, device=device) for _ in range(2))
        self.made = torch.empty_like(self.a)

    def prepare(self) -> None:
        set_autotune(True)  # TF32 where the device has it, as the library switches it on

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.made)


def matrix_rate(device: torch.device, watch: Stopwatch, least_s: float = PRODUCT_S) -> dict[str, float | None]:
    """FLOP/s of large square matrix products by the stopwatch's clock: about the most that the device gives a program.

    ``fp32`` is float32 as the device does it: by TF32 units on a GPU that has them, which is how the library runs
    it, too. ``bf16`` is None where the device has none of its own. Sizes double until a product takes ``least_s``.
    """
    fp32 = _rate(torch.float32, device, watch, least_s)
    return {"fp32": fp32, "bf16": _rate(torch.bfloat16, device, watch, least_s) if native_bf16(device) else None}


def _rate(dtype: torch.dtype, device: torch.device, watch: Stopwatch, least_s: float) -> float:
    side = SMALLEST
    while True:
        product = _Product(side, dtype, device)
        watch.seconds(product, 1)  # allocates, chooses a kernel
        if side >= LARGEST or min(watch.seconds(product, 1) for _ in range(2)) >= least_s:
            return product.flops / min(watch.seconds(product, 1) for _ in range(PRODUCTS))
        side *= 2


def held_memory(device: torch.device) -> int:
    """Bytes that live tensors take now, and the pools of CUDA graphs in full; 0 on devices that do not tell."""
    return torch.cuda.memory_allocated(device) + _spare_in_pools() if device.type == "cuda" else 0


def peak_memory_mb(device: torch.device, run: Callable[[], object], resident: int) -> float | None:
    """The most memory that tensors take while ``run`` runs, without ``resident`` bytes of others, in 10^6 bytes.

    ``run`` has to have run before, so that autotuning and compilation do not count. None on devices that do not tell
    (the CPU among them); nothing is run there.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) + _spare_in_pools() - resident) / MEGABYTE


def _spare_in_pools() -> int:
    """Bytes in the private pools of CUDA graphs that the allocator does not count as allocated. A replayed graph puts
    its activations there, and nobody else can use them."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


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
