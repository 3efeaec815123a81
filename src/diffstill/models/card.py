"""The model card of an exported folder: hub front matter, a sample grid, a usage snippet, figures, lineage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..pipelines.encode import EncodeScheduler
from .lineage import Ancestor, Lineage


def write_card(folder: Path, *, figures: Mapping[str, object] | None = None, grid: Path | None = None) -> Path:
    """(Re)writes ``README.md`` from what lies in a model folder; ``grid`` is copied in as ``grid.png``.

    Call it again after an evaluation: ``figures`` (name -> shown value) become the card's table of results.
    Returns the card's path.
    """
    if grid is not None:
        shutil.copyfile(grid, folder / "grid.png")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    text = environment.get_template("card.md.j2").render(**_facts(folder), figures=dict(figures or {}))
    card = folder / "README.md"
    beside = folder / ".README.md.writing"
    beside.write_text(text, encoding="utf-8")
    beside.replace(card)
    return card


def _facts(folder: Path) -> dict[str, Any]:
    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    index, scheduler = read("model_index.json"), read("scheduler/scheduler_config.json")
    component = "unet" if "unet" in index else "transformer"
    network = read(f"{component}/config.json")
    lineage = Lineage.model_validate(read("lineage.json"))
    size = network["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    names = index.get("id2label") or {}
    return {
        "name": lineage.name,
        "lineage": lineage,
        "ancestors": _ancestors(lineage.teacher),
        "network": network["_class_name"],
        "parameters": lineage.parameters,
        "shape": (network["in_channels"], height, width),
        "num_classes": index["num_classes"],
        "class_names": ", ".join(names.values()) if len(names) <= 100 else "",
        "example_labels": list(range(min(4, index["num_classes"]))),
        "unconditional": index["num_classes"] == 1 and not index["guided"],
        "guided": index["guided"],
        "default_guidance": index["default_guidance"],
        "scales": index.get("guidance_range"),
        "sampler": scheduler["_class_name"],
        "encoder": scheduler["_class_name"] == EncodeScheduler.__name__,
        "prediction_type": scheduler["prediction_type"],
        "schedule": scheduler["beta_schedule"],
        "timesteps": scheduler["num_train_timesteps"],
        "grid": (folder / "grid.png").is_file(),
        "curriculum": (folder / "curriculum.safetensors").is_file(),
    }


def _ancestors(first: Ancestor | None) -> list[Ancestor]:
    line = []
    while first is not None:
        line.append(first)
        first = first.teacher
    return line


def _cell(value: object) -> str:
    """Text that cannot break out of a Markdown table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
