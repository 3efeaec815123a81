"""Device, precision and processes, through accelerate."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..errors import InputError
from .compiled import has_compiler
from .settings import Precision

COMPILE_STEPS = 3000
"""Training steps from which ``compile: auto`` compiles."""
BF16_PIXELS = 32 * 32
"""Height x width from which a trained network gains by bf16 on a CPU."""


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere autocast is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


class Runtime:
    """One process's view of the machine. A GPU is used when there is one; ``torchrun`` and ``accelerate launch``
    make it several processes, which see the same global batch and each take a slice of it."""

    def __init__(self, device: str = "auto") -> None:
        if device not in ("auto", "cpu", "cuda", "mps"):
            raise InputError("device", device, "use auto, cpu, cuda or mps")
        use_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available() and not _mps())
        self.accelerator = Accelerator(cpu=use_cpu, mixed_precision="no")
        self.device: torch.device = self.accelerator.device
        if device not in ("auto", self.device.type):
            raise InputError("device", device, f"use auto or {self.device.type}", problem="is not to be had here")
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def dtype(self, precision: Precision, *, frozen: bool = False, pixels: int = 0) -> torch.dtype | None:
        """Autocast dtype, or None for float32.

        ``auto`` is bf16 where the device multiplies it natively and it was measured to gain: on CUDA always; on a CPU
        for frozen networks, and for trained ones on images of ``BF16_PIXELS`` or more (docs/decisions.md).
        """
        if precision == "auto":
            gains = self.device.type == "cuda" or frozen or pixels >= BF16_PIXELS
            precision = "bf16" if gains and native_bf16(self.device) else "fp32"
        return torch.bfloat16 if precision == "bf16" else None

    def channels_last(self, asked: bool | str) -> bool:
        """Whether to use that memory layout; ``auto`` means on CUDA (CPUs with bf16 autocast lose by it)."""
        return asked is True or (asked == "auto" and self.device.type == "cuda")

    def compiles(self, asked: bool | str, steps: int, *, frozen: bool = False) -> bool:
        """Whether to use torch.compile; ``auto`` means in runs long enough to earn the warm-up back: on CUDA, and for
        frozen networks on a CPU too, where there is a C++ compiler (docs/decisions.md)."""
        gains = self.device.type == "cuda" or (frozen and self.device.type == "cpu" and has_compiler(self.device))
        return asked is True or (asked == "auto" and gains and steps >= COMPILE_STEPS)

    def place(self, network: nn.Module, channels_last: bool) -> nn.Module:
        """On the device, in the memory format that convolutions like."""
        layout: Any = {"memory_format": torch.channels_last if channels_last else torch.contiguous_format}
        return network.to(self.device, **layout)

    def wrap(self, network: nn.Module) -> nn.Module:
        """In DistributedDataParallel when there are several processes."""
        if self.world == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are constant tables here; broadcasting them every step would be wasted.
        return nn.parallel.DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)

    def accumulate(self, network: nn.Module, last: bool) -> Any:
        """Gradients are reduced over processes only in the last micro-batch."""
        if last or not isinstance(network, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return network.no_sync()

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        if self.world == 1:
            return flag
        told = torch.tensor([float(flag)], device=self.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.item())

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over processes."""
        if self.world > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
            value = value / self.world
        return value

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Ends the process group; without it a distributed run can abort at exit."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _mps() -> bool:
    return torch.backends.mps.is_available() and not os.environ.get("ACCELERATE_USE_CPU")


class StopRequest:
    """Set by SIGINT or SIGTERM: the loop finishes its step, saves and leaves. A second signal stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handlers inside the block, the former ones after it. Outside the main thread: none."""
        former = {}
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                try:
                    former[signum] = signal.signal(signum, self._ask)
                except ValueError:  # not the main thread
                    break
            yield self
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)
