"""The model folder of a text-to-image student: a stock ``StableDiffusionPipeline`` with our few-step scheduler.

model_index.json  unet/ vae/ text_encoder/ tokenizer/       what diffusers loads; a LoRA leaves unet/ as it was
scheduler/renoise.py                                        the sampler, whose code travels
pytorch_lora_weights.safetensors                            a LoRA: pipe.load_lora_weights(folder)
lineage.json  README.md  grid.png                           what diffstill adds
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..disk import sync_tree
from ..errors import InputError, RunFailed
from ..pipelines import component_source
from ..pipelines.renoise import RenoiseScheduler
from .adapters import unwrap
from .adapters.prompted_unet import PromptedUNet
from .denoiser import Denoiser
from .folder import as_saved, swap, write_json
from .lineage import Lineage, weights_sha256
from .loading import WEIGHTS, not_finite, read_json
from .text_to_image import PARTS, TextToImage, load_pipeline

LORA = "pytorch_lora_weights.safetensors"
SKIPPED = ("*.bin", "*.fp16.*", "*.non_ema.*", "*.msgpack", "*.onnx*", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.py")
"""Of the source's folders: pickles, code and second copies of the weights."""


def save_pipeline(student: Denoiser, source: Path, folder: Path, *, lineage: Lineage) -> Lineage:
    """Writes a student's pipeline in one piece, its autoencoder and text encoder copied from the teacher's folder.

    Args:
        student: a ``PromptedUNet`` made to be sampled by ``renoise``; with adapters, these alone are its weights.
        source: the folder of the teacher's pipeline.
        lineage: its weights' hash and parameter count are filled in here.

    Raises:
        RunFailed: weights that are not finite, or a disk that refuses; what was there before is untouched.
        InputError: a ``folder`` that holds something else than a model.
    """
    network = unwrap(student.network)
    assert isinstance(network, PromptedUNet), "a student of a text-to-image pipeline"
    assert student.sampler == "renoise", student.sampler
    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise InputError("folder", str(folder), "name a new or empty folder", problem="holds something else")
    unet: Any = network.unet
    state = lora_state(unet) if network.adapted else {n: as_saved(v) for n, v in unet.state_dict().items()}
    if broken := not_finite(state):
        raise RunFailed(f"the weights are not finite ({broken}); nothing was written to {folder}")
    parameters = sum(p.numel() for p in unet.parameters())
    lineage = lineage.model_copy(update={"weights_sha256": weights_sha256(state), "parameters": parameters})
    beside = folder.parent / f".{folder.name}.writing"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for part in PARTS:
            if part != "unet" or network.adapted:
                shutil.copytree(source / part, beside / part, ignore=shutil.ignore_patterns(*SKIPPED))
        if network.adapted:
            _save_lora(unet, state, beside)
        else:
            unet.save_config(beside / "unet")
            save_file(state, beside / "unet" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        scheduler_of(student).save_pretrained(beside / "scheduler")
        (beside / "scheduler" / "renoise.py").write_text(component_source("renoise", __version__), encoding="utf-8")
        write_json(beside / "model_index.json", _index(read_json(source, "model_index.json")))
        (beside / "lineage.json").write_text(lineage.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_subject_card(beside)
        sync_tree(beside)
        swap(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunFailed(f"the model folder {folder} cannot be written: {error}") from error
    return lineage


def scheduler_of(student: Denoiser) -> RenoiseScheduler:
    """The scheduler that takes a few-step student's steps, its timesteps the times that the network knows them by."""
    schedule, times = student.schedule, student.time_index
    return RenoiseScheduler(
        num_train_timesteps=schedule.T,
        trained_betas=schedule.betas.tolist(),
        beta_schedule=schedule.name,
        prediction_type=student.prediction_type,
        clip_sample=False,
        network_times=None if times is None else times.tolist(),
    )


def lora_state(unet: Any) -> dict[str, Tensor]:
    """The adapters' weights by the names under which diffusers saves them."""
    from peft import get_peft_model_state_dict

    return {name: as_saved(value) for name, value in get_peft_model_state_dict(unet).items()}


def _save_lora(unet: Any, state: dict[str, Tensor], folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    told = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=told)


def _index(source: dict[str, Any]) -> dict[str, Any]:
    """The teacher's ``model_index.json`` with our scheduler, and without a safety checker, which nobody has loaded."""
    kept = {name: value for name, value in source.items() if name in PARTS or name == "_diffusers_version"}
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    return {
        "_class_name": "StableDiffusionPipeline",
        **kept,
        "scheduler": ["renoise", "RenoiseScheduler"],
        **absent,
        "requires_safety_checker": False,
    }


def load_subject(folder: Path) -> tuple[Denoiser, TextToImage]:
    """The student of a folder that ``save_pipeline`` wrote, its prompts as they were trained, and the whole pipeline.

    Raises:
        InputError: a folder of another kind, or weights that its ``lineage.json`` does not know.
    """
    parts = load_pipeline(str(folder), "model")
    lineage = Lineage.model_validate(read_json(folder, "lineage.json"))
    told: Any = lineage.recipe["prompts"]
    if lora := (folder / LORA).is_file():
        parts.unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA, adapter_name="default")
    student = parts.denoiser(parts.embed([told["target"], told["negative"]]))
    state = lora_state(parts.unet) if lora else parts.unet.state_dict()
    if weights_sha256(state) != lineage.weights_sha256:
        problem = "has other weights than its lineage.json says"
        raise InputError("model", str(folder), "export the model again", problem=problem)
    student.sampler = "renoise"
    times = read_json(folder, "scheduler/scheduler_config.json").get("network_times")
    student.time_index = None if times is None else torch.tensor(times)
    student.freeze()
    return student, parts


def write_subject_card(folder: Path, *, grid: Path | None = None) -> None:
    """(Re)writes ``README.md`` from what lies in the folder; ``grid`` is copied in as ``grid.png``."""
    if grid is not None:
        shutil.copyfile(grid, folder / "grid.png")
    lineage = Lineage.model_validate(read_json(folder, "lineage.json"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    text = environment.get_template("subject.md.j2").render(
        lineage=lineage,
        prompts=lineage.recipe["prompts"],
        steps=read_json(folder, "scheduler/scheduler_config.json")["num_train_timesteps"],
        lora=_lora_tensors(folder),
        grid=(folder / "grid.png").is_file(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _lora_tensors(folder: Path) -> int:
    """How many parameters its LoRA has; 0 where it has none."""
    if not (folder / LORA).is_file():
        return 0
    with safe_open(folder / LORA, "pt") as file:
        return sum(int(torch.tensor(file.get_slice(name).get_shape()).prod()) for name in list(file.keys()))
