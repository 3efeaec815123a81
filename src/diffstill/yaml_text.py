"""Recipe text: YAML with the scalars of version 1.2, in which ``1e-3`` is a number, ``no`` and ``2026-11-28`` text."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML reads version 1.1; this takes the scalars of 1.2's core schema, and refuses keys that stand twice."""

    yaml_implicit_resolvers = {}  # of its own: none of SafeLoader's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is no text {key_node.start_mark}")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice {key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """``010`` is ten; ``0o10`` and ``0x10`` say their base."""
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


for tag, shape, first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
):
    for side in (_Loader, _Dumper):
        side.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(shape), first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def read_yaml(text: str) -> Any:
    """The value that ``text`` holds.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: text that is no YAML, a key twice, a key that is no text.
    """
    return yaml.load(text, Loader=_Loader)


def write_yaml(value: Any, *, sort_keys: bool = False) -> str:
    """Text from which ``read_yaml`` makes ``value`` again: mappings with text keys, lists and plain scalars."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=sort_keys, allow_unicode=True)
