"""Loading a model folder strictly. Nothing here reads a pickle or runs code out of a folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..diffusion.prediction import PREDICTION_TYPES, PredictionType
from ..diffusion.sampling import SamplerName
from ..diffusion.schedule import NoiseSchedule
from ..errors import InputError, counted
from ..pipelines.encode import EncodeScheduler
from ..pipelines.renoise import RenoiseScheduler
from ..pipelines.stochastic import StochasticJumpScheduler
from .adapters import FAMILIES, family_of
from .adapters.unet2d import UNET2D
from .denoiser import Denoiser
from .lineage import Lineage, weights_sha256

COMPONENTS = {"unet2d": "unet", "guided_unet2d": "unet", "unet2d_condition": "unet", "dit": "transformer"}
"""Where each family's network lies in the folder, by the adapter's name."""
SCHEDULERS: dict[SamplerName, Any] = {
    "stochastic": StochasticJumpScheduler,
    "encode": EncodeScheduler,
    "renoise": RenoiseScheduler,
}
"""Samplers whose scheduler is ours and travels, by what ``Denoiser.sampler`` calls them."""
LIBRARIES = ("diffusers", "guided_unet")
"""Whose network classes are known: a folder's own class of a known name computes something else."""
FURTHER_INPUTS = ("addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")
"""Settings of a ``UNet2DConditionModel`` by which it wants more than an image, a time and a label."""
WEIGHTS = "diffusion_pytorch_model"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory. The network is in eval mode, float32."""

    denoiser: Denoiser
    lineage: Lineage | None
    """None for a folder that diffstill did not write."""
    curriculum: dict[str, Tensor] | None
    curriculum_meta: dict[str, str] | None
    """``Curriculum.meta()`` as saved: options, T, schedule, schedule_fingerprint."""
    guided: bool
    class_names: tuple[str, ...]
    default_guidance: str
    folder: Path


def load_model(source: str | Path, device: str | torch.device = "cpu", *, has_null: bool = True) -> LoadedModel:
    """Loads a model folder, or a hub id ``owner/name``; strictly: every weight must be there, fit and be finite.

    A plain diffusers folder loads too: a ``UNet2DModel``, or a class-conditional ``UNet2DConditionModel`` or
    ``DiTTransformer2DModel`` on pixels. An unconditional one has one class; of a learned variance the mean alone is
    used.

    Args:
        source: a folder with ``model_index.json``, or a hub id.
        device: where the network goes.
        has_null: only for folders that diffstill did not write: whether the last row of the class table is the null
            label, which cannot be seen from outside. False: all rows are classes, and the model is unguided.

    Raises:
        InputError: one line, for a missing, foreign, damaged or pickled file, or weights that do not fit or are NaN.
    """
    folder = resolve(str(source))
    index = read_json(folder, "model_index.json")
    network = _load_network(folder, index)
    schedule, prediction_type = load_schedule(folder)
    num_classes, guided = _classes(folder, index, network, has_null)
    shape = _sample_shape(folder, network)
    lineage = _load_lineage(folder, network)
    tensors, meta = _load_curriculum(folder, schedule)
    named = index.get("id2label") or {}
    if num_classes == 1:
        named = {"0": "image", **named}
    names = tuple(str(named.get(str(number), number)) for number in range(num_classes))
    default = str(index.get("default_guidance", "2" if guided else "1"))
    denoiser = Denoiser(_moved(network, device).eval(), schedule, num_classes, shape, prediction_type)
    denoiser.time_index = _load_time_index(folder, index, schedule.T)
    denoiser.scale_range = _load_scale_range(folder, index, network)
    made_for = _component(index, "scheduler")
    denoiser.sampler = next((name for name, own in SCHEDULERS.items() if own.__name__ == made_for), "ddim")
    if denoiser.sampler == "encode":
        denoiser.end = _load_end(folder)
    return LoadedModel(denoiser, lineage, tensors, meta, guided, names, default, folder)


AGAIN = "fetch or export the model again"


def _bad(folder: Path, problem: str, mend: str = AGAIN) -> InputError:
    return InputError("model", str(folder), mend, problem=problem)


def _why(error: Exception) -> str:
    """The beginning of a foreign message, which may run over many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


