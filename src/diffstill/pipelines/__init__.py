"""The diffusers pipeline and components that travel inside exported model folders, and the texts written there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEADER = '''"""Sampling code of this model: a stock diffusers pipeline, written by diffstill {version} (Apache-2.0).

Load it with ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``; diffstill need not be installed.
"""
'''


def travelling_source(version: str) -> str:
    """The ``pipeline.py`` of an exported folder: what it needs of ``diffusion/`` and ``pipelines/pipeline.py`` in one.

    One file and not two, because diffusers (0.42) copies the custom code of every local folder into one shared module
    cache and re-executes only the pipeline itself: a second folder's ``from .guidance import ...`` would silently get
    the guidance of the folder that was loaded first. The formula keeps its single home in ``diffusion/guidance.py``.
    """
    files = ["diffusion/guidance.py", "diffusion/scale.py", "pipelines/pipeline.py"]
    return _in_one(files, _HEADER.format(version=version))


def component_source(module: str, version: str) -> str:
    """The text of a component's module (``guided_unet``, ``stochastic`` ...) as it lies beside its weights."""
    header = f"# Written by diffstill {version} (Apache-2.0).\n"
    return _in_one([*BEFORE[module], f"pipelines/{module}.py"], header)


BEFORE = {
    "guided_unet": ["diffusion/scale.py"],
    "encode": ["diffusion/prediction.py"],
    "stochastic": ["diffusion/prediction.py", "pipelines/all_steps.py"],
    "renoise": ["diffusion/prediction.py", "pipelines/all_steps.py"],
}
"""What a component's module stands on, of ours."""


def _in_one(files: Sequence[str], header: str) -> str:
    """Several of our files as one: their imports, sorted, then their bodies."""
    imports: dict[str, set[str]] = {}
    bodies = []
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        head = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in head:
            _collect(node, imports)
        bodies.append("\n".join(text.splitlines()[head[-1].end_lineno :]).strip("\n"))
    return "\n\n\n".join([header + "\n" + _written(imports), *bodies]) + "\n"


def _collect(node: ast.Import | ast.ImportFrom, imports: dict[str, set[str]]) -> None:
    """Adds an import to ``import os`` -> {} or ``from os`` -> names; our own modules and ``__future__`` stay behind."""
    if isinstance(node, ast.Import):
        imports.update({f"import {ast.unparse(alias)}": set() for alias in node.names})
    elif node.module and node.level == 0 and node.module != "__future__":
        imports.setdefault(f"from {node.module}", set()).update(alias.name for alias in node.names)


def _written(imports: dict[str, set[str]]) -> str:
    blocks: list[list[str]] = [[], []]
    for origin in sorted(imports, key=lambda origin: (origin.startswith("from"), origin)):
        foreign = origin.split()[1].split(".")[0] not in sys.stdlib_module_names
        names = ", ".join(sorted(imports[origin]))
        blocks[foreign].append(f"{origin} import {names}" if names else origin)
    return "\n\n".join("\n".join(block) for block in blocks)


__all__ = ["component_source", "travelling_source"]
