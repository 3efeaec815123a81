"""Rules of a denoiser: what methods, samplers and metrics rely on."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..diffusion.prediction import target
from ..errors import counted
from ..models.denoiser import Denoiser
from .bench import timesteps_to_try
from .report import Broken, NotApplicable

SAMPLES = 4


class Points:
    """Noisy images at which a denoiser is tried, with their labels; in eval mode, without gradients."""

    def __init__(self, denoiser: Denoiser, guided: bool) -> None:
        self.denoiser, self.guided = denoiser, guided
        draws = torch.Generator().manual_seed(0)
        T, device = denoiser.schedule.T, denoiser.device
        self.x0 = (torch.rand((SAMPLES, *denoiser.sample_shape), generator=draws) * 2 - 1).to(device)
        self.noise = torch.randn(self.x0.shape, generator=draws).to(device)
        self.t = torch.linspace(0, T - 1, SAMPLES).round().long().to(device)
        self.labels = (torch.arange(SAMPLES) % denoiser.num_classes).to(device)
        self.x_t = denoiser.schedule.add_noise(self.x0, self.noise, self.t)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with self.denoiser.evaluating():
            return self.denoiser(x_t, t, labels)

    def predicted(self) -> Tensor:
        return self(self.x_t, self.t, self.labels)


def outputs(points: Points) -> str:
    """Shape of the input, float32."""
    out = points.predicted()
    if out.shape != points.x_t.shape:
        raise Broken(f"the output is {tuple(out.shape)} for an input of {tuple(points.x_t.shape)}")
    if out.dtype != torch.float32:
        raise Broken(f"the output is {out.dtype}")
    return f"{tuple(out.shape[1:])}, float32"


def finite(points: Points) -> str:
    """Finite at every timestep tried, the first and the last included."""
    denoiser = points.denoiser
    stamps = timesteps_to_try(denoiser).to(denoiser.device)
    for part in stamps.split(64):
        rows = torch.arange(len(part)) % SAMPLES
        x_t = denoiser.schedule.add_noise(points.x0[rows], points.noise[rows], part)
        good = points(x_t, part, points.labels[rows]).isfinite().flatten(1).all(1)
        if not bool(good.all()):
            raise Broken(f"the output is not finite at t = {part[~good][:5].tolist()}")
    return f"{len(stamps)} of {denoiser.schedule.T} timesteps"


def rows_independent(points: Points) -> str:
    """A row of the batch does not depend on its batch-mates."""
    together = points.predicted()
    alone = torch.cat(
        [points(points.x_t[i : i + 1], points.t[i : i + 1], points.labels[i : i + 1]) for i in range(SAMPLES)]
    )
    return _close(together, alone, "a row alone and in a batch")


def deterministic(points: Points) -> str:
    """Eval mode draws nothing."""
    if not torch.equal(points.predicted(), points.predicted()):
        raise Broken("two calls in eval mode differ")
    return "bit-identical"


def labels(points: Points) -> str:
    """Another label gives another output."""
    if points.denoiser.num_classes < 2:
        raise NotApplicable("there is one class")
    other = (points.labels + 1) % points.denoiser.num_classes
    if torch.equal(points.predicted(), points(points.x_t, points.t, other)):
        raise Broken("the output does not depend on the label")
    return counted(points.denoiser.num_classes, "class")


def null_label(points: Points) -> str:
    """There is a null label after the last class, and it is none of the classes."""
    _guided(points)
    denoiser = points.denoiser
    if denoiser.takes_scale:
        raise NotApplicable("the guidance scale is an input; there is no null branch")
    try:
        with denoiser.evaluating():
            null = denoiser.null(points.x_t, points.t)
    except Exception as error:
        raise Broken(f"label {denoiser.null_label} cannot be used ({type(error).__name__})") from error
    for label in range(denoiser.num_classes):
        if torch.equal(null, points(points.x_t, points.t, torch.full_like(points.t, label))):
            raise Broken(f"the null branch is that of class {label}")
    return f"row {denoiser.null_label}"


def branches(points: Points) -> str:
    """Both branches in one forward are what two calls give; a scale that is an input has an effect."""
    _guided(points)
    if points.denoiser.scale_range is not None:
        return _scale(points, points.denoiser.scale_range)
    with points.denoiser.evaluating():
        cond, null = points.denoiser.branches(points.x_t, points.t, points.labels)
        apart = torch.cat([points.predicted(), points.denoiser.null(points.x_t, points.t)])
    return _close(torch.cat([cond, null]), apart, "one forward of both branches and two")


def _scale(points: Points, ends: tuple[float, float]) -> str:
    with points.denoiser.evaluating():
        low, high = (points.denoiser.guided(points.x_t, points.t, points.labels, s) for s in ends)
        each = torch.tensor([ends[i % 2] for i in range(len(points.t))])
        mixed = points.denoiser.guided(points.x_t, points.t, points.labels, each)
    if torch.equal(low, high):
        raise Broken(f"the answers at scales {ends[0]:g} and {ends[1]:g} are equal: the dial does nothing")
    picked = torch.where((each == ends[0]).view(-1, *[1] * (low.ndim - 1)), low, high)
    close = _close(mixed, picked, "a batch of several scales and one scale at a time")
    return f"{close}, scales {ends[0]:g} to {ends[1]:g}"


def conversions(points: Points) -> str:
    """x0 and epsilon of a prediction make up x_t, and those of a perfect prediction are the true ones."""
    denoiser = points.denoiser
    alpha, sigma = denoiser.schedule.at(points.t, points.x_t.ndim)
    out = points.predicted()
    x0, eps = (convert(out, points.x_t, points.t) for convert in (denoiser.x0, denoiser.epsilon))
    _close(alpha * x0 + sigma * eps, points.x_t, "alpha x0 + sigma eps and x_t")
    perfect = target(points.x0, points.noise, alpha, sigma, denoiser.prediction_type)
    # Times alpha and sigma: at the ends of the schedule the estimate itself is a division by nearly nothing.
    eps, x0 = denoiser.epsilon(perfect, points.x_t, points.t), denoiser.x0(perfect, points.x_t, points.t)
    _close(sigma * eps, sigma * points.noise, "the noise found and the true")
    _close(alpha * x0, alpha * points.x0, "the image found and the true")
    return denoiser.prediction_type


def scheduler(points: Points) -> str:
    """diffusers' DDIMScheduler takes the schedule and makes of it the same alphas and the same first step."""
    denoiser = points.denoiser
    schedule = denoiser.schedule
    stock = DDIMScheduler(
        num_train_timesteps=schedule.T,
        trained_betas=schedule.betas.tolist(),
        prediction_type=denoiser.prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    table = stock.alphas_cumprod.double()
    if not torch.allclose(table, schedule.alphas_cumprod, rtol=1e-3, atol=1e-6):
        raise Broken("DDIMScheduler computes other alphas from the betas")
    steps = min(10, schedule.T)
    stock.set_timesteps(steps)
    stamp = int(stock.timesteps[len(stock.timesteps) // 2])
    t = torch.full_like(points.t, stamp)
    x_t = schedule.add_noise(points.x0, points.noise, t)
    out = points(x_t, t, points.labels)
    before = stamp - schedule.T // steps
    abar = float(schedule.alphas_cumprod[before]) if before >= 0 else 1.0
    mine = abar**0.5 * denoiser.x0(out, x_t, t) + (1 - abar) ** 0.5 * denoiser.epsilon(out, x_t, t)
    return _close(stock.step(out, stamp, x_t).prev_sample, mine, f"DDIMScheduler's step at t = {stamp} and ours")


def _guided(points: Points) -> None:
    if not points.guided:
        raise NotApplicable("the model is sampled without guidance")


def _close(a: Tensor, b: Tensor, what: str) -> str:
    scale = max(1.0, float(b.abs().max()))
    worst = float((a - b).abs().max()) / scale
    if not worst <= 1e-4:
        raise Broken(f"{what} differ by {worst:.2g} (relative to {scale:.3g})")
    return f"within {worst:.1g}"
