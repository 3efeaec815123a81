"""The sampler of few-step generators as a scheduler. Its text travels inside model folders.

It must run on torch and diffusers alone; what it imports of ours is written into the same file.
"""

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .all_steps import AllStepsScheduler


class RenoiseScheduler(AllStepsScheduler):
    """From each noise level to the clean estimate, and with fresh noise up to the next lower level; N evaluations.

    For generators that were trained on this very chain (DMD2, 2405.14867; Uni-DAD, 2511.18281). Give it noise of unit
    variance: ``init_noise_sigma`` brings it to the first level.
    """

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
        t = int(timestep)
        x, _ = self._estimate(model_output, sample, t, False)
        if t > 0:
            alpha, sigma = self._level(t - 1)
            x = alpha * x + sigma * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
