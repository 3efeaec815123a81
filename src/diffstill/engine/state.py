"""Checkpoints: atomic (write beside, fsync, rename), safetensors + JSON, no pickle, the newest two are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..disk import file_sha256, sync
from ..errors import RunFailed

FORMAT = "diffstill-checkpoint/1"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by file and key, and a JSON-able description."""

    path: Path
    images_seen: int
    meta: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path, images_seen: int, meta: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], keep: int = 2
) -> Path:
    """Writes ``folder/<images_seen>/`` with one ``NAME.safetensors`` for each entry and ``state.json`` last.

    Raises:
        RunFailed: where the disk refuses (full, read-only); what was there before is untouched.
    """
    final = folder / f"{images_seen:012d}"
    beside = folder / f".writing-{images_seen:012d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        hashes = {}
        for name, content in tensors.items():
            file = beside / f"{name}.safetensors"
            save_file({key: value.detach().contiguous().cpu().clone() for key, value in content.items()}, file)
            sync(file)
            hashes[name] = file_sha256(file)
        state = {"format": FORMAT, "images_seen": images_seen, "files": hashes, "meta": dict(meta)}
        state["sha256"] = _content_sha256(state)
        (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        sync(beside / "state.json")
        sync(beside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        sync(folder)
    except Exception as error:  # OSError, and safetensors' own error for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        last = latest_name(folder)
        raise RunFailed(
            f"could not save the checkpoint {final}: {error}; "
            f"last good checkpoint: {last or 'none'}; free some space and run the same command again"
        ) from error
    for old in _candidates(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(folder: Path, clean: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that was passed over because it is damaged.

    Raises:
        RunFailed: where there are checkpoints and none of them is whole.
    """
    for leftover in folder.glob(".writing-*") if clean else ():
        shutil.rmtree(leftover, ignore_errors=True)
    warnings: list[str] = []
    found = _candidates(folder)
    for path in found:
        try:
            checkpoint = _load(path)
        except Exception as error:
            warnings.append(f"checkpoint {path.name} is damaged and was passed over: {error}")
            continue
        for damaged in found[: found.index(path)] if clean else ():
            # Out of the way: else it would count as the newest for ever, and push good ones out.
            aside = folder / f"damaged-{damaged.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(damaged, aside)
        return checkpoint, warnings
    if found:
        raise RunFailed(f"no checkpoint in {folder} can be read ({warnings[0]}); run again with --fresh to start over")
    return None, warnings


def latest_name(folder: Path) -> str | None:
    """Name of the newest checkpoint folder, whole or not."""
    found = _candidates(folder)
    return found[0].name if found else None


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(f"format {state.get('format')!r} is not {FORMAT!r}")
    # The first checkpoints of this format did not record a hash of state.json itself.
    if "sha256" in state and state.pop("sha256") != _content_sha256(state):
        raise ValueError("state.json does not have the recorded SHA-256")
    tensors = {}
    for name, digest in state["files"].items():
        file = path / f"{name}.safetensors"
        if file_sha256(file) != digest:
            raise ValueError(f"{file.name} does not have the recorded SHA-256")
        tensors[name] = load_file(file)
    return Checkpoint(path, int(state["images_seen"]), state["meta"], tensors)


def _candidates(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)


def _content_sha256(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def own_state(network: nn.Module, others: Set[str]) -> dict[str, Tensor]:
    """A network's state without the parameters ``others``, which are kept elsewhere or never change."""
    return {name: value for name, value in network.state_dict().items() if name not in others}


def load_own(network: nn.Module, others: Set[str], tensors: Mapping[str, Tensor]) -> None:
    """Restores what ``own_state`` gave.

    Raises:
        RuntimeError: tensors that are missing, too many or of another shape.
    """
    state = network.state_dict()
    if both := others & tensors.keys():
        raise RuntimeError(f"{sorted(both)[0]} is not trained here")
    network.load_state_dict({**{name: state[name] for name in others}, **tensors}, strict=True)


def frozen_names(network: nn.Module) -> frozenset[str]:
    """The parameters that ask for no gradient."""
    return frozenset(name for name, p in network.named_parameters() if not p.requires_grad)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors ``<parameter index>/<key>``."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores what ``pack_optimizer`` gave, into an optimizer over the same parameters in the same order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition("/")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            # Files hold contiguous tensors; fused kernels want moments laid out as the (channels_last) parameter is.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[key] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
