"""What the tests of truth share: small analytic worlds, batches that are pure functions of a seed, a short training."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from diffstill.analytic import GaussianMixtureWorld
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.methods import METHODS, Batch, Losses, Method, Setting, TeacherOutputs
from diffstill.models.denoiser import Denoiser


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine_pi(steps: int) -> NoiseSchedule:
    """``alpha = cos(pi t / 2)`` on the grid t = 1/steps, ..., 1: the continuous cosine schedule of guided.md, sampled.

    A table cannot hold alpha = 0 at t = 1; there it is 3e-8 of the step before.
    """
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos(grid * torch.pi / 2) ** 2
    betas = 1 - abar[1:] / abar[:-1]
    betas[-1] = 1 - 1e-15
    return NoiseSchedule("cosine_pi", betas)


def uneven_world(covariances: str = "full") -> GaussianMixtureWorld:
    """Three classes of unequal prior, five components of unequal weight in 3-D, sample shape (3, 1, 1)."""
    g = generator(7)
    means = 0.6 * torch.randn(5, 3, generator=g, dtype=torch.float64)
    root = 0.3 * torch.randn(5, 3, 3, generator=g, dtype=torch.float64)
    tables = {
        "isotropic": torch.tensor([0.02, 0.1, 0.05, 0.2, 0.3], dtype=torch.float64),
        "diagonal": root.square().sum(2) + 0.01,
        "full": root @ root.mT + 0.01 * torch.eye(3, dtype=torch.float64),
    }
    return GaussianMixtureWorld(
        means,
        tables[covariances],
        component_classes=torch.tensor([0, 0, 1, 2, 2]),
        weights=torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]),
        class_prior=torch.tensor([0.5, 0.2, 0.3]),
    )


def make_batch(world: GaussianMixtureWorld, schedule: NoiseSchedule, size: int, seed: int = 0) -> Batch:
    """A global batch from the world, as the engine would hand it to a method on one process."""
    g = generator(seed)
    labels = world.draw_labels(size, g)
    x0 = world.sample(labels, g).float()
    t = torch.randint(0, schedule.T, (size,), generator=g)
    noise = torch.randn(x0.shape, generator=g)

    def uniform(name: str) -> Tensor:
        return torch.rand(size, generator=generator(zlib.crc32(f"{name}/{seed}".encode())))

    return Batch(x0, labels, t, noise, schedule.add_noise(x0, noise, t), t, uniform, images_seen=seed * size)


def make_method(name: str, student: Denoiser, teacher: Denoiser, **options: object) -> Method:
    """A registered method under uniform timestep weights."""
    made = METHODS[name]
    chosen = made.options_class.model_validate({"curriculum": "none", **options})
    return made(Setting(student=student, teacher=teacher), chosen)


def loss_of(method: Method, batch: Batch) -> Losses:
    assert method.teacher is not None
    return method.loss(batch, TeacherOutputs(method.teacher, batch, method.teacher_needs))


def train(
    method: Method,
    batches: Callable[[int], Batch],
    steps: int,
    lr: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> None:
    """A plain loop over the student, the rate falling linearly to zero."""
    parameters = [p for p in method.roles["student"].parameters() if p.requires_grad]
    update = optimizer(parameters, lr=lr)  # type: ignore[call-arg]
    fall = torch.optim.lr_scheduler.LambdaLR(update, lambda step: 1 - step / steps)
    for step in range(steps):
        update.zero_grad()
        loss_of(method, batches(step)).total.backward()
        update.step()
        fall.step()
