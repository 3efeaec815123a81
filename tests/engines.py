"""What the tests of the engine share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffstill.checks.bench import Bench
from diffstill.engine.log import read_log
from diffstill.methods.dash import Dash

CPU = torch.device("cpu")
DASH = Bench(Dash)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def losses(folder: Path, arm: str = "arm") -> list[tuple[int, float]]:
    return [(r["images"], r["loss"]) for r in read_log(folder / "log.jsonl") if "loss" in r and r["arm"] == arm]


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)
