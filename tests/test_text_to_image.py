"""Text-to-image pipelines: strict loading, prompts as labels, images as latents, adapters over a shared base."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import StableDiffusionPipeline, UNet2DModel
from tiny_sd import SIDE, TOKENS

from diffstill.data.dataset import LatentData
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.ema import Ema
from diffstill.engine.state import frozen_names, load_own, own_state
from diffstill.engine.stream import BatchStream
from diffstill.errors import InputError
from diffstill.evaluation.cost import held_bytes
from diffstill.jobs.subject import lora_config
from diffstill.models.adapters import family_of
from diffstill.models.adapters.prompted_unet import PromptedUNet
from diffstill.models.features import encode_features, encoder_blocks, encoder_taps, feature_shapes
from diffstill.models.text_to_image import TextToImage, load_pipeline
from diffstill.recipe import LoraSpec

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def parts(tiny_pipeline: Path) -> TextToImage:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def copied(tiny_pipeline: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_pipeline, tmp_path / "sd")
    return tmp_path / "sd"


def rewrite(file: Path, change: Any) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def inputs(count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, 16, 16, generator=generator)
    return x, torch.linspace(3.5, 900, count), torch.zeros(count, dtype=torch.int64)


def test_a_pipeline_is_read_whole(parts: TextToImage, tiny_pipeline: Path) -> None:
    assert (parts.size, parts.latent_shape, parts.prediction_type) == (SIDE, (4, 16, 16), "epsilon")
    assert parts.schedule.same_as(NoiseSchedule.create("scaled_linear"))
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(parts, part), getattr(stock, part)
        assert not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_prompts_are_embedded_as_diffusers_does(parts: TextToImage, tiny_pipeline: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    ours = parts.embed(["a prt dog", "a dog", ""])
    for row, prompt in zip(ours, ("a prt dog", "a dog", ""), strict=True):
        theirs, _ = stock.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(row, theirs[0])
    assert not torch.allclose(ours[0], ours[1])


def test_a_prompt_that_would_be_cut_is_refused(parts: TextToImage) -> None:
    with pytest.raises(InputError, match=rf"^prompts: .*has {TOKENS + 2} tokens.*at most {TOKENS}$"):
        parts.embed(["a " * TOKENS])


def test_latents_are_the_scaled_means_and_the_same_at_every_call(parts: TextToImage) -> None:
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first = parts.encode_images(images)
    assert torch.equal(first, parts.encode_images(images))
    assert torch.equal(first[2:], parts.encode_images(images[2:]))
    assert torch.allclose(first, parts.vae.encode(images).latent_dist.mean * 0.5, atol=1e-6)
    assert torch.allclose(parts.decode(first), parts.vae.decode(first / 0.5).sample, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0001, 3.0, 255.0])
def test_pixels_must_lie_in_their_range(parts: TextToImage, scale: float) -> None:
    images = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="must lie in"):
        parts.encode_images(images * scale)


def test_latents_reach_the_model_as_they_are() -> None:
    latents = torch.randn(3, 4, 8, 8) * 5
    data = LatentData("dog", "train", latents, torch.zeros(3, dtype=torch.int64), ("dog",))
    stream = BatchStream(data, NoiseSchedule.create("linear", 10), batch_size=5, seed=0, device=torch.device("cpu"))
    seen = stream.batch(0).x0
    assert all(any(torch.equal(x, z) for z in latents) for x in seen)
    assert data.subset(torch.tensor([1])).images.dtype == torch.float32
    with pytest.raises(ValueError, match="float32"):
        LatentData("dog", "train", latents.byte(), data.labels, ("dog",))


def test_weights_under_their_older_names_are_the_same_weights(parts: TextToImage, copied: Path) -> None:
    """Stable Diffusion 1.5's own files: the autoencoder's attention, the text encoder's prefix and positions."""
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in state.items():
            for new, old in older.items():
                name = name.replace(new, old)
            found[name] = value
        return found

    def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
        return made | {"text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}

    rewrite(copied / "vae/diffusion_pytorch_model.safetensors", renamed)
    rewrite(copied / TEXT, prefixed)
    old = load_pipeline(str(copied))
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(old.encode_images(images), parts.encode_images(images))
    assert torch.equal(old.embed(["a dog"]), parts.embed(["a dog"]))


def without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (UNET, without("conv_in.bias"), "lacks weights conv_in.bias"),
        (TEXT, without("layers.0.mlp.fc1.bias"), "lacks weights .*mlp.fc1.bias"),
        (UNET, lambda s: s | {"stray": torch.zeros(1)}, "has unknown weights stray"),
        (UNET, lambda s: s | {"conv_in.bias": torch.full((16,), torch.nan)}, "not finite .*conv_in.bias"),
        (UNET, lambda s: s | {"conv_in.bias": torch.zeros(3)}, "cannot be loaded|misshapen"),
    ],
)
def test_damaged_weights_are_refused(copied: Path, file: str, change: Any, problem: str) -> None:
    rewrite(copied / file, change)
    with pytest.raises(InputError, match=rf"^teacher.pipeline: .*{problem}") as caught:
        load_pipeline(str(copied))
    assert "\n" not in str(caught.value)


