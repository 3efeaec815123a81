"""Text-to-image pipelines of the Stable Diffusion 1.5 kind: their parts, prompts as embeddings, images as latents.

Needs the extra ``[text]`` (transformers). Weights are read from safetensors alone, and no code out of the folder runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, install
from .adapters.prompted_unet import PromptedUNet
from .denoiser import Denoiser
from .loading import PICKLES, load_schedule, not_finite, read_json, resolve

FIELD = "teacher.pipeline"
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
"""What such a pipeline is made of, beside its scheduler; a safety checker is left alone."""
FETCHED = ("model_index.json", "scheduler/*.json", "tokenizer/*", *(f"{part}/*" for part in PARTS))
NOT_FETCHED = ("*.bin", "*.fp16.*", "*.non_ema.*", "*.msgpack", "*.onnx*", "*.py")


@dataclass
class TextToImage:
    """A pipeline in memory: frozen parts in eval mode and float32."""

    folder: Path
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: NoiseSchedule
    prediction_type: PredictionType

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """(P, tokens, width) of prompts, each in a forward of its own: none depends on the others.

        Raises:
            InputError: a prompt of more tokens than the text encoder takes.
        """
        rows, most = [], self.tokenizer.model_max_length
        for prompt in prompts:
            if (tokens := len(self.tokenizer(prompt).input_ids)) > most:
                problem = f"has {tokens} tokens, start and end included"
                raise InputError("prompts", prompt, f"use at most {most}", problem=problem)
            padded = self.tokenizer(prompt, padding="max_length", max_length=most, return_tensors="pt")
            masks = getattr(self.text_encoder.config, "use_attention_mask", False)
            rows.append(self.text_encoder(padded.input_ids, attention_mask=padded.attention_mask if masks else None)[0])
        return torch.cat(rows)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (N, C, h, w), scaled, of images (N, 3, H, W) in [-1, 1]: the autoencoder's means, one at a time.

        The same bits at every call on one machine, so that a resumed run need not keep them.

        Raises:
            ValueError: pixels outside [-1, 1], which have been scaled once too often or too little.
        """
        low, high = float(images.min()), float(images.max())
        if not -1 <= low <= high <= 1:
            raise ValueError(f"pixels lie in [{low:g}, {high:g}]; they must lie in [-1, 1]")
        with _repeatable():
            means = [self.vae.encode(x[None].to(self.vae.device)).latent_dist.mode() for x in images]
        scaled: Tensor = torch.cat(means) * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) float of latents (N, C, h, w), one at a time."""
        scaled = latents / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(z[None].to(self.vae.device), return_dict=False)[0] for z in scaled])

    def denoiser(self, table: Tensor, unet: Any = None) -> Denoiser:
        """The U-Net (this one, or one like it) with prompts as labels, the last row of ``table`` the null label."""
        network = PromptedUNet(self.unet if unet is None else unet, table)
        return Denoiser(network, self.schedule, len(table) - 1, self.latent_shape, self.prediction_type)


@contextmanager
def _repeatable() -> Any:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def load_pipeline(source: str, field: str = FIELD) -> TextToImage:
    """A pipeline folder as diffusers saves it, or a hub id; strictly: every weight must be there, fit and be finite.

    Raises:
        InputError: one line about ``field``, for missing packages, files, weights, or another kind of pipeline.
    """
    transformers = _transformers(source, field)
    try:
        folder = resolve(source, FETCHED, NOT_FETCHED)
        index = read_json(folder, "model_index.json")
        schedule, prediction_type = load_schedule(folder)
    except InputError as error:
        raise error.renamed(field) from None
    for part, wanted in PARTS.items():
        held = index.get(part)
        if not isinstance(held, list) or held[-1] != wanted:
            mend = "give a Stable Diffusion 1.x pipeline: a folder or hub id whose parts are " + ", ".join(PARTS)
            raise InputError(field, source, mend, problem=f"holds no {wanted} as its {part}")
    for part in ("unet", "vae", "text_encoder"):
        _refuse_pickles(folder / part, field)
    unet = _load(UNet2DConditionModel, folder / "unet", field)
    vae = _load(AutoencoderKL, folder / "vae", field)
    text_encoder = _load(transformers.CLIPTextModel, folder / "text_encoder", field)
    tokenizer = _load_tokenizer(transformers, folder / "tokenizer", field)
    _check(unet, vae, text_encoder, source, field)
    return TextToImage(folder, unet, vae, text_encoder, tokenizer, schedule, prediction_type)


def load_unet(source: str, like: TextToImage, field: str) -> tuple[Any, NoiseSchedule]:
    """The U-Net of another pipeline folder or hub id, which must be built and predict as ``like``'s, and its schedule.

    Raises:
        InputError: one line about ``field``.
    """
    try:
        folder = resolve(source, ("model_index.json", "unet/*", "scheduler/*"), NOT_FETCHED)
        schedule, prediction_type = load_schedule(folder)
    except InputError as error:
        raise error.renamed(field) from None
    _refuse_pickles(folder / "unet", field)
    unet = _load(UNet2DConditionModel, folder / "unet", field)
    mine, wanted = ({n: p.shape for n, p in net.state_dict().items()} for net in (unet, like.unet))
    mend = "use a pipeline that was made from the teacher's"
    if mine != wanted:
        raise InputError(field, source, mend, problem="has another U-Net than the teacher's")
    if prediction_type != like.prediction_type:
        problem = f"predicts {prediction_type}, and the teacher {like.prediction_type}"
        raise InputError(field, source, mend, problem=problem)
    return unet, schedule


def _transformers(source: str, field: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        mend = install("text")
        raise InputError(field, source, mend, problem=f"needs a package that is missing ({error})") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _refuse_pickles(part: Path, field: str) -> None:
    pickled = [path.name for path in part.glob("*") if path.suffix in PICKLES]
    if not any(part.glob("*.safetensors")):
        problem = f"has only pickled weights ({pickled[0]}), which may run code" if pickled else "has no safetensors"
        mend = "convert them: pipeline.save_pretrained(folder, safe_serialization=True)"
        raise InputError(field, str(part), mend, problem=problem)


def _load_tokenizer(transformers: Any, part: Path, field: str) -> Any:
    try:
        return transformers.CLIPTokenizer.from_pretrained(part, local_files_only=True)
    except Exception as error:  # whatever missing or damaged files make the library raise
        text = " ".join(str(error).split())[:160]
        mend = "fetch or export the pipeline again"
        raise InputError(field, str(part), mend, problem=f"cannot be loaded ({text})") from error


def _load(made: Any, part: Path, field: str) -> Any:
    """A part by its library's own reader, which knows the older names of weights; nothing may be left to chance."""
    mend = "fetch or export the pipeline again"
    try:
        with torch.random.fork_rng(devices=[]):
            network, info = made.from_pretrained(
                part, use_safetensors=True, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # whatever a damaged file makes the libraries raise
        text = " ".join(str(error).split())[:160]
        raise InputError(field, str(part), mend, problem=f"cannot be loaded ({text})") from error
    # A text encoder of older times holds a table of positions, which no longer is a weight.
    known = {"missing_keys": "lacks", "mismatched_keys": "has misshapen", "error_msgs": "has"}
    known |= {} if part.name == "text_encoder" else {"unexpected_keys": "has unknown"}
    for key, problem in known.items():
        if found := sorted(map(str, info.get(key) or ())):
            raise InputError(field, str(part), mend, problem=f"{problem} weights {found[0]} ({len(found)} in all)")
    if broken := not_finite(network.state_dict()):
        raise InputError(field, str(part), mend, problem=f"has weights that are not finite ({broken})")
    frozen: nn.Module = network.float().eval().requires_grad_(False)
    return frozen


def _check(unet: Any, vae: Any, text_encoder: Any, source: str, field: str) -> None:
    """The parts must speak of the same latents and tokens."""
    width, latent = unet.config.cross_attention_dim, vae.config.latent_channels
    problem = None
    if width != text_encoder.config.hidden_size:
        problem = f"has a U-Net for prompts of width {width} and a text encoder of {text_encoder.config.hidden_size}"
    elif not unet.config.in_channels == unet.config.out_channels == latent:
        problem = f"has a U-Net of {unet.config.in_channels} channels (inpainting?) and latents of {latent}"
    elif unet.config.sample_size is None or unet.config.time_cond_proj_dim is not None:
        problem = "has a U-Net without a sample_size, or with the guidance scale as an input"
    elif unet.config.class_embed_type is not None or unet.config.addition_embed_type is not None:
        problem = "has a U-Net that wants more than a prompt"
    elif getattr(vae.config, "shift_factor", None):
        problem = "has an autoencoder that shifts its latents"
    if problem:
        raise InputError(field, source, "give a Stable Diffusion 1.x pipeline", problem=problem)
