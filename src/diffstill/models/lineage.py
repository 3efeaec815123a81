"""Where a model comes from: ``lineage.json`` names its teacher, method, recipe and data, with a hash of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor, nn

from .. import __version__
from .adapters import unwrap


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRef(_Record):
    """The data set a model was trained on."""

    name: str
    fingerprint: str = Field(description="ImageData.fingerprint() of the training split")


class Ancestor(_Record):
    """What a student remembers of its teacher, and through it of the teacher's teacher."""

    name: str
    method: str
    weights_sha256: str
    recipe_sha256: str = ""
    parameters: int = 0
    teacher: Ancestor | None = None


class Lineage(_Record):
    """The content of ``lineage.json``. ``save_model`` fills in the weights' hash and the parameter count."""

    format: Literal["diffstill-lineage/1"] = "diffstill-lineage/1"
    name: str
    method: str = Field(description="the training method that made it: supervised, dash, ...")
    created: str = Field(description="ISO 8601, UTC")
    diffstill: str = Field(__version__, description="version of diffstill that wrote it")
    recipe: dict[str, JsonValue] = {}
    recipe_sha256: str = ""
    data: DataRef | None = None
    teacher: Ancestor | None = None
    stages: list[str] = Field([], description="methods of the chain so far, oldest first, this one last")
    timesteps: list[int] = Field(
        [], description="of a student of fewer steps: which of its teacher's steps its own are"
    )
    images_seen: int = Field(0, ge=0, description="training images of the last stage, repeats counted")
    seeds: list[int] = []
    weights_sha256: str = ""
    parameters: int = 0

    @classmethod
    def new(
        cls,
        name: str,
        method: str,
        *,
        recipe: Mapping[str, Any] | None = None,
        data: DataRef | None = None,
        teacher: Lineage | Ancestor | None = None,
        timesteps: Sequence[int] = (),
        images_seen: int = 0,
        seeds: Sequence[int] = (),
    ) -> Lineage:
        """The lineage of a model made now; its chain of stages is the teacher's plus ``method``.

        A teacher that diffstill did not make has no lineage: give what is known of it as an ``Ancestor``.
        """
        ancestor = teacher.as_ancestor() if isinstance(teacher, Lineage) else teacher
        before = teacher.stages if isinstance(teacher, Lineage) else []
        return cls(
            name=name,
            method=method,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe=dict(recipe or {}),
            recipe_sha256=recipe_sha256(recipe) if recipe else "",
            data=data,
            teacher=ancestor,
            stages=[*before, method],
            timesteps=list(timesteps),
            images_seen=images_seen,
            seeds=list(seeds),
        )

    def as_ancestor(self) -> Ancestor:
        """The summary that a student of this model keeps."""
        return Ancestor(
            name=self.name,
            method=self.method,
            weights_sha256=self.weights_sha256,
            recipe_sha256=self.recipe_sha256,
            parameters=self.parameters,
            teacher=self.teacher,
        )


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe as canonical JSON (sorted keys): equal for equal recipes in any order or layout."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), shapes and values of a network's state; floating values count as float32.

    The same for a network on any device, compiled or not, and for its saved file.
    """
    state = unwrap(weights).state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        tensor = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
