"""A Stable-Diffusion-style pipeline folder of a few hundred kilobytes, randomly initialised, built on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffstill.engine.runtime import Runtime
from diffstill.engine.stream import BatchStream
from diffstill.jobs.subject import Prepared, prepare
from diffstill.methods import Batch
from diffstill.recipe import DistillRecipe, load_recipe

TOKENS = 12
SIDE, LATENT = 32, 16
"""Of the images in pixels and of their latents."""
IMAGES = 3
"""Of each subject."""
LOW_RANK = "lora.rank=2"
WORDS = ("a", "dog", "prt", "cat", "photo", "of")


def tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding over single letters and a few whole words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, parts = parts[:2], ["".join(parts[:2]), *parts[2:]]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
                vocab.append(parts[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=numbers, merges=[tuple(m.split()) for m in merges], model_max_length=TOKENS)


def build_pipeline(folder: Path, seed: int = 0) -> Path:
    """The folder of a whole pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=SIDE,
            scaling_factor=0.5,
        )
        unet = UNet2DConditionModel(
            sample_size=LATENT,
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D") + ("UpBlock2D",) * 2,
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def build_subjects(root: Path, subjects: tuple[str, ...] = ("cat2", "dog6"), images: int = IMAGES) -> Path:
    """A folder of subjects with a few images each: blobs of the subject's colour."""
    rng = np.random.default_rng(0)
    for number, subject in enumerate(subjects):
        (root / subject).mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            pixels[8 + 4 * i : 24 + 4 * i, 10:30, number % 3] += 150
            Image.fromarray(pixels).save(root / subject / f"{i:02}.png")
    return root


def overrides(pipeline: Path, subjects: Path) -> list[str]:
    """The built-in recipe on a tiny pipeline and few steps."""
    return [
        "subject-sd15", f"teacher.pipeline={pipeline}", f"data.source=folder:{subjects}",
        "training.images=12", "training.checkpoint_every=2", "training.warmup_images=0", "training.log_every=1",
        "training.lr=1e-3", "method.student_every=2",
        "evaluation.samples=20", "evaluation.steps=2", "evaluation.batch_size=20",
    ]  # fmt: skip


def recipe_of(tiny: list[str], *more: str) -> DistillRecipe:
    recipe = load_recipe(tiny[0], [*tiny[1:], *more])
    assert isinstance(recipe, DistillRecipe)
    return recipe


def prepared(tiny: list[str], *more: str) -> tuple[Prepared, Batch]:
    """A run as it stands before its first step, its teacher frozen and asked, and its first batch."""
    recipe = recipe_of(tiny, *more)
    made = prepare(recipe, Runtime("cpu"))
    stream = BatchStream(
        made.encode(), made.method.schedule, batch_size=recipe.training.batch_size, seed=0, device=torch.device("cpu")
    )
    return made, stream.batch(0)


def shaken(made: Prepared) -> Any:
    """The method with a student that is no longer its teacher."""
    method: Any = made.method
    with torch.no_grad():
        for parameter in method.roles["student"].parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return method
