"""The sampler of few-step generators as a scheduler. Its text travels inside model folders.

It must run on torch and diffusers alone; what it imports of ours is written into the same file.
"""

from typing import Any, Union

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .all_steps import AllStepsScheduler


class RenoiseScheduler(AllStepsScheduler):
    """From each noise level to the clean estimate, and with fresh noise up to the next lower level; N evaluations.

    For generators that were trained on this very chain (DMD2, 2405.14867; Uni-DAD, 2511.18281). Give it noise of unit
    variance: ``init_noise_sigma`` brings it to the first level.

    Args:
        network_times: (N,) the time input that the network knows each step by, lowest noise first. They are then the
            scheduler's timesteps, for pipelines that show the network what the scheduler says; None: the steps.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 8,
        trained_betas: Any = None,
        beta_schedule: str = "trained",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        network_times: Any = None,
    ) -> None:
        super().__init__(
            num_train_timesteps, trained_betas, beta_schedule, prediction_type, clip_sample, clip_sample_range
        )
        if network_times is not None and len(network_times) != num_train_timesteps:
            raise ValueError("network_times: give one time for each of num_train_timesteps")
        self.timesteps = self._times().flip(0)

    def _times(self, device: Union[str, torch.device, None] = None) -> torch.Tensor:  # noqa: UP007
        known = self.config.network_times
        return torch.arange(len(self), device=device) if known is None else torch.tensor(known, device=device)

    def set_timesteps(self, num_inference_steps: int, device: Union[str, torch.device, None] = None) -> None:  # noqa: UP007
        """All of the model's steps, by the times that the network knows them by."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self._times(device).flip(0)

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """Noise scale of the first step."""
        return self._level(self.config.num_train_timesteps - 1)[1]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From ``timestep`` to the one below; from 0 to the clean image.

        Args:
            generator: one, or one an image.
        """
        t = int((self._times() - float(timestep)).abs().argmin())
        x, _ = self._estimate(model_output, sample, t, False)
        if t > 0:
            alpha, sigma = self._level(t - 1)
            x = alpha * x + sigma * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
