"""Shared by all tests: one thread (two oversubscribed pools are far slower), a cache of our own, a tiny recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import TINY

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DIFFSTILL_CACHE")
    os.environ["DIFFSTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DIFFSTILL_CACHE"]
    else:
        os.environ["DIFFSTILL_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny ``diffstill distill`` run, made once by the command line itself."""
    from diffstill.cli import main

    out = tmp_path_factory.mktemp("tiny") / "run"
    assert main(["distill", "digits-dash", *TINY, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny text-to-image pipeline."""
    from tiny_sd import build_pipeline

    return build_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def tiny_subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two subjects, three images each."""
    from tiny_sd import build_subjects

    return build_subjects(tmp_path_factory.mktemp("subjects"))


@pytest.fixture(scope="session")
def tiny_subject(tiny_pipeline: Path, tiny_subjects: Path) -> list[str]:
    """The recipe of a text-to-image run of seconds, and its overrides."""
    from tiny_sd import overrides

    return overrides(tiny_pipeline, tiny_subjects)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with everything in it that one can have; not to be changed."""
    from folders import whole

    return whole(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
