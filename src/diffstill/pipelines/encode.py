"""Deterministic sampling run backwards, from image to noise, as a scheduler. Its text travels inside model folders.

It must run on torch and diffusers alone; the conversions of predictions are written into the same file.
"""

from typing import Any, Union

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ..diffusion.prediction import to_epsilon, to_x0


class EncodeScheduler(SchedulerMixin, ConfigMixin):
    """Steps from each noise level up to the next; give the images as ``latents`` and take the noise as ``latent``.

    For models that were trained for these steps. All of them are taken, the cleanest first.

    Args:
        num_train_timesteps: N.
        trained_betas: (N,) of the levels at which the steps begin.
        final_alpha_cumprod: of the level at which the last step ends.
        beta_schedule: the schedule's name, for the reader.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
    """

    order = 1
    init_noise_sigma = 1.0
    takes_all_steps = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 8,
        trained_betas: Any = None,
        final_alpha_cumprod: float = 0.0,
        beta_schedule: str = "trained",
        prediction_type: str = "epsilon",
    ) -> None:
        if trained_betas is None or len(trained_betas) != num_train_timesteps:
            raise ValueError("trained_betas: give one beta for each of num_train_timesteps")
        self.betas = torch.tensor(trained_betas, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self.timesteps = torch.arange(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: Union[str, torch.device, None] = None) -> None:  # noqa: UP007
        """All of the model's steps, upwards; another number is refused."""
        T = self.config.num_train_timesteps
        if num_inference_steps != T:
            raise ValueError(f"num_inference_steps {num_inference_steps}: this model encodes in all its {T} steps")
        self.timesteps = torch.arange(T, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True) -> Any:
        """From the level of ``timestep`` to the next noisier one."""
        t, kind = int(timestep), self.config.prediction_type
        levels = [*self.alphas_cumprod.tolist(), self.config.final_alpha_cumprod]
        alpha, sigma = levels[t] ** 0.5, (1 - levels[t]) ** 0.5
        x0 = to_x0(model_output, sample, alpha, sigma, kind)
        eps = to_epsilon(model_output, sample, alpha, sigma, kind)
        x = levels[t + 1] ** 0.5 * x0 + (1 - levels[t + 1]) ** 0.5 * eps
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
