"""300 mutated recipes and command lines: each runs (dry) or ends with exit code 2 and one line; never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffstill.cli import main
from diffstill.recipe import builtin_recipes

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5000),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from(["", "dash", "tag", "cosine", "folder:nowhere", "digits", "1e-3", "no such thing", "ü", "a" * 300]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from(["name", "x"]), SCALARS))


def paths(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


@st.composite
def mutated_recipes(draw: st.DrawFn, names: tuple[str, ...] = ("digits-teacher", "digits-dash")) -> str:
    """YAML of a built-in digits recipe with keys replaced, removed, renamed or added, or the text itself torn."""
    name = draw(st.sampled_from(names))
    tree = yaml.safe_load(builtin_recipes()[name])
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(paths(tree)))
        node = tree
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            continue
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if action == "replace":
            node[last] = draw(VALUES)
        elif action == "remove":
            del node[last]
        elif action == "rename":
            node[last[:-1] or "x"] = node.pop(last)
        else:
            node[draw(st.sampled_from(["extra", "extends", "name", "steps"]))] = draw(VALUES)
    text = yaml.safe_dump(tree, allow_unicode=True)
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(st.sampled_from(["", ": :", "\t", "{", "&a *a", "\0", "- "])) + text[cut:]
    return text


WORDS = st.sampled_from(
    [
        "train", "distill", "arena", "list", "check", "sample", "eval", "report", "digits-teacher", "digits-dash",
        "--dry-run", "--seeds", "0", "-1", "--methods", "dash,,gap", "--out", "--json", "--guidance", "tag:", "recipes",
        "training.lr=", "=", "a=b", "training.images=1e9", "seed=2", "data.limit=0", "student=", "method.name=gap",
        "teacher.model=.", "--frobnicate", "..", "%s", "method={name: dash}", "training={}", "data=digits",
    ]
)  # fmt: skip


def ends_well(command: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as stop:  # --help and --version
            code = stop.code if isinstance(stop.code, int) else 1
    if code == 0:
        return
    told = err.getvalue()
    assert code == 2, (command, told)
    assert told.startswith("diffstill: "), told
    assert told.count("\n") == 1, told
    assert "Traceback" not in told
    assert len(told) < 1500, told


def in_a_new_folder(command: list[str], recipe: str | None) -> None:
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            if recipe is not None:
                Path("recipe.yaml").write_text(recipe, encoding="utf-8")
            before = sorted(Path(folder).rglob("*"))
            ends_well(command)
            assert sorted(Path(folder).rglob("*")) == before, "a dry run or bad input must write nothing"
        finally:
            os.chdir(home)


def check_recipe(text: str) -> None:
    kind = next((kind for kind in ("distill", "chain") if f"kind: {kind}" in text), "train")
    in_a_new_folder([kind, "recipe.yaml", "--dry-run"], text)


def check_command(words: list[str]) -> None:
    # Only words that cannot start a real training: the point is the parsing.
    if any(word in words for word in ("train", "distill", "arena")) and "--dry-run" not in words:
        words = [*words, "--dry-run"]
    in_a_new_folder(words, None)


FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FEW
@given(mutated_recipes())
def test_mutated_recipes(text: str) -> None:
    check_recipe(text)


@FEW
@given(st.lists(WORDS, max_size=6))
def test_mutated_command_lines(words: list[str]) -> None:
    check_command(words)


@pytest.mark.slow
@FEW
@given(mutated_recipes(("digits-guided", "digits-progressive", "digits-encoder", "digits-sfddm", "cascade-digits")))
def test_40_mutated_recipes_of_few_steps(text: str) -> None:
    check_recipe(text)


@pytest.mark.slow
@FEW
@given(mutated_recipes(("digits-unidad", "digits-dmd2", "digits-finetune", "few-shot-digits-3", "subject-sd15")))
def test_40_mutated_recipes_of_few_images(text: str) -> None:
    check_recipe(text)


@pytest.mark.slow
@MANY
@given(mutated_recipes())
def test_150_mutated_recipes(text: str) -> None:
    check_recipe(text)


@pytest.mark.slow
@MANY
@given(st.lists(WORDS, max_size=8))
def test_150_mutated_command_lines(words: list[str]) -> None:
    check_command(words)
