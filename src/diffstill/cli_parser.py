"""argparse whose complaints are one line that names the argument, the value and the mend."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from .errors import InputError


class Parser(argparse.ArgumentParser):
    """One line for a wrong command line, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument (\S+): invalid (?:(\w+) value|choice): '(.*?)'.*", message, re.DOTALL)
        missing = message.partition(" required: ")[2]
        see = f"see {self.prog} --help"
        if named and named[1] == "COMMAND":
            known = self.choices("COMMAND")
            near = get_close_matches(named[3], known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            mend = f"use one of {', '.join(known)}, or --help"
            raise InputError("command", named[3], mend, problem=f"is unknown{hint}")
        if named:
            choices = f"use {', '.join(self.choices(named[1]))}"
            mend = {"int": "give a whole number", "float": "give a number"}.get(named[2] or "", choices)
            raise InputError(named[1].rpartition("/")[2].lstrip("-"), named[3], mend)
        if missing == "COMMAND":
            mend = f"use one of {', '.join(self.choices(missing))}, or --help"
            raise InputError("command", None, mend, problem="is missing")
        if missing:
            first = missing.split(", ")[0]
            told = ", ".join(self.choices(first)) or (action.help if (action := self.action(first)) else "")
            raise InputError(first, None, f"give {told}; {see}", problem="is missing")
        raise InputError("command line", message, see, problem="was not understood")

    def action(self, name: str) -> argparse.Action | None:
        """The argument that argparse's messages call so."""
        called = ((action, (action.metavar, action.dest, "/".join(action.option_strings))) for action in self._actions)
        return next((action for action, names in called if name in names), None)

    def choices(self, name: str) -> list[str]:
        action = self.action(name)
        return list(action.choices or ()) if action else []


def unknown_option(parser: Parser, arguments: argparse.Namespace, rest: Sequence[str]) -> InputError:
    """An option that a command does not have, with the one or the recipe's key that was meant."""
    word = next((word for word in rest if word.startswith("-")), rest[0])
    name, _, value = word.lstrip("-").partition("=")
    own = parser.action("COMMAND").choices[arguments.command]  # type: ignore[union-attr,index]
    near = get_close_matches(
        f"--{name}", [option for action in own._actions for option in action.option_strings], 1, 0.75
    )
    mend = f"did you mean {near[0]}? See {own.prog} --help" if near else f"see {own.prog} --help"
    if word == name:
        return InputError("command line", word, mend, problem="is a word too many")
    if hasattr(arguments, "overrides") and not near:
        from .engine.settings import TrainSettings

        key = name.replace("-", "_")
        section = "training." if key in TrainSettings.model_fields else ""
        given = value or next((other for other in rest[rest.index(word) + 1 :]), "VALUE")
        mend = f"settings of a recipe are written without dashes: {section}{key}={given}"
    return InputError("command line", word, mend, problem="is no option of this command")
