"""The N-step stochastic sampler of guided distillation as a scheduler. Its text travels inside model folders.

It must run on torch and diffusers alone; what it imports of ours is written into the same file.
"""

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .all_steps import AllStepsScheduler


class StochasticJumpScheduler(AllStepsScheduler):
    """Two steps down, then one back up with fresh noise; N evaluations (Meng et al., 2210.03142).

    For models that were trained for jumps of two steps.
    """

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
        t = int(timestep)
        x0, eps = self._estimate(model_output, sample, t, use_clipped_model_output)
        lower_alpha, lower_sigma = self._level(max(t - 2, -1))
        x = lower_alpha * x0 + lower_sigma * eps
        if t > 0:
            upper_alpha, upper_sigma = self._level(t - 1)
            factor = upper_alpha / lower_alpha
            spread = max(upper_sigma**2 - factor**2 * lower_sigma**2, 0.0) ** 0.5
            fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = factor * x + spread * fresh
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