UNREACHED = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectTimeout")
"""What the hub's client raises without a network, or where HF_HUB_OFFLINE is set."""
PATTERNS = ("*.json", "*.safetensors", "*.py", "README.md", "grid.png")


def resolve(source: str, patterns: Sequence[str] = PATTERNS, ignore: Sequence[str] = ()) -> Path:
    """The folder of a model, downloaded where ``source`` is a hub id.

    Args:
        patterns, ignore: of the files that are fetched, and that are not.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix in PICKLES:
            raise _bad(path, "is a pickle, which may run code", "convert it to safetensors with the tool that wrote it")
        raise _bad(path, "is a file", "give the folder that holds model_index.json")
    if path.is_dir():
        return path
    # A path of two parts looks like a hub id; where its first part is a folder here, a path was meant.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(".") or path.parent.is_dir():
        raise _bad(path, "does not exist", "give a model folder, or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns), ignore_patterns=list(ignore)))
    except Exception as error:  # the hub's client raises many kinds; each means the same to the user
        name = type(error).__name__
        did = "could not be reached" if name in UNREACHED else f"did not deliver it ({name})"
        problem = f"is no folder here, and the hub {did}"
        raise _bad(path, problem, "check the spelling and the network, or download the folder first") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inner = folder / "model"  # of a run
        mend = f"use {inner}" if (inner / name).is_file() else "give a diffusers model folder"
        raise _bad(folder, f"has no {name}", mend) from None
    except (OSError, ValueError) as error:
        raise _bad(folder, f"has a {name} that cannot be read ({_why(error)})") from error
    if not isinstance(content, dict):
        raise _bad(folder, f"has a {name} that is no JSON object")
    return content


def _load_network(folder: Path, index: dict[str, Any]) -> Any:
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0]}
    families = [(part, FAMILIES[name].network_class) for name, part in COMPONENTS.items()]
    known = {part: network_class for part, network_class in families if parts.get(part) == network_class.__name__}
    known = {part: made for part, made in known.items() if str(index[part][0]).rpartition(".")[2] in LIBRARIES}
    found = list(known)
    if len(found) != 1 or set(parts) - {found[0], "scheduler"}:
        whole = {name: ".".join(map(str, index[name])).removeprefix("diffusers.") for name in parts}
        held = ", ".join(f"{name} {value}" for name, value in whole.items()) or "no component"
        mend = "give a UNet2DModel, or a class-conditional UNet2DConditionModel or DiTTransformer2DModel on pixels"
        raise _bad(folder, f"holds {held}", mend)
    part = found[0]
    home = folder / part if (folder / part).is_dir() else folder  # older pipelines lie flat
    state = _load_weights(home)
    config = read_json(home, "config.json")
    for key in FURTHER_INPUTS:
        if config.get(key) is not None:
            raise _bad(folder, f"has a network with an input that nothing here gives it ({key}={config[key]!r})",
                       "give a class-conditional model without it")  # fmt: skip
    network_class: Any = known[part]
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten at once
            network = network_class.from_config(config)
    except Exception as error:  # whatever a foreign config makes diffusers raise
        raise _bad(folder, f"has an unusable {part}/config.json ({_why(error)})") from error
    network._fix_state_dict_keys_on_load(state)  # attention's names of before diffusers 0.14
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfit = [name for name in own if name in state and own[name].shape != state[name].shape]
    for names, problem in ((missing, "lacks"), (extra, "has unknown"), (misfit, "has misshapen")):
        if names:
            raise _bad(folder, f"{problem} weights {_some(names)} for its {part}/config.json")
    if broken := not_finite(state):
        raise _bad(folder, f"has weights that are not finite ({broken})", "take an earlier checkpoint")
    network.load_state_dict(state, strict=True)
    return network


def _load_weights(part: Path) -> dict[str, Tensor]:
    files = [part / f"{WEIGHTS}.safetensors"]
    if not files[0].is_file():
        files = sorted(part.glob(f"{WEIGHTS}-*-of-*.safetensors"))
        if not files or len(files) != int(files[0].stem.rsplit("-", 1)[1]):
            pickled = sorted(path.name for path in part.glob("*") if path.suffix in PICKLES)
            if pickled:
                mend = "convert them to safetensors: pipeline.save_pretrained(folder, safe_serialization=True)"
                raise _bad(part, f"has only pickled weights ({pickled[0]}), which may run code", mend)
            if variants := sorted(path.name for path in part.glob(f"{WEIGHTS}.*.safetensors*")):
                mend = "load it with variant= and save it again without"
                raise _bad(part, f"has the weights of a variant alone ({variants[0]})", mend)
            raise _bad(part, f"has no complete {WEIGHTS}.safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise _bad(part, f"has a damaged {file.name} ({_why(error)})") from error
    return state


def _moved(network: Any, device: str | torch.device) -> Any:
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:  # unknown name, no such device, no CUDA in this torch
        raise InputError("device", str(device), f"use cpu, or a device that torch sees ({_why(error)})") from error


def load_schedule(folder: Path) -> tuple[NoiseSchedule, PredictionType]:
    inner = "scheduler/scheduler_config.json"
    config = read_json(folder, inner if (folder / "scheduler").is_dir() else "scheduler_config.json")
    name = str(config.get("_class_name"))
    own = {made.__name__: made for made in SCHEDULERS.values()}
    scheduler_class: Any = own.get(name) or getattr(diffusers, name, None)
    try:
        scheduler = scheduler_class.from_config(config)
        schedule = NoiseSchedule.from_scheduler(scheduler)
    except Exception as error:  # no such class, no beta table (flow matching), betas out of range
        mend = "give a model with a table of betas, such as DDIMScheduler's"
        raise _bad(folder, f"has a scheduler that cannot be used ({name}: {_why(error)})", mend) from error
    for key, value in (("timestep_type", "continuous"), ("use_flow_sigmas", True)):
        if config.get(key) == value:
            mend = "give a model whose network takes the steps of its table of betas"
            raise _bad(folder, f"has a scheduler of another notion of time ({name}, {key}={value})", mend)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise _bad(folder, f"predicts {kind}", f"give a model that predicts {', '.join(PREDICTION_TYPES)}")
    return schedule, kind


def _classes(folder: Path, index: dict[str, Any], network: Any, has_null: bool) -> tuple[int, bool]:
    """Number of real classes, and whether there is a live null branch."""
    config = network.config
    if (embedded := config.get("class_embed_type")) is not None:
        problem = f"embeds its labels by class_embed_type={embedded!r}, not by a table of classes"
        raise _bad(folder, problem, "give a model with num_class_embeds alone")
    rows = config.get("num_class_embeds") or (config.get("num_embeds_ada_norm") or -1) + 1
    if rows == 0 and (family_of(network) is UNET2D or "num_classes" in index):
        if index.get("num_classes", 1) != 1 or index.get("guided", False):
            named = counted(index.get("num_classes", 1), "class")
            raise _bad(folder, f"names {named}, and its network is unconditional")
        return 1, False
    if rows < 2:
        held = "has one label row: too few for a class" if rows == 1 else "is not class-conditional"
        raise _bad(folder, held, "give a model with num_class_embeds")
    if "num_classes" not in index:
        return (rows - 1, True) if has_null else (rows, False)
    num_classes, guided = index["num_classes"], bool(index.get("guided", True))
    if num_classes != rows - 1 and (guided or num_classes != rows):
        raise _bad(folder, f"names {num_classes} classes, and its network has {rows} label rows instead of one more")
    return num_classes, guided


def _load_time_index(folder: Path, index: dict[str, Any], T: int) -> Tensor | None:
    found = index.get("time_index")
    if found is None:
        return None
    steps = [found.get(str(step)) for step in range(T)] if isinstance(found, dict) else [None]
    if not all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t < math.inf for t in steps):
        steps = []
    if len(steps) != T or len(found) != T:
        raise _bad(folder, f"has a time_index that does not name its {T} steps")
    return torch.tensor(steps)  # float32 where one lies between the network's own steps


def _load_scale_range(folder: Path, index: dict[str, Any], network: Any) -> tuple[float, float] | None:
    if not family_of(network).takes_scale(network):
        return None
    found = index.get("guidance_range")
    ends: list[Any] = [found.get("low"), found.get("high")] if isinstance(found, dict) else []
    if not ends or not all(type(end) in (int, float) and math.isfinite(end) for end in ends) or ends[0] >= ends[1]:
        raise _bad(folder, f"takes the guidance scale and has a guidance_range of {found}")
    return float(ends[0]), float(ends[1])


def _load_end(folder: Path) -> tuple[Tensor, Tensor]:
    abar: Any = read_json(folder, "scheduler/scheduler_config.json").get("final_alpha_cumprod")
    if type(abar) not in (int, float) or not 0 <= abar < 1:
        raise _bad(folder, f"is an encoder whose last step ends at final_alpha_cumprod {abar}")
    level = torch.tensor([abar], dtype=torch.float64)
    return level.sqrt(), (1 - level).sqrt()


def _component(index: dict[str, Any], name: str) -> str:
    """Class name of a component, empty where there is none."""
    found = index.get(name)
    return str(found[1]) if isinstance(found, list) and len(found) == 2 else ""


def _sample_shape(folder: Path, network: Any) -> tuple[int, int, int]:
    config = network.config
    size = config.sample_size
    outputs = (None, config.in_channels, *([2 * config.in_channels] if family_of(network) is UNET2D else []))
    if size is None or config.out_channels not in outputs:
        mend = "give one with a sample_size and as many out_channels as in_channels"
        raise _bad(folder, "has a network of another kind", mend)
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def _load_lineage(folder: Path, network: Any) -> Lineage | None:
    if not (folder / "lineage.json").exists():
        return None
    try:
        lineage = Lineage.model_validate(read_json(folder, "lineage.json"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _bad(folder, f"has a lineage.json with a bad {where} ({first['msg']})") from error
    if lineage.weights_sha256 != weights_sha256(network):
        mend = f"{AGAIN}, or delete lineage.json if the change was meant"
        raise _bad(folder, "has other weights than its lineage.json says", mend)
    return lineage


def _load_curriculum(folder: Path, schedule: NoiseSchedule) -> tuple[dict[str, Tensor] | None, dict[str, str] | None]:
    file = folder / "curriculum.safetensors"
    if not file.exists():
        return None, None
    try:
        with safe_open(file, "pt") as opened:
            meta: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise _bad(folder, f"has a damaged {file.name} ({_why(error)})") from error
    if meta.get("T") != str(schedule.T) or meta.get("schedule_fingerprint") != schedule.fingerprint():
        learned = f"{meta.get('schedule')} with T={meta.get('T')}"
        mend = f"export it again: its own schedule is {schedule.name} with T={schedule.T}"
        raise _bad(folder, f"has a curriculum that was learned for another schedule ({learned})", mend)
    if broken := not_finite(tensors):
        raise _bad(folder, f"has a curriculum that is not finite ({broken})", "train the teacher again")
    return tensors, meta


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Names of the tensors that hold NaN or Inf, shortened; empty where there is none."""
    return _some([name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
