"""Spreading an evaluation over processes: who does which images, and how the rows come together again.

Every function is a no-op in a single process, so callers never branch on ``torch.distributed``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def process_count() -> int:
    """Number of processes in the default group; 1 where none was initialised."""
    return dist.get_world_size() if _active() else 1


def process_index() -> int:
    """This process's rank; 0 where no group was initialised."""
    return dist.get_rank() if _active() else 0


def share(total: int) -> range:
    """This process's contiguous part of ``range(total)``; the parts differ by at most one in length."""
    rank, world = process_index(), process_count()
    return range(total * rank // world, total * (rank + 1) // world)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's ``tensor`` (equal shapes), on the tensor's own device."""
    if not _active():
        return tensor
    total = tensor.to(_collective_device()).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather_rows(rows: Tensor) -> Tensor:
    """All processes' rows (n_rank, ...) one below the other in rank order, (sum n_rank, ...), on every process."""
    if not _active():
        return rows
    device = _collective_device()
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(count) for _ in range(process_count())]
    dist.all_gather(counts, count)
    # all_gather wants equal shapes: shares differ by a row, so the short ones are padded and cut again.
    longest = max(int(c) for c in counts)
    padded = torch.zeros((longest, *rows.shape[1:]), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)]).to(rows.device)


def broadcast_module(module: nn.Module) -> None:
    """Gives every process the parameters and buffers of process 0, in place."""
    if not _active():
        return
    for tensor in module.state_dict().values():
        there = tensor.detach().to(_collective_device())
        dist.broadcast(there, src=0)
        tensor.detach().copy_(there)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
