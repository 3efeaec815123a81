"""Batches as a pure function of (seed, images_seen): the same for 1 or N processes, and after any resume."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import ImageStore, batch_indices, stream_seed
from ..data.dataset import ImageData, to_float
from ..diffusion.schedule import NoiseSchedule
from ..methods.base import Batch


@dataclass(frozen=True)
class Draws:
    """Named random numbers of one global batch; this process's slice of them."""

    seed: int
    images_seen: int
    size: int
    part: slice
    device: torch.device

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream_seed(self.seed, name, self.images_seen))

    def uniform(self, name: str, whole_batch: bool = False) -> Tensor:
        """(B,) in [0, 1), or (1,) for the whole batch."""
        count = 1 if whole_batch else self.size
        drawn = torch.rand(count, generator=self.generator(name), device=self.device)
        return drawn if whole_batch else drawn[self.part]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard-normal."""
        # One draw for the global batch, then the slice: N processes see what one would.
        return torch.randn((self.size, *shape), generator=self.generator(name), device=self.device)[self.part]


class BatchStream:
    """The endless stream of training batches of one data set.

    Args:
        batch_size: global batch; each of ``world`` processes takes an equal contiguous slice.
        flip: mirror each image with probability 1/2.
    """

    def __init__(
        self,
        data: ImageData,
        schedule: NoiseSchedule,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} is no multiple of the {world} processes")
        self.store = ImageStore(data, device)
        self.schedule, self.batch_size, self.seed, self.device, self.flip = schedule, batch_size, seed, device, flip
        local = batch_size // world
        self.part = slice(rank * local, (rank + 1) * local)
        self._channels_last = False

    def channels_last(self, on: bool = True) -> BatchStream:
        self._channels_last = on
        return self

    def batch(self, images_seen: int) -> Batch:
        """This process's slice of the batch that follows after ``images_seen`` images."""
        draws = Draws(self.seed, images_seen, self.batch_size, self.part, self.device)
        index = batch_indices(len(self.store), self.seed, images_seen, self.batch_size)[self.part]
        pixels, labels = self.store.take(index)
        x0 = pixels if pixels.is_floating_point() else to_float(pixels)  # latents are what the model sees
        if self.flip:
            mirrored = (draws.uniform("flip") < 0.5).view(-1, 1, 1, 1)
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        t_global = torch.randint(
            self.schedule.T, (self.batch_size,), generator=draws.generator("t"), device=self.device
        )
        shape = tuple(x0.shape[1:])

        def normal(name: str) -> Tensor:
            drawn = draws.normal(name, shape)
            return drawn.contiguous(memory_format=torch.channels_last) if self._channels_last else drawn

        noise, t = normal("noise"), t_global[self.part]
        if self._channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        x_t = self.schedule.add_noise(x0, noise, t)
        return Batch(x0, labels, t, noise, x_t, t_global, draws.uniform, images_seen, normal)


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """Slices of ``size`` images (the whole where ``size`` is None), each with its part of every named draw."""
    if size is None or size >= batch.size:
        return [batch]
    made = []
    for start in range(0, batch.size, size):
        part = slice(start, min(start + size, batch.size))

        def uniform(name: str, whole_batch: bool = False, part: slice = part) -> Tensor:
            drawn: Tensor = batch.uniform(name, whole_batch=whole_batch)
            return drawn if whole_batch else drawn[part]

        def normal(name: str, part: slice = part) -> Tensor:
            return batch.normal(name)[part]

        made.append(
            Batch(
                batch.x0[part],
                batch.labels[part],
                batch.t[part],
                batch.noise[part],
                batch.x_t[part],
                batch.t_global,
                uniform,
                batch.images_seen,
                normal,
            )
        )
    return made
