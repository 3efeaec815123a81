"""``diffstill doctor``: what is installed, what the machine can do, what would not work and why."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__
from ..engine.compiled import has_compiler
from ..engine.runtime import native_bf16
from ..errors import install

CORE = ("torch", "diffusers", "accelerate", "safetensors", "huggingface_hub", "pydantic", "pyyaml", "numpy", "scipy",
        "scikit-learn", "pillow", "matplotlib", "rich", "jinja2")  # fmt: skip
EXTRAS = {
    "torch-fidelity": ("eval", "FID by the 2015-12-05 Inception network"),
    "lpips": ("eval", "LPIPS between images (evaluation.distance)"),
    "datasets": ("data", "data from the hub (hub:NAME)"),
    "transformers": ("text", "text-to-image teachers (teacher.pipeline)"),
    "peft": ("lora", "LoRA on a shared base (lora)"),
    "pyarrow": ("parquet", "data from parquet files"),
}


def examine() -> dict[str, Any]:
    """Versions, devices, extras and notes; JSON-able."""
    notes: list[str] = []
    packages = {name: _version(name) for name in CORE}
    extras = {name: {"version": _version(name), "extra": extra, "for": use} for name, (extra, use) in EXTRAS.items()}
    for name, entry in extras.items():
        if entry["version"] is None:
            notes.append(f"{entry['for']}: not available; {install(EXTRAS[name][0])} brings {name}")
    if importlib.util.find_spec("torchvision") is not None and "+cpu" in torch.__version__:
        notes.append(
            "torchvision beside a CPU-only torch may not load, and diffusers then fails: pip uninstall torchvision"
        )
    cuda = torch.cuda.is_available()
    devices = [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else []
    if not cuda:
        notes.append("no CUDA device: everything runs on the CPU; recipes for 32x32 images want a GPU")
    if not has_compiler(torch.device("cpu")):
        notes.append("no C++ compiler: training.compile=true would fail on the CPU")
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    if free < 1:
        notes.append(f"only {free:.1f} GiB free on this disk: checkpoints may not fit")
    return {
        "diffstill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": devices[0] if devices else ("mps" if torch.backends.mps.is_available() else "cpu"),
        "devices": devices,
        "bf16": native_bf16(torch.device("cuda" if cuda else "cpu")),
        "free_disk_gib": round(free, 1),
        "packages": packages,
        "extras": extras,
        "notes": notes,
        "ok": all(packages.values()),
    }


def _gpu(number: int) -> str:
    held = torch.cuda.get_device_properties(number).total_memory / 2**30
    return f"{torch.cuda.get_device_name(number)} ({held:.1f} GiB)"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