def test_pickles_and_other_pipelines_are_refused(copied: Path, tmp_path: Path) -> None:
    (copied / UNET).rename(copied / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights .* may run code"):
        load_pipeline(str(copied))
    index = copied / "model_index.json"
    index.write_text(index.read_text().replace("CLIPTextModel", "T5EncoderModel"))
    with pytest.raises(InputError, match="holds no CLIPTextModel as its text_encoder; give a Stable Diffusion 1"):
        load_pipeline(str(copied))
    with pytest.raises(InputError, match=r"^teacher.pipeline: .*does not exist"):
        load_pipeline(str(tmp_path / "nowhere"))


def test_a_pipeline_without_its_tokenizer_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(InputError, match=r"^teacher.pipeline: .*tokenizer' cannot be loaded .*; fetch") as told:
        load_pipeline(str(copied))
    assert "\n" not in str(told.value)


def test_an_inpainting_unet_is_refused(copied: Path) -> None:
    config = copied / "unet/config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    rewrite(copied / UNET, lambda s: s | {"conv_in.weight": torch.zeros(16, 9, 3, 3)})
    with pytest.raises(InputError, match="U-Net of 9 channels"):
        load_pipeline(str(copied))


def test_labels_are_prompts_and_guidance_is_between_their_rows(parts: TextToImage) -> None:
    table = parts.embed(["a dog", "a cat", "of"])
    model = parts.denoiser(table)
    x, t, labels = inputs()
    assert (model.num_classes, model.null_label) == (2, 2)
    alone = [parts.unet(x, t, table[[row] * 2]).sample for row in range(3)]
    assert torch.equal(model(x, t, labels + 1), alone[1])
    assert torch.allclose(model.guided(x, t, labels, 7.5), alone[2] + 7.5 * (alone[0] - alone[2]), atol=1e-4)
    mixed = model(x, t, torch.tensor([0, 2]))
    assert torch.allclose(mixed, torch.stack([alone[0][0], alone[2][1]]), atol=1e-5)


def test_taps_and_blocks_are_the_unets(parts: TextToImage) -> None:
    model = parts.denoiser(parts.embed(["a dog", ""]))
    shapes = feature_shapes(model, tuple(encoder_blocks(model.network)))
    assert shapes == {"down.0": (16, 8, 8), "down.1": (16, 4, 4), "down.2": (32, 2, 2), "down.3": (32, 2, 2),
                      "mid": (32, 2, 2)}  # fmt: skip
    assert list(encoder_taps(model.network)) == list(encoder_taps(parts.unet))
    assert family_of(model.network).last(model.network) is parts.unet.conv_out
    x, t, labels = inputs()
    hidden = parts.unet.time_embedding(parts.unet.time_proj(t))
    first, _ = parts.unet.down_blocks[0](
        parts.unet.conv_in(x), hidden, encoder_hidden_states=model.network.table[labels]
    )
    assert torch.equal(encode_features(model, x, t, labels, ("down.0",))["down.0"], first)


def test_blocks_of_a_pixel_unet() -> None:
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, layers_per_block=1)  # fmt: skip
    assert list(encoder_blocks(unet)) == ["down.0", "down.1", "mid"]


