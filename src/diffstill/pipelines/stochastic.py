"""The N-step stochastic sampler of guided distillation as a scheduler. Its text travels inside model folders.

It must run on torch and diffusers alone; the conversions of predictions are written into the same file.
"""

from typing import Any, Union

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion.prediction import to_epsilon, to_x0


class StochasticJumpScheduler(SchedulerMixin, ConfigMixin):
    """Two steps down, then one back up with fresh noise; N evaluations (Meng et al., 2210.03142).

    For models that were trained for jumps of two steps. All N steps of the schedule are taken, in their order.

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
        """All of the model's steps; another number is refused, since its jumps would be of another length."""
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

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From ``timestep`` to the one below, by way of the one below that.

        Args:
            use_clipped_model_output: recompute the noise estimate from the clipped clean-image estimate.
            generator: one, or one an image.
        """
        t, kind = int(timestep), self.config.prediction_type
        alpha, sigma = self._level(t)
        x0 = to_x0(model_output, sample, alpha, sigma, kind)
        eps = to_epsilon(model_output, sample, alpha, sigma, kind)
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
            if use_clipped_model_output:
                eps = (sample - alpha * x0) / sigma
        lower_alpha, lower_sigma = self._level(max(t - 2, -1))
        x = lower_alpha * x0 + lower_sigma * eps
        if t > 0:
            upper_alpha, upper_sigma = self._level(t - 1)
            factor = upper_alpha / lower_alpha
            spread = max(upper_sigma**2 - factor**2 * lower_sigma**2, 0.0) ** 0.5
            fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = factor * x + spread * fresh
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Images at the noise level of ``timesteps`` (B,)."""
        abar = self.alphas_cumprod.to(original_samples.device)[timesteps].view(-1, *[1] * (original_samples.ndim - 1))
        return (abar.sqrt() * original_samples + (1 - abar).sqrt() * noise).to(original_samples.dtype)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
