"""The tables of few-shot runs against figures counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import few_shot_tables
import pytest
import result_files

STEP = {"median": 2.5, "low": 2.0, "high": 3.0}


def model(**seeds: list[float] | None) -> dict[str, Any]:
    return {"figures": {f"s=1 {name}": {"seeds": values} for name, values in seeds.items() if values is not None}}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One run of three seeds: no pixels of the single head, no student without target teacher."""
    models = {
        "source@3-renoise": model(fd=[10, 20, 40], fd_pixels=[4, 4, 4]),
        "finetune@3-renoise": model(fd=[5, 5, 5], fd_pixels=[1, 3, 3]),
        "three": model(fd=[4, 6, 4], fd_pixels=[1, 2, 3], memorised=[0.1, 0.2, 0.3], diversity_share=[0.5, 1.0, 1.5]),
        "single-head": model(fd=[5, 5, 5], memorised=[0.1, 0.3, 0.2], diversity_share=[1, 1, 1]),
        "finetune-then-dmd2": model(fd=[3, 7, 5], fd_pixels=[2, 2, 2], memorised=[0.2, 0.3, 0.4]),
    }
    models["unidad"] = models["three"]
    (tmp_path / "run.json").write_text(json.dumps({"models": models}), encoding="utf-8")
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    monkeypatch.setattr(few_shot_tables, "RESULTS", tmp_path)
    runs = {"its own name": ("run.json", 3, "unidad"), "another name": ("run.json", 3, "three")}
    monkeypatch.setattr(few_shot_tables, "RUNS", runs)
    return tmp_path


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines()[2:]]


def test_aims_are_shares_of_doing_nothing_seed_by_seed(results: Path) -> None:
    many, one, *other = rows(few_shot_tables.aims())
    assert many[2:] == ["0.27 (0.40, 0.30, 0.10)", "0.50 (0.25, 0.50, 0.75)", "2 · 1", "100 (50, 100, 150)"]
    assert one[1:] == ["one head", "0.29 (0.50, 0.25, 0.12)", "–", "0 · –", "100 (100, 100, 100)"], (
        "equal is not nearer"
    )
    assert [row[2:] for row in other] == [many[2:], one[2:]]


def test_duels_count_the_seeds_with_the_lower_figure(results: Path) -> None:
    (told,) = rows(few_shot_tables.duels())  # the run whose other ways are in other steps is left out
    assert told == ["its own name", "2 · 1 · 3", "2 · – · 1", "–"]


def test_whole_training_is_the_ratio_of_a_step_times_that_of_the_steps(results: Path) -> None:
    memory = {"median": 1.25, "low": 1.2, "high": 1.3}
    plain = {
        "step / plain": {"median": 1, "low": 1, "high": 1},
        "memory / plain": memory,
        "steps": 200,
        "peak_mb": 99.6,
    }
    dear = {"step / plain": STEP, "memory / plain": memory, "steps": 1000, "peak_mb": 65.4, "step_s": 7.0}
    (results / "few-shot-cost.json").write_text(json.dumps({"ways": {"dear": dear, "fine-tuning": plain}}))
    assert rows(few_shot_tables.cost()) == [
        ["fine-tuning", "1.00x [1.00, 1.00]", "1.0x", "1.25x [1.20, 1.30]", "100 MB"],
        ["dear", "2.50x [2.00, 3.00]", "12.5x", "1.25x [1.20, 1.30]", "65 MB"],
    ]