# Adapters over a shared base.


@pytest.fixture
def adapted(parts: TextToImage) -> PromptedUNet:
    plain = PromptedUNet(parts.unet, parts.embed(["a prt dog", ""]))
    return plain.with_adapters(lora_config(LoraSpec(rank=2)), 5)


def shaken(network: PromptedUNet, seed: int = 0) -> PromptedUNet:
    """With adapters that say something: as they start, they change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.adapters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def pointers(network: torch.nn.Module) -> set[int]:
    return {p.data_ptr() for p in network.parameters()}


def test_adapters_share_the_base_and_change_nothing_at_first(parts: TextToImage, adapted: PromptedUNet) -> None:
    base = pointers(parts.unet)
    assert pointers(adapted) > base
    assert not hasattr(parts.unet, "peft_config")
    x, t, labels = inputs()
    plain = parts.denoiser(adapted.table)
    assert torch.equal(adapted(x, t, labels), plain(x, t, labels))
    again = PromptedUNet(parts.unet, adapted.table).with_adapters(lora_config(LoraSpec(rank=2)), 5)
    assert all(torch.equal(a, b) for a, b in zip(adapted.adapters(), again.adapters(), strict=True))


def test_copies_have_adapters_of_their_own(parts: TextToImage, adapted: PromptedUNet) -> None:
    first, second = (copy.deepcopy(adapted).requires_grad_(True) for _ in range(2))
    assert pointers(first) & pointers(second) == pointers(parts.unet)
    assert {id(p) for p in first.parameters() if p.requires_grad} == {id(p) for p in first.adapters()}
    x, t, labels = inputs()
    before = second(x, t, labels)
    shaken(first)
    assert not torch.allclose(first(x, t, labels), before)
    assert torch.equal(second(x, t, labels), before)
    assert not any(p.requires_grad for p in first.requires_grad_(False).parameters())


def test_four_models_of_one_base_hold_little_more_than_one(parts: TextToImage, adapted: PromptedUNet) -> None:
    whole = [copy.deepcopy(PromptedUNet(parts.unet, adapted.table)) for _ in range(4)]
    small = [PromptedUNet(parts.unet, adapted.table), *(copy.deepcopy(adapted) for _ in range(3))]
    adapters = sum(p.nbytes for p in adapted.adapters())
    tables = 4 * adapted.table.nbytes
    assert held_bytes(whole) == 4 * held_bytes([parts.unet]) + tables
    assert held_bytes(small) == held_bytes([parts.unet]) + 3 * adapters + tables


def test_an_average_shares_the_base_too(parts: TextToImage, adapted: PromptedUNet) -> None:
    ema = Ema(adapted, 0.5, cap=False)
    start = [p.detach().clone() for p in adapted.adapters()]
    base = {name: p.clone() for name, p in parts.unet.state_dict().items()}
    shaken(adapted)
    ema.update(adapted)
    assert pointers(ema.network) & pointers(adapted) == pointers(parts.unet)
    for mine, old, new in zip(ema.network.adapters(), start, adapted.adapters(), strict=True):
        assert torch.allclose(mine, (old + new) / 2)
    assert all(torch.equal(value, base[name]) for name, value in parts.unet.state_dict().items())
    assert set(ema.state()) == {"table", *(name for name, _ in adapted.named_parameters() if ".lora_" in name)}


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(adapted: PromptedUNet) -> None:
    shaken(adapted)
    others = frozen_names(adapted)
    saved = {name: value.clone() for name, value in own_state(adapted, others).items()}
    assert set(saved) == {"table", *(name for name, _ in adapted.named_parameters() if ".lora_" in name)}
    fresh = shaken(copy.deepcopy(adapted), seed=9)
    load_own(fresh, others, saved)
    assert all(torch.equal(a, b) for a, b in zip(fresh.adapters(), adapted.adapters(), strict=True))
    name = next(name for name in saved if ".lora_" in name)
    for wrong in ({k: v for k, v in saved.items() if k != name}, saved | {"more": torch.zeros(1)},
                  saved | {next(iter(others)): torch.zeros(1)}):  # fmt: skip
        with pytest.raises(RuntimeError):
            load_own(fresh, others, wrong)
