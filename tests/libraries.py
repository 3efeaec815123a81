"""Independent implementations to compare with, from packages whose own imports need a torchvision that is not here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffstill.evaluation.inception import bare_package


def torchmetrics(name: str) -> ModuleType:
    """A module of torchmetrics, which imports torch-fidelity where that is installed, and so torchvision."""
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed")
    with bare_package("torch_fidelity") if importlib.util.find_spec("torch_fidelity") else nullcontext():
        return importlib.import_module(f"torchmetrics.{name}")


def torch_fidelity(name: str) -> ModuleType:
    """A module of torch-fidelity with what it defines and the helpers it imports, without its other imports."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("torch-fidelity is not installed")
    path = Path(spec.submodule_search_locations[0]) / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    with bare_package("torch_fidelity"):
        helpers: dict[str, Any] = vars(importlib.import_module("torch_fidelity.helpers"))
    module = ModuleType(name)
    vars(module).update({key: helpers[key] for key in ("get_kwarg", "vassert", "vprint")}, np=np, torch=torch)
    exec(compile(tree, str(path), "exec"), vars(module))
    return module
