"""What our schedulers that take all of a model's steps share. Its text travels inside model folders with theirs."""

from typing import Any, Union

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from ..diffusion.prediction import to_epsilon, to_x0


class AllStepsScheduler(SchedulerMixin, ConfigMixin):
    """All N steps of the schedule, the noisiest first.

    Args:
        num_train_timesteps: N.
        trained_betas: (N,) the noise schedule.
        beta_schedule: its name, for the reader.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        clip_sample: clip the clean-image estimate to ``[-clip_sample_range, clip_sample_range]``.
    """

    order = 1
    init_noise_sigma = 1.0
    takes_all_steps = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 8,
        trained_betas: Any = None,
        beta_schedule: str = "trained",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
    ) -> None:
        if trained_betas is None or len(trained_betas) != num_train_timesteps:
            raise ValueError("trained_betas: give one beta for each of num_train_timesteps")
        self.betas = torch.tensor(trained_betas, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(self, num_inference_steps: int, device: Union[str, torch.device, None] = None) -> None:  # noqa: UP007
        """All of the model's steps; another number is refused, since the model was made for these."""
        T = self.config.num_train_timesteps
        if num_inference_steps != T:
            raise ValueError(f"num_inference_steps {num_inference_steps}: this model is sampled in all its {T} steps")
        self.timesteps = torch.arange(T, device=device).flip(0)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def _level(self, t: int) -> tuple[float, float]:
        abar = float(self.alphas_cumprod[t]) if t >= 0 else 1.0
        return abar**0.5, (1 - abar) ** 0.5

    def _estimate(
        self, model_output: torch.Tensor, sample: torch.Tensor, t: int, recompute: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean-image and noise estimate, clipped as configured."""
        alpha, sigma = self._level(t)
        x0 = to_x0(model_output, sample, alpha, sigma, self.config.prediction_type)
        eps = to_epsilon(model_output, sample, alpha, sigma, self.config.prediction_type)
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
            if recompute:
                eps = (sample - alpha * x0) / sigma
        return x0, eps

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Images at the noise level of ``timesteps`` (B,)."""
        abar = self.alphas_cumprod.to(original_samples.device)[timesteps].view(-1, *[1] * (original_samples.ndim - 1))
        return (abar.sqrt() * original_samples + (1 - abar).sqrt() * noise).to(original_samples.dtype)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
