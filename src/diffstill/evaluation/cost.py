"""What a model costs: parameters, arithmetic, size and measured time of whole sampling trajectories."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..diffusion.guidance import Constant, GuidanceSchedule
from ..diffusion.sampling import ClipMode, count_nfe
from ..models.denoiser import Denoiser
from .encoding import encode
from .results import Cost, Latency
from .sampling import sample_images

MEGABYTE = 1e6
WARMUP_STEPS = 3
"""Enough to meet every shape that a trajectory has (kernels are chosen and memory is cached by shape)."""
PROBE_FLOPS = {"cpu": 2e10, "accelerator": 5e12}
"""The most arithmetic that a forecast spends on one forward."""


def count_parameters(network: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in network.parameters())


def size_mb(network: nn.Module) -> float:
    """Parameters and buffers as they are stored now, in 10^6 bytes."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / MEGABYTE


def held_bytes(networks: Iterable[nn.Module]) -> int:
    """Bytes that some networks' parameters and buffers take together; what they share counts once."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def count_flops(denoiser: Denoiser) -> float:
    """FLOPs (2 x multiply-accumulate) of one forward of one image: convolutions, linear layers and attention.

    Norms, activations and sums are not counted, as is usual. Attention is run by its plain formula, so the count
    is the same on every device and kernel.
    """
    x_t, t, labels = _inputs(denoiser, 1)
    counter = FlopCounterMode(display=False)
    with denoiser.evaluating(), sdpa_kernel(SDPBackend.MATH), counter:
        denoiser(x_t, t, labels)
    return float(counter.get_total_flops())


def measure_cost(
    denoiser: Denoiser,
    *,
    steps: int = 50,
    guided: bool = True,
    guidance: GuidanceSchedule | None = None,
    batches: tuple[int, ...] = (1, 64),
    runs: int = 5,
    budget_s: float = 10.0,
    clip: ClipMode = "recompute",
) -> Cost:
    """Parameters, FLOPs and the measured time of sampling whole batches of images, noise to uint8.

    Nothing is extrapolated: each run is a full trajectory of ``steps`` steps, after a short one to warm up. Peak
    memory is CUDA's peak of allocated bytes during the runs, the network's own weights included and whatever else lies
    on the device taken off; it is null on devices that do not tell it, the CPU among them.

    Args:
        guided: two passes a step at a scale other than 1, or one pass where the model has no null branch.
        guidance: the setting that is timed; None: constant 2.
        batches: images sampled at once, each measured by itself.
        runs: at most; fewer once ``budget_s`` seconds are spent on a batch size, yet never fewer than 2.
    """
    schedule = (guidance or Constant(2.0)) if guided else Constant(1.0)
    nfe = count_nfe(schedule, denoiser.schedule.T, steps, one_pass=denoiser.takes_scale)
    flops = count_flops(denoiser)

    def sample(batch: int) -> Callable[[int], Tensor]:
        if denoiser.sampler == "encode":
            x, _, labels = _inputs(denoiser, batch)
            return lambda _: encode(denoiser, x, labels, schedule)
        fixed = denoiser.sampler != "ddim"  # its steps are all or none
        return lambda asked: sample_images(
            denoiser, batch, guidance=schedule, steps=steps if fixed else asked, batch_size=batch, clip=clip,
            guided=guided,
        )  # fmt: skip

    return Cost(
        parameters=count_parameters(denoiser.network),
        flops_forward=flops,
        nfe=nfe,
        flops_image=nfe * flops,
        size_mb=size_mb(denoiser.network),
        latency=[_latency(denoiser, sample(b), steps, b, runs, budget_s) for b in batches],
        device=device_name(denoiser.device),
    )


def device_name(device: torch.device) -> str:
    """``cpu (2 threads)`` or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _latency(
    denoiser: Denoiser, sample: Callable[[int], Tensor], steps: int, batch: int, runs: int, budget_s: float
) -> Latency:
    device = denoiser.device
    sample(min(steps, WARMUP_STEPS))
    began, others = time.perf_counter(), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - held_bytes([denoiser.network])
    times: list[float] = []
    while len(times) < max(runs, 2) and (len(times) < 2 or time.perf_counter() - began < budget_s):
        times.append(timed(lambda: sample(steps), device))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    peak = (torch.cuda.max_memory_allocated(device) - others) / MEGABYTE if device.type == "cuda" else None
    return Latency(
        batch=batch,
        runs=len(times),
        median_s=median,
        p10_s=deciles[0],
        p90_s=deciles[-1],
        images_per_s=batch / median,
        peak_memory_mb=peak,
    )


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue drained before and after."""
    _synchronise(device)
    began = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _inputs(denoiser: Denoiser, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.zeros((batch, *denoiser.sample_shape), device=denoiser.device)
    zeros = torch.zeros(batch, dtype=torch.int64, device=denoiser.device)
    return x_t, zeros, zeros


@dataclass(frozen=True)
class TrainingForecast:
    """An *estimate* made before training, for ``--dry-run``."""

    parameters: int
    teacher_parameters: int
    flops_forward: float
    """2 x MAC of one forward of one image by the student."""
    flops_per_image: float
    """Of one training image: all passes of student and teacher; a backward pass counts as two forwards."""
    memory_mb: float
    """Weights of all networks, of the trained ones gradients and Adam's two moments, the student's EMA, and its
    activations."""
    flops_per_s: float
    """Measured now on short forwards; unsteady where the machine is shared."""
    seconds_per_1000_images: float


def predict_cost(
    student: Denoiser,
    teacher: Denoiser | None = None,
    *,
    batch_size: int = 64,
    student_passes: int = 2,
    teacher_passes: int = 2,
    beside: Sequence[nn.Module] = (),
) -> TrainingForecast:
    """Forecasts training from a few measured forwards, without training.

    Activations are what autograd saves for one image, times ``batch_size`` and ``student_passes``; workspace,
    fragmentation and data loading come on top. Expect the time within a factor of two.

    Args:
        batch_size: images a step (micro-batch) on one device.
        student_passes: student forwards an image: 2 for dual-branch methods, 1 for single-branch ones.
        teacher_passes: teacher forwards an image; ignored without a teacher.
        beside: further networks in memory (a critic, heads), trained where their parameters ask for gradients.
    """
    flops = count_flops(student)
    student_s = _forward_seconds(student, flops, batch_size * student_passes)
    total_flops, total_s = 3 * student_passes * flops, 3 * student_passes * student_s
    networks = [student.network, *beside]
    trained = {id(p): p for network in networks for p in network.parameters() if p.requires_grad}
    averaged = [p for p in student.network.parameters() if p.requires_grad]
    optimised = 3 * sum(p.nbytes for p in trained.values()) + sum(p.nbytes for p in averaged)
    teacher_parameters = 0
    if teacher is not None:
        teacher_flops = count_flops(teacher)
        total_flops += teacher_passes * teacher_flops
        total_s += teacher_passes * _forward_seconds(teacher, teacher_flops, batch_size * teacher_passes)
        teacher_parameters = count_parameters(teacher.network)
        networks.append(teacher.network)
    weights = (held_bytes(networks) + optimised) / MEGABYTE
    activations = saved_bytes(student, 2) / 2 / MEGABYTE * batch_size * student_passes
    return TrainingForecast(
        parameters=count_parameters(student.network),
        teacher_parameters=teacher_parameters,
        flops_forward=flops,
        flops_per_image=total_flops,
        memory_mb=weights + activations,
        flops_per_s=total_flops / total_s,
        seconds_per_1000_images=1000 * total_s,
    )


def saved_bytes(denoiser: Denoiser, batch: int) -> int:
    """Bytes that autograd keeps from a forward of ``batch`` images until its backward, the weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in denoiser.network.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be given out again and be counted once for two

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser(*_inputs(denoiser, batch))
    return sum(kept.values())


def _forward_seconds(denoiser: Denoiser, flops: float, batch: int) -> float:
    """Seconds a forward takes an image, the best of three; of a smaller batch where this one would take long."""
    affordable = PROBE_FLOPS["cpu" if denoiser.device.type == "cpu" else "accelerator"] / max(flops, 1.0)
    batch = max(1, min(batch, int(affordable)))
    inputs = _inputs(denoiser, batch)
    with denoiser.evaluating():
        denoiser(*inputs)
        return min(timed(lambda: denoiser(*inputs), denoiser.device) for _ in range(3)) / batch
