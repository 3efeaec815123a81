"""The receipt: everything a run claims, with the configuration, seeds, hashes and protocol behind each number.

``python -m diffstill.report.receipt`` prints the JSON schema (published as ``docs/receipt.schema.json``).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationError, field_validator

from .. import __version__
from ..disk import write_text
from ..errors import InputError, RunFailed
from ..evaluation.results import ModelEvaluation, Protocol, Result


def utc_now() -> str:
    """The time now as ``2026-03-01T12:00:00Z``."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Document(Result):
    """A result file with a schema id: equal content gives equal bytes, and a foreign file is refused in one line."""

    file_name: ClassVar[str]
    """The name looked for when a folder is given to ``load``."""

    def to_json(self) -> str:
        """JSON with sorted keys; numbers that are not finite become null."""
        content = json.loads(self.model_dump_json())
        return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write ``path`` atomically.

        Raises:
            RunFailed: a field that must be a number is not finite, so the file could not be read back.
        """
        text = self.to_json()
        try:
            type(self).model_validate_json(text)
        except ValidationError as error:
            raise RunFailed(f"{Path(path).name} is not written: {_first_problem(error)}") from None
        write_text(Path(path), text)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by ``save``, or the one named ``file_name`` in a folder.

        Raises:
            InputError: no such file, no JSON, another kind of file, or another schema version.
        """
        path = Path(path)
        path = path / cls.file_name if path.is_dir() else path
        kind, wanted = path.stem, cls.model_fields["schema_id"].default
        mend = f"give a {cls.file_name} written by diffstill {__version__}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(kind, str(path), mend, problem=f"cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise InputError(kind, str(path), mend, problem=f"is not JSON ({error})") from None
        found = content.get("schema_id") if isinstance(content, dict) else None
        if found != wanted:
            problem = f"has schema_id {found!r}, not {wanted!r}"
            raise InputError(kind, str(path), mend, problem=problem)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = f"is damaged ({_first_problem(error)})"
            raise InputError(kind, str(path), mend, problem=problem) from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{more}"


class Environment(Result):
    """Where a run ran."""

    python: str
    torch: str
    diffusers: str | None
    platform: str
    cpu: str
    cores: int = Field(description="logical cores this process may use")
    device: str
    git_commit: str | None = Field(description="of a diffstill checkout; ends in -dirty where files were changed")


class DataSummary(Result):
    """Which images."""

    name: str
    fingerprint: str
    splits: dict[str, int] = Field(description="split name -> number of images")
    shape: tuple[int, int, int] = Field(description="(C, H, W)")
    classes: list[str]
    per_class: dict[str, list[int]] = Field({}, description="split name -> images of each class")
    fingerprints: dict[str, str] = Field({}, description="split name -> hash of its images and labels")
    skipped: int = Field(0, description="unreadable images that were left out (skip_bad)")
    skipped_first: list[str] = Field([], description="the first ten of them, each with the reason")


class Ancestor(Result):
    """One model of the chain that led here, oldest first."""

    name: str
    method: str
    recipe_sha256: str = ""
    data_fingerprint: str = ""
    weights_sha256: str = ""
    parent: str | None = Field(None, description="name of the teacher; null for a model trained from data alone")


class TrainingSummary(Result):
    """What one training took."""

    name: str
    method: str
    steps: int
    images_seen: int
    seconds: float
    images_per_s: float
    parameters: int
    curve: str | None = Field(None, description="log.jsonl, relative to the run folder")
    curriculum: list[float] = Field(
        [],
        description="effective loss weight in equal timestep bins over 0..T-1, unit mean; empty where uniform",
    )


class Receipt(Document):
    """What a run did and measured: ``receipt.json`` in the run folder."""

    file_name = "receipt.json"

    schema_id: Literal["diffstill-receipt/1"] = "diffstill-receipt/1"
    version: str = Field(default_factory=lambda: __version__, description="of diffstill")
    created: str = Field(default_factory=utc_now, description="ISO 8601, UTC")
    kind: Literal["train", "distill", "eval", "demo", "chain"]
    name: str
    recipe: dict[str, Any] = Field({}, description="as resolved: every default filled in")
    seed: int
    environment: Environment
    data: DataSummary
    protocol: Protocol | None = None
    models: dict[str, ModelEvaluation] = Field({}, description='by role: "teacher", "student", or another name')
    baselines: dict[str, ModelEvaluation] = Field(
        {}, description="measured in a model's place: the few images themselves, repeated"
    )
    lineage: list[Ancestor] = []
    training: list[TrainingSummary] = []
    warnings: list[str] = []

    @field_validator("models")
    @classmethod
    def _in_order(cls, models: dict[str, ModelEvaluation]) -> dict[str, ModelEvaluation]:
        """Stages in their order; else teacher, student, the rest: JSON keeps no order, and a page made again is to be
        the same page."""

        def place(item: tuple[str, ModelEvaluation]) -> tuple[int, bool, bool, str]:
            name, model = item
            return model.place or 0, name != "teacher", name != "student", name

        return dict(sorted(models.items(), key=place))

    @property
    def teacher_role(self) -> str:
        """The name of what the subject is measured against: of a chain its first stage, else ``teacher``."""
        return next(iter(self.models), "teacher") if self.kind == "chain" else "teacher"

    @property
    def teacher(self) -> ModelEvaluation | None:
        return self.models.get(self.teacher_role)

    @property
    def subject(self) -> tuple[str, ModelEvaluation] | None:
        """The (role, model) the run is about: the student, else the last that is not the teacher, else the teacher."""
        asked = self.recipe.get("result")
        if self.kind == "chain" and asked in self.models:
            return asked, self.models[asked]
        if self.kind == "chain":  # its last stage; what has an @ is the first model again, in few steps
            return next((item for item in reversed(self.models.items()) if "@" not in item[0]), None)
        if "student" in self.models:
            return "student", self.models["student"]
        return list(self.models.items())[-1] if self.models else None


def environment(device: str | torch.device = "cpu") -> Environment:
    """What runs here, and on which ``device``."""
    try:
        diffusers = version("diffusers")
    except PackageNotFoundError:
        diffusers = None
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    affinity = getattr(os, "sched_getaffinity", None)
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        diffusers=diffusers,
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        device=name,
        git_commit=_git_commit(Path(__file__).resolve().parents[3]),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit(root: Path) -> str | None:
    # An installed package may lie in a virtual environment inside somebody else's repository: look only at our own.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def json_schema() -> dict[str, Any]:
    """JSON schema of ``receipt.json``."""
    return Receipt.model_json_schema()


def schema_text() -> str:
    """The schema as it is published: sorted keys, two spaces, a newline at the end."""
    return json.dumps(json_schema(), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
