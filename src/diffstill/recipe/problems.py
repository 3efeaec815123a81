"""Pydantic's findings as one line that names the field, the value and the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import InputError

Models = type[BaseModel] | Mapping[str, type[BaseModel]]


def nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


class Within(ValueError):
    """A finding of an inner section, whose message begins with the field as that section calls it."""


ALIASES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epochs": "images (training is counted in images)",
    "steps": "images (training is counted in images, batch_size a step)",
    "iterations": "images (training is counted in images, batch_size a step)",
}
"""What other programs call a key -> what it is called here."""
WORDS = {
    "int": "give a whole number",
    "float": "give a number",
    "finite": "give a finite number",
    "bool": "use true or false",
    "string": "give text",
    "tuple": "give a list, e.g. [1, 2]",
    "list": "give a list, e.g. [1, 2]",
    "dict": "give a section of its own, key: value",
    "model": "give a section of its own, key: value",
}
"""The beginning of pydantic's type of error -> the mend."""
LIMITS = {
    "greater_than": "use a number above {gt:g}",
    "greater_than_equal": "use {ge:g} or more",
    "less_than": "use a number below {lt:g}",
    "less_than_equal": "use {le:g} or less",
    "too_short": "give {min_length} or more",
    "too_long": "give {max_length} at most",
    "string_pattern_mismatch": "begin with a letter or digit, and use letters, digits, . _ - alone",
}
TAG = re.compile(r"(int|float|str|bool|none)$|(literal|tuple|list|dict)\[|(function|constrained)-")
"""Pydantic's names of a union's members, which are no keys."""


def one_line(error: ValidationError, model: Models | None = None, within: tuple[str, ...] = ()) -> InputError:
    """The first problem of a pydantic error as field, value, mend.

    Args:
        model: what was validated (by tag, where it is a tagged union); tells the known keys beside an unknown one.
        within: where the model stands in the recipe, put before the field.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    place = [*within, *_keys(first, model)]
    field = ".".join(place) or "recipe"
    # A union finds fault with the value once for each of its members.
    same = [p for p in problems if _keys(p, model) == _keys(first, model)]
    others = {tuple(_keys(p, model)) for p in problems if not _begins(_keys(p, model), _keys(first, model))}
    more = f" (and {len(others)} more)" if others else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _siblings(model, [str(part) for part in first["loc"]])
        near = [ALIASES[place[-1]]] if ALIASES.get(place[-1], "").split(" ")[0] in known else []
        near = near or difflib.get_close_matches(place[-1], known, 1)
        mend = f"rename it to {near[0]}, or remove it" if near else "remove it"
        mend += f"; known here: {', '.join(known)}" if known else ""
        if isinstance(first["input"], dict):
            return InputError.about(field, f"is no known key; {mend}{more}")
        return InputError(field, first["input"], mend + more, problem="is no known key")
    if first["type"] == "missing":
        return InputError(field, None, f"add it to the recipe{more}", problem="is missing")
    if first["type"] == "value_error" and isinstance(first["ctx"]["error"], Within):
        return InputError.about(f"{field}.{message.partition(': ')[0]}", message.partition(": ")[2] + more)
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        # Found by a check over the whole section, which says itself what does not fit.
        return InputError.about(field, message + more)
    return InputError(field, first["input"], ", or ".join(dict.fromkeys(map(_mend, same))) + more)


def _mend(problem: ErrorDetails) -> str:
    kind, ctx = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        choices = str(ctx["expected"]).replace("'", "").replace("True", "true").replace("False", "false")
        return f"use {choices}"
    if kind in LIMITS:
        return LIMITS[kind].format(**ctx)
    return WORDS.get(kind.split("_")[0], problem["msg"].removeprefix("Value error, "))


def _keys(problem: ErrorDetails, model: Models | None) -> list[str]:
    """Where a problem lies, without what is no key of the recipe: the tag of a tagged union, a union's members."""
    loc = [str(part) for part in problem["loc"]]
    if isinstance(model, Mapping) and loc and loc[0] in model:
        loc = loc[1:]
    return [part for part in loc if not TAG.match(part)]


def _begins(keys: list[str], start: list[str]) -> bool:
    return keys[: len(start)] == start


def _siblings(model: Models | None, loc: list[str]) -> list[str]:
    """The known keys of the section that holds the unknown key at ``loc``."""
    if isinstance(model, Mapping):
        model, loc = model.get(loc[0]), loc[1:]
    found: Any = model
    for part in loc[:-1]:
        field = found.model_fields.get(part) if _is_model(found) else None
        found = field.annotation if field else None
    return list(found.model_fields) if _is_model(found) else []


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
