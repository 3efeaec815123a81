"""A Stable-Diffusion-style pipeline folder of a few hundred kilobytes, randomly initialised, built on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 12
SIDE, LATENT = 32, 16
"""Of the images in pixels and of their latents."""
WORDS = ("a", "dog", "prt", "cat", "photo", "of")


def tokenizer(folder: Path) -> CLIPTokenizer:
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
    """The folder of a whole pipeline: 3 million times smaller than Stable Diffusion in what it knows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer(folder)
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
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
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


def build_subjects(root: Path, subjects: tuple[str, ...] = ("cat2", "dog6"), images: int = 3) -> Path:
    """A folder of subjects with a few images each: blobs of the subject's colour."""
    rng = np.random.default_rng(0)
    for number, subject in enumerate(subjects):
        (root / subject).mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            pixels[8 + 4 * i : 24 + 4 * i, 10:30, number % 3] += 150
            Image.fromarray(pixels).save(root / subject / f"{i:02}.png")
    return root
