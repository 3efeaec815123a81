"""Damaged, foreign and missing model folders: refused in one line that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from folders import WEIGHTS, edit
from safetensors.torch import load_file, save_file

from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.models.folder import load_model


def spoil_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def without_labels(folder: Path) -> None:
    edit(folder / "unet/config.json", lambda config: config.update(num_class_embeds=None))
    spoil_weights(folder, lambda state: state.pop("class_embedding.weight"))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json; give a diffusers model folder"),
    "broken json": (
        lambda f: (f / "model_index.json").write_text("{"),
        "has a model_index.json that cannot be read",
    ),
    "not an object": (lambda f: (f / "model_index.json").write_text("[]"), "a model_index.json that is no JSON object"),
    "other pipeline": (
        lambda f: edit(f / "model_index.json", lambda c: c.update(unet=["diffusers", "UNet2DConditionModel"])),
        "has an unusable unet/config.json",
    ),
    "latents": (
        lambda f: edit(f / "model_index.json", lambda c: c.update(vae=["diffusers", "AutoencoderKL"])),
        "vae AutoencoderKL; give a UNet2DModel",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no complete diffusion_pytorch_model.safetensors; fetch"),
    "pickled": (pickled, "has only pickled weights (diffusion_pytorch_model.bin), which may run code; convert them"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), "has a damaged diffusion_"),
    "missing": (
        lambda f: spoil_weights(f, lambda s: s.pop("conv_in.bias")),
        "lacks weights conv_in.bias for its unet/config.json",
    ),
    "unknown": (
        lambda f: spoil_weights(f, lambda s: s.update({f"new{i}": torch.zeros(1) for i in range(4)})),
        "has unknown weights new0, new1 and 2 more for its unet/config.json",
    ),
    "misshapen": (
        lambda f: spoil_weights(f, lambda s: s.update({"conv_in.bias": torch.zeros(9)})),
        "has misshapen weights conv_in.bias",
    ),
    "nan": (
        lambda f: spoil_weights(f, lambda s: s["conv_in.bias"].fill_(float("nan"))),
        "has weights that are not finite (conv_in.bias); take an earlier checkpoint",
    ),
    "changed": (
        lambda f: spoil_weights(f, lambda s: s["conv_in.bias"].add_(1e-3)),
        "has other weights than its lineage.json says",
    ),
    "bad config": (
        lambda f: edit(f / "unet/config.json", lambda c: c.update(down_block_types=["NoBlock", "NoBlock"])),
        "has an unusable unet/config.json",
    ),
    "no labels": (
        without_labels,
        "names 3 classes, and its network is unconditional",
    ),
    "class count": (
        lambda f: edit(f / "model_index.json", lambda c: c.update(num_classes=7)),
        "names 7 classes, and its network has 4 label rows instead of one more",
    ),
    "flow matching": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text(
            json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"})
        ),
        "has a scheduler that cannot be used (FlowMatchEulerDiscreteScheduler",
    ),
    "no scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", lambda c: c.update(_class_name="Nonesuch")),
        "has a scheduler that cannot be used (Nonesuch",
    ),
    "other prediction": (
        lambda f: edit(f / "scheduler/scheduler_config.json", lambda c: c.update(prediction_type="score")),
        "predicts score; give a model that predicts epsilon, sample, v_prediction",
    ),
    "other schedule": (
        lambda f: edit(
            f / "scheduler/scheduler_config.json",
            lambda c: c.update(trained_betas=NoiseSchedule.create("linear").betas.tolist(), beta_schedule="linear"),
        ),
        "has a curriculum that was learned for another schedule (cosine with T=1000)",
    ),
    "damaged curriculum": (
        lambda f: (f / "curriculum.safetensors").write_bytes(b"nonsense"),
        "has a damaged curriculum.safetensors",
    ),
    "bad lineage": (
        lambda f: edit(f / "lineage.json", lambda c: c.update(images_seen=-1)),
        "has a lineage.json with a bad images_seen",
    ),
}


@pytest.mark.parametrize("case", list(SPOILED))
def test_a_spoiled_folder_is_refused_in_one_line(folder: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    spoil(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"model: '{folder}")
    assert "\n" not in text
    assert len(text) < 600


def test_paths_that_are_no_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="does not exist; give a model folder, or a hub id such as owner/name"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist"):  # of two parts, and no hub id: runs/ is a folder here
        load_model("runs/nothing")
    for name, message in (("model.ckpt", "is a pickle, which may run code"), ("a.safetensors", "is a file; give")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"^model: 'owner/name' is no folder here, and the hub could not be reached; check"
    ):
        load_model("owner/name")


def test_an_unknown_device_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match=r"^device: 'cuda:99' is not usable; use cpu, or a device that torch sees"):
        load_model(saved, "cuda:99")
