"""The model folder: what is saved, and what plain diffusers loads.

    model_index.json  unet/ (or transformer/)  scheduler/  pipeline.py      stock diffusers, loads without diffstill
    lineage.json  curriculum.safetensors  README.md  grid.png               what diffstill adds

``load_model`` (models/loading.py) brings it back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..diffusion.guidance import parse_guidance
from ..diffusion.schedule import NoiseSchedule
from ..disk import share, sync, sync_tree
from ..errors import InputError, RunFailed
from ..pipelines import component_source, travelling_source
from .adapters import Family, family_of, unwrap
from .adapters.guided_unet2d import GUIDED_UNET2D
from .card import write_card
from .denoiser import Denoiser
from .lineage import Lineage, weights_sha256
from .loading import COMPONENTS, SCHEDULERS, WEIGHTS, LoadedModel, load_model, not_finite

__all__ = ["LoadedModel", "load_model", "save_model"]


def save_model(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    lineage: Lineage,
    class_names: Sequence[str],
    guided: bool = True,
    default_guidance: str = "2",
    curriculum: Mapping[str, Tensor] | None = None,
    curriculum_meta: Mapping[str, str] | None = None,
    card_images: Path | None = None,
    figures: Mapping[str, object] | None = None,
) -> Lineage:
    """Writes a model folder in one piece: beside, synced to disk, then renamed; an older model there is replaced.

    Args:
        denoiser: of a family that diffusers knows; weights are saved as float32.
        lineage: its weights' hash and parameter count are filled in here.
        class_names: one a class.
        guided: False for a student without a live null branch.
        default_guidance: what the pipeline uses where a call names no scale (``parse_guidance``).
        curriculum, curriculum_meta: ``Curriculum.table()`` and ``.meta()``, where there is one.
        card_images: PNG of sample images for the model card.
        figures: name -> value of results for the model card.

    Returns:
        The lineage as written.

    Raises:
        InputError: names or guidance that do not fit, a network that diffusers does not know, or a ``folder`` that
            holds something else than a model.
        RunFailed: weights that are not finite, or a disk that refuses; what was there before is untouched.
    """
    final = Path(folder)
    family = family_of(denoiser.network)
    _check_saveable(denoiser, family, final, class_names, default_guidance)
    network: Any = unwrap(denoiser.network)
    state = {name: as_saved(tensor) for name, tensor in network.state_dict().items()}
    if broken := not_finite(state):
        raise RunFailed(f"the weights are not finite ({broken}); nothing was written to {final}")
    lineage = lineage.model_copy(
        update={"weights_sha256": weights_sha256(state), "parameters": sum(p.numel() for p in network.parameters())}
    )
    beside = final.parent / f".{final.name}.writing"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        part = beside / COMPONENTS[family.name]
        part.mkdir(parents=True)
        network.save_config(part)
        save_file(state, part / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        _write_scheduler(denoiser, beside / "scheduler")
        write_json(beside / "model_index.json", _index(denoiser, class_names, guided, default_guidance))
        (beside / "pipeline.py").write_text(travelling_source(__version__), encoding="utf-8")
        for component, (module, _) in _travelling(denoiser).items():
            (beside / component / f"{module}.py").write_text(component_source(module, __version__), encoding="utf-8")
        (beside / "lineage.json").write_text(lineage.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if curriculum is not None:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in curriculum.items()}
            meta = {**(curriculum_meta or {}), **_schedule_meta(denoiser.schedule)}
            save_file(tensors, beside / "curriculum.safetensors", metadata=meta)
        write_card(beside, figures=figures, grid=card_images)
        share(beside, beside / "lineage.json")
        sync_tree(beside)
        swap(beside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunFailed(f"the model folder {final} cannot be written: {error}") from error
    return lineage


def _check_saveable(
    denoiser: Denoiser, family: Family, final: Path, class_names: Sequence[str], default_guidance: str
) -> None:
    if family.name not in COMPONENTS:
        raise InputError("network", family.name, f"only {', '.join(COMPONENTS)} networks have a diffusers form")
    if len(class_names) != denoiser.num_classes or len(set(class_names)) != len(class_names):
        raise InputError("class_names", list(class_names), f"give {denoiser.num_classes} different names")
    try:
        parse_guidance(default_guidance)
    except ValueError as error:
        raise InputError("default_guidance", default_guidance, str(error)) from error
    if final.exists() and not (final / "model_index.json").is_file() and (final.is_file() or any(final.iterdir())):
        problem = "holds something else than a model"
        raise InputError("folder", str(final), "name a new or empty folder", problem=problem)


def _index(denoiser: Denoiser, class_names: Sequence[str], guided: bool, default_guidance: str) -> dict[str, Any]:
    family, index = family_of(denoiser.network), denoiser.time_index
    scales = denoiser.scale_range
    return {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "_diffusers_version": diffusers.__version__,
        COMPONENTS[family.name]: ["diffusers", family.network_class.__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{component: list(source) for component, source in _travelling(denoiser).items()},
        "num_classes": denoiser.num_classes,
        "guided": guided,
        "default_guidance": default_guidance if guided else "1",
        "guidance_range": None if scales is None else {"low": scales[0], "high": scales[1]},
        # No list: diffusers takes lists in this file for components.
        "time_index": None if index is None else {str(step): t for step, t in enumerate(index.tolist())},
        "id2label": {str(number): name for number, name in enumerate(class_names)},
    }


def _travelling(denoiser: Denoiser) -> dict[str, tuple[str, str]]:
    """Component -> (module, class) of those whose code is ours and lies in the folder."""
    found = {}
    family = family_of(denoiser.network)
    if family is GUIDED_UNET2D:
        found["unet"] = ("guided_unet", family.network_class.__name__)
    if denoiser.sampler in SCHEDULERS:
        found["scheduler"] = (denoiser.sampler, SCHEDULERS[denoiser.sampler].__name__)
    return found


def _write_scheduler(denoiser: Denoiser, folder: Path) -> None:
    schedule = denoiser.schedule
    if denoiser.sampler in SCHEDULERS:
        more: dict[str, Any] = {} if denoiser.end is None else {"final_alpha_cumprod": float(denoiser.end[0].square())}
        more |= {"clip_sample": False} if denoiser.sampler == "renoise" else {}
        own = SCHEDULERS[denoiser.sampler](
            num_train_timesteps=schedule.T,
            trained_betas=schedule.betas.tolist(),
            beta_schedule=schedule.name,
            prediction_type=denoiser.prediction_type,
            **more,
        )
        own.save_pretrained(folder)
        return
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=schedule.T,
        trained_betas=schedule.betas.tolist(),
        beta_schedule=schedule.name,  # a name only: the table above is what every scheduler reads first
        prediction_type=denoiser.prediction_type,
        timestep_spacing="leading",
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=True,
        clip_sample_range=1.0,
    )
    scheduler.save_pretrained(folder)


def _schedule_meta(schedule: NoiseSchedule) -> dict[str, str]:
    return {"T": str(schedule.T), "schedule": schedule.name, "schedule_fingerprint": schedule.fingerprint()}


def as_saved(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    # A fresh contiguous copy: safetensors refuses views that share storage, and channels_last is a runtime matter.
    return (tensor.float() if tensor.is_floating_point() else tensor).clone(memory_format=torch.contiguous_format)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def swap(beside: Path, final: Path) -> None:
    """Puts ``beside`` in the place of ``final``; the older model stays whole until the newer one stands."""
    old = final.parent / f".{final.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(beside, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
