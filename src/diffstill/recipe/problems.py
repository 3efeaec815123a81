"""Pydantic's findings as one line that names the field, the value and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import InputError

Models = type[BaseModel] | Mapping[str, type[BaseModel]]


def nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(error: ValidationError, model: Models | None = None, within: tuple[str, ...] = ()) -> InputError:
    """The first problem of a pydantic error as field, value, mend.

    Args:
        model: what was validated (by tag, where it is a tagged union); tells the known keys beside an unknown one.
        within: where the model stands in the recipe, put before the field.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    loc = [str(part) for part in first["loc"]]
    if isinstance(model, Mapping):  # the tag of the union is no key of the recipe
        loc = loc[1:] if loc and loc[0] in model else loc
    place = [*within, *loc]
    field = ".".join(place) or "recipe"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _siblings(model, [str(part) for part in first["loc"]])
        near = difflib.get_close_matches(place[-1], known, 1)
        mend = f"rename it to {near[0]}, or remove it" if near else "remove it"
        mend += f"; known here: {', '.join(known)}" if known else ""
        return InputError(field, first["input"], mend + more, problem="is no known key")
    if first["type"] == "missing":
        return InputError(field, None, f"add it to the recipe{more}", problem="is missing")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        # Found by a check over the whole section, which says itself what does not fit.
        return InputError.about(field, message + more)
    return InputError(field, first["input"], message + more)


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
