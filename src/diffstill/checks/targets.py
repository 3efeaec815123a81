"""What the user named: a method, a class in a file of theirs, or a model."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..errors import InputError
from ..methods import METHODS, Method


def find_method(target: str) -> type[Method]:
    """A method by name or as ``path/to/file.py:Class``. The file named is run, as ``python file.py`` would.

    Raises:
        InputError: an unknown name, or a file or class that is not there or is no method.
    """
    file, colon, name = target.rpartition(":")
    if colon and file.endswith(".py"):
        return _class_of(_module(file), name, target)
    if target.endswith(".py"):
        found = ", ".join(_methods_in(_module(target))) or "MyMethod"
        raise InputError("target", target, f"name the class, too: {target}:{found}", problem="names no class")
    if target in METHODS:
        return METHODS[target]
    close = difflib.get_close_matches(target, list(METHODS), 1)
    nearest = f" (did you mean {close[0]}?)" if close else ""
    mend = f"give one of {', '.join(METHODS)}, or file.py:Class, or a model folder"
    raise InputError("target", target, mend, problem=f"is no method{nearest}")


def _module(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError("target", file, "give the path of your method's file", problem="does not exist")
    name = f"diffstill_user_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError("target", file, "give a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves annotations by way of it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        raise InputError(
            "target", file, f"mend the file: {type(error).__name__}: {error}", problem="cannot be imported"
        ) from error
    return module


def _methods_in(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]


def _class_of(module: ModuleType, name: str, target: str) -> type[Method]:
    value = getattr(module, name, None)
    if not isinstance(value, type):
        found = ", ".join(_methods_in(module)) or "no subclass of Method"
        raise InputError("target", target, f"the file has {found}", problem=f"has no class {name!r}")
    if not issubclass(value, Method):
        raise InputError("target", target, "derive it from diffstill.methods.Method", problem="is no method")
    return value
