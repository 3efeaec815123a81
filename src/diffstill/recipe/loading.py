"""From YAML text and dotted overrides to a typed recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ..errors import InputError
from ..yaml_text import read_yaml, write_yaml
from .chain import ChainRecipe
from .problems import nearest, one_line
from .schema import DistillRecipe, TrainRecipe

S = TypeVar("S", bound=BaseModel)
AnyRecipe = TrainRecipe | DistillRecipe | ChainRecipe
ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Annotated[AnyRecipe, Field(discriminator="kind")])
KINDS: dict[str, type[BaseModel]] = {"train": TrainRecipe, "distill": DistillRecipe, "chain": ChainRecipe}


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that travel with the package."""
    room = resources.files("diffstill") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(room.iterdir(), key=lambda e: e.name.removesuffix(".yaml"))
        if entry.name.endswith(".yaml")
    }


def load_recipe(name: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> AnyRecipe:
    """A recipe by built-in name or YAML path, with ``extends`` resolved and dotted overrides applied.

    Args:
        overrides: ``["training.lr=1e-3", ...]`` (values are YAML) or a mapping of dotted keys.

    Raises:
        InputError: whatever is wrong, in one line that names the field, the value and the mend.
    """
    tree = _tree(name, ())
    pairs = _flat(overrides) if isinstance(overrides, Mapping) else [_split(item) for item in overrides]
    _check_stages(tree, pairs)
    for key, value in sorted(pairs, key=lambda pair: not _switches(pair[0])):  # what starts a section anew goes first
        _put(tree, key, value)
    return parse_recipe(tree)


def _check_stages(tree: Mapping[str, Any], pairs: Sequence[tuple[str, Any]]) -> None:
    """An override may add a stage, with its recipe or model; one that does not, or leaves it out, is misspelt."""
    known, given = tree.get("stages"), {key for key, _ in pairs}
    if not isinstance(known, dict):
        return
    for key, value in pairs:
        first, _, rest = key.partition(".")
        name, _, part = rest.partition(".")
        new = {f"stages.{name}.recipe", f"stages.{name}.model"} & given
        if first == "stages" and (part or value is None) and name not in known and not new:
            hint = nearest(name, known)
            raise InputError.about(f"stages.{name}", f"no such stage{hint}; one of {', '.join(known)}")


def parse_recipe(tree: Mapping[str, Any]) -> AnyRecipe:
    """A recipe from a plain mapping (``extends`` already resolved)."""
    if tree.get("kind") not in KINDS:
        raise InputError("kind", tree.get("kind"), f"use {', '.join(KINDS)}")
    try:
        return ADAPTER.validate_python(dict(tree))
    except ValidationError as error:
        raise one_line(error, KINDS) from None


def override_section(section: S, overrides: Sequence[str], field: str) -> S:
    """A section with ``key=value`` overrides applied.

    Raises:
        InputError: unknown keys or values that do not fit, named as ``field.key``.
    """
    tree = section.model_dump()
    for item in overrides:
        _put(tree, *_split(item))
    return section_of(type(section), tree, field)


def section_of(kind: type[S], tree: Any, field: str) -> S:
    """One section of a stored recipe.

    Raises:
        InputError: unknown keys or values that do not fit, named as ``field.key``.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise one_line(error, kind, (field,)) from None


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain JSON-able data, defaults included."""
    return recipe.model_dump(mode="json")


PLACES = {
    "data": ("source", "train", "test"),
    "teacher": ("model", "pipeline", "recipe", "overrides"),
}
"""Keys of sections that say where things are, which a run folder knows by their contents."""


def without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what depends on where its inputs lie, or on how their path is spelt."""
    kept = {key: value for key, value in recipe.items() if key != "roles"}  # all of them are places
    for section, keys in PLACES.items():
        if isinstance(kept.get(section), Mapping):
            kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    return kept


def to_yaml(recipe: BaseModel) -> str:
    return write_yaml(resolved(recipe))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as ``key: old -> new``."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def _tree(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise InputError("extends", " -> ".join((*seen, name)), "remove the circle", problem="goes in a circle")
    builtin = builtin_recipes()
    path = Path(name)
    if name in builtin:
        text, where = builtin[name], name
    elif path.suffix in (".yaml", ".yml") or path.exists():
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("recipe", name, f"give a readable YAML file ({error})", problem="cannot be read") from None
    else:
        near = get_close_matches(name, list(builtin), 3, 0.8)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        mend = "see diffstill list recipes, or give a YAML path"
        raise InputError("recipe", name, mend, problem=f"is not known{hint}")
    try:
        tree = read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("recipe", where, " ".join(str(error).split()), problem="is no valid YAML") from None
    if not isinstance(tree, dict):
        raise InputError("recipe", where, "write key: value lines", problem="holds no mapping")
    teacher = tree.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("recipe"), str) and teacher["recipe"] not in builtin:
        beside = path.parent / teacher["recipe"]
        teacher["recipe"] = str(beside) if beside.exists() else teacher["recipe"]
    stages = tree.get("stages")
    for stage in stages.values() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and isinstance(stage.get("recipe"), str) and stage["recipe"] not in builtin:
            beside = path.parent / stage["recipe"]
            stage["recipe"] = str(beside) if beside.exists() else stage["recipe"]
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise InputError("extends", parent, "give one recipe name or path")
    if parent not in builtin and not Path(parent).is_absolute():
        beside = path.parent / parent
        parent = str(beside) if beside.exists() else parent
    return _merge(_tree(parent, (*seen, name)), tree)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``; mappings merge, but a changed method or network family starts its section anew."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            anew = any(k in value and value[k] != old.get(k) for k in _SWITCHED.get(key, ()))
            merged[key] = dict(value) if anew else _merge(old, value)
        else:
            merged[key] = value
    return merged


_SWITCHED = {
    "method": ("name",),
    "student": ("family",),
    "network": ("family",),
    "teacher": ("model", "recipe", "pipeline"),
}
"""Keys by whose change a section starts anew."""


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys of a nested mapping, so that ``{training: {images: 640}}`` changes one key and keeps the section."""
    found: list[tuple[str, Any]] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _split(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError("override", item, "write key=value, e.g. training.lr=1e-3")
    try:
        return key, read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(key, text, "write the value as YAML: 3, true, [1, 2]", problem="is no valid YAML") from None


def _switches(key: str) -> bool:
    parents, _, last = key.rpartition(".")
    return last in _SWITCHED.get(parents.rpartition(".")[2], ())


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif not isinstance(child, dict):
            raise InputError(key, value, f"{part} is no section", problem="cannot be set")
        else:
            child = node[part] = dict(child)
        node = child
    if parents and last in _SWITCHED.get(parents[-1], ()) and node.get(last) != value:
        node.clear()  # another method or family has other options, another source of the teacher leaves the first
    node[last] = value
