"""Class-conditional sampling for diffusers, with live classifier-free guidance. No import of ours but the formula.

The text of this file is written into every exported folder (``pipelines.travelling_source``), so it must run on
torch, numpy, pillow and diffusers alone, and its errors are plain ``ValueError``.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Optional, Union

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..diffusion.guidance import GuidanceSchedule, guide, parse_guidance
from ..diffusion.scale import scale_features


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples a class-conditional ``UNet2DModel`` or ``UNet2DConditionModel`` (``unet``) or ``DiTTransformer2DModel``
    (``transformer``) on pixels, or an unconditional one, which has one class.

    Args:
        scheduler: any stock diffusers scheduler for discrete-time noise prediction.
        num_classes: number of real classes; label ``num_classes`` is the null label. None: read from the network.
        guided: False for a model without a live null branch, which is sampled in one pass.
        default_guidance: what is used where a call names none: ``"2"``, ``"tag:1,4,5"``, ``"interval:3,0.2,0.8"``.
        id2label: names of the classes, by their number as text.
        guidance_range: of a network that takes the guidance scale as an input, the scales it knows: ``{"low": 1.0,
            "high": 5.0}``. Such a model needs one pass a step at any scale. None: it has two branches.
        time_index: the time input that the network knows a step of the schedule by, by the step's number as text; None:
            the step itself.
    """

    model_cpu_offload_seq = "unet->transformer"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer"]
    # Bound to the class: diffusers executes the pipeline.py of every folder in one shared module, so that a global
    # name means, also to a pipeline loaded earlier, what the folder loaded last says.
    _guide = staticmethod(guide)
    _parse = staticmethod(parse_guidance)
    _features = staticmethod(scale_features)

    def __init__(
        self,
        scheduler: Any,
        # Unions of typing: diffusers 0.36 does not know the type of "X | None", and then loads no folder.
        unet: Union[UNet2DModel, UNet2DConditionModel, None] = None,
        transformer: Optional[DiTTransformer2DModel] = None,
        num_classes: Optional[int] = None,
        guided: bool = True,
        default_guidance: str = "2",
        id2label: Optional[dict[str, str]] = None,
        time_index: Union[dict[str, int], dict[str, float], None] = None,
        guidance_range: Optional[dict[str, float]] = None,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("give exactly one of unet and transformer")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)
        if num_classes is None:
            network: Any = unet or transformer
            rows = network.config.get("num_class_embeds")
            known = network.config.get("num_embeds_ada_norm") or (rows - 1 if rows else None)
            num_classes, guided = known or 1, guided and known is not None
        self.register_to_config(
            num_classes=num_classes,
            guided=guided,
            default_guidance=default_guidance,
            id2label=id2label,
            time_index=time_index,
            guidance_range=guidance_range,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        batch_size: int = 1,
        guidance_schedule: str | None = None,
        clip: str = "recompute",
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image for each label, or ``batch_size`` images of a model of one class.

        Args:
            class_labels: labels 0..num_classes-1 or class names; one, a list, or a tensor. None: of one class.
            guidance_scale: constant scale; 1 is purely conditional and skips the null pass. None: the model's default.
            generator: one for all images, or a list with one an image: then an image does not depend on its batch.
            num_inference_steps: steps of the scheduler, 1..num_train_timesteps; None: 50, or all where there are few
                or the scheduler takes no other number.
            output_type: ``pil`` images, ``np`` (B, H, W, C) or ``pt`` (B, C, H, W) in [0, 1], ``latent``: as sampled.
            return_dict: False gives a tuple instead of an ``ImagePipelineOutput``.
            batch_size: how many images are drawn where no labels are given.
            guidance_schedule: a scale that depends on the timestep, instead of ``guidance_scale``: ``tag:1,4,5``
                (s_min, s_max, beta) or ``interval:3,0.2,0.8`` (scale, and where it acts as fractions of T).
            clip: after clipping the clean-image estimate ``recompute`` the noise from it (default), keep the old one
                (``paper``), or do not clip (``none``). Acts on schedulers of the DDIM kind; others go by their config.
            latents: standard-normal noise (B, C, H, W) to start from, instead of ``generator``.
            callback_on_step_end: called as ``(pipeline, step, timestep, {"latents": ...})``; may return new latents.

        Raises:
            ValueError: an argument that does not fit; the message names what would.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is not known; use pil, np, pt or latent")
        guidance = self._guidance(guidance_scale, guidance_schedule)
        if class_labels is None and self.config.num_classes == 1:
            class_labels = [0] * batch_size
        labels = torch.tensor(self.label_ids(class_labels), device=self._execution_device)
        scheduler, options = self._prepared_scheduler(num_inference_steps, clip, generator)
        x = self._start(len(labels), generator, latents) * scheduler.init_noise_sigma
        T = scheduler.config.num_train_timesteps
        for step, t in enumerate(self.progress_bar(scheduler.timesteps)):
            scale = guidance(round(float(t)), T)
            prediction = self._predict(scheduler.scale_model_input(x, t), t, labels, scale)
            x = scheduler.step(prediction, t, x, **options).prev_sample
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, step, t, {"latents": x}) or {}).get("latents", x)
        images = self._finished(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor | None) -> list[int]:
        """Label numbers of labels or class names."""
        if class_labels is None:
            raise ValueError(f"class_labels: give one label for each image, 0..{self.config.num_classes - 1}")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.reshape(-1).tolist()
        wanted = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        by_name = {name: int(number) for number, name in (self.config.id2label or {}).items()}
        last = self.config.num_classes - 1
        ids = []
        for label in wanted:
            if isinstance(label, str) and label not in by_name:
                known = ", ".join(list(by_name)[:20]) or f"none; use numbers 0..{last}"
                raise ValueError(f"class_labels: no class is called {label!r}; the names are {known}")
            number = by_name[label] if isinstance(label, str) else label
            if int(number) != number or not 0 <= number <= last:
                raise ValueError(f"class_labels: {number} is out of range; this model has classes 0..{last}")
            ids.append(int(number))
        if not ids:
            raise ValueError("class_labels is empty; give one label for each image")
        return ids

    def _guidance(self, scale: float | None, schedule: str | None) -> GuidanceSchedule:
        if scale is not None and schedule is not None:
            raise ValueError("give guidance_scale or guidance_schedule, not both")
        asked = schedule if schedule is not None else scale
        if self.config.guided:
            made = self._parse(self.config.default_guidance if asked is None else asked)
            self._check_range(made)
            return made
        if asked is not None and self._parse(asked) != self._parse(1.0):
            raise ValueError(f"guidance {asked!r} cannot act: this model has no live null branch; leave it out")
        return self._parse(1.0)

    def _check_range(self, guidance: GuidanceSchedule) -> None:
        known = self.config.guidance_range
        if known is None:
            return
        T = self.scheduler.config.num_train_timesteps
        for scale in (guidance(t, T) for t in range(T)):
            if not known["low"] <= scale <= known["high"]:
                trained = f"{known['low']:g} to {known['high']:g}"
                raise ValueError(f"guidance {guidance} reaches {scale:g}; this model was trained for {trained}")

    def _prepared_scheduler(
        self, steps: int | None, clip: str, generator: torch.Generator | list[torch.Generator] | None
    ) -> tuple[Any, dict[str, Any]]:
        """The scheduler with its timesteps set, and the options of its ``step`` that it knows."""
        scheduler = self.scheduler
        T = scheduler.config.num_train_timesteps
        # All of a model of few steps: 50 of 64, say, would be the 50 of least noise.
        few = T <= 50 or 49 * (T // 50) < 0.85 * (T - T // 50)
        usual = T if few or getattr(scheduler, "takes_all_steps", False) else 50
        steps = usual if steps is None else steps
        if not 1 <= steps <= T:
            raise ValueError(f"num_inference_steps {steps} must lie in 1..{T}")
        if clip not in ("recompute", "paper", "none"):
            raise ValueError(f"clip {clip!r} is not known; use recompute, paper or none")
        if clip == "none" and scheduler.config.get("clip_sample"):
            scheduler = type(scheduler).from_config(scheduler.config, clip_sample=False)
        scheduler.set_timesteps(steps, device=self._execution_device)
        known = inspect.signature(scheduler.step).parameters
        options = {"use_clipped_model_output": clip == "recompute", "generator": generator}
        return scheduler, {name: value for name, value in options.items() if name in known}

    def _start(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        network = self.unet if self.unet is not None else self.transformer
        size = network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, network.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: {len(generator)} generators for {count} images; give one, or one an image")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=network.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents {tuple(latents.shape)} do not fit; {count} labels need {shape}")
        return latents.to(self._execution_device, network.dtype)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """Guided prediction; both branches in one forward, the null branch only where it counts."""
        if self.config.guidance_range is not None:
            return self._forward(x, t, labels, guidance_scale=scale)
        if scale == 1.0:
            return self._forward(x, t, labels)
        null = torch.full_like(labels, self.config.num_classes)
        cond, unconditional = self._forward(torch.cat([x, x]), t, torch.cat([labels, null])).chunk(2)
        return self._guide(cond, unconditional, scale)

    def _forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, **scale: float) -> torch.Tensor:
        if self.config.time_index is not None:
            t = torch.tensor(self.config.time_index[str(round(float(t)))])
        stamps = t.to(x.device).expand(len(x))
        if isinstance(self.unet, UNet2DConditionModel):
            return self._forward_condition(x, stamps, labels, **scale)
        if self.unet is not None:
            known = None if self.unet.class_embedding is None else labels
            # Of a learned variance the mean alone, the first half, is used.
            return self.unet(x, stamps, class_labels=known, **scale, return_dict=False)[0][:, : x.shape[1]]
        return self.transformer(x, timestep=stamps, class_labels=labels, return_dict=False)[0]

    def _forward_condition(
        self, x: torch.Tensor, stamps: torch.Tensor, labels: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """A network with an input for the scale of its own, told nothing by cross-attention: one token of zeros."""
        config = self.unet.config
        width = config.cross_attention_dim
        token = x.new_zeros(len(x), 1, width if isinstance(width, int) else width[0])
        shown = None
        if config.time_cond_proj_dim is not None:
            scales = torch.full((len(x),), guidance_scale, device=x.device)
            shown = self._features(scales, config.time_cond_proj_dim).to(x.dtype)
        return self.unet(x, stamps, token, class_labels=labels, timestep_cond=shown, return_dict=False)[0]

    def _finished(self, x: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "np":
            return array
        if array.shape[-1] not in (1, 3):
            raise ValueError(f"output_type 'pil' needs 1 or 3 channels, not {array.shape[-1]}; use np or pt")
        pixels = (array * 255).round().astype(np.uint8)
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
