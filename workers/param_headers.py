"""Arguments of a tool that a client repeats in `Mcp-Param-*` headers (protocol 2026-07-28), for whoever routes by them.

A tool says so by `x-mcp-header` in its input schema. Who reads the body must refuse a call whose headers say something
else, or two readers of one request would be made to believe two things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

from ..pool import Message
from .answers import Refused
from .asgi import Headers
from .envelope import HEADER_MISMATCH, decoded, mismatch

ANNOTATION: Final = "x-mcp-header"
PREFIX: Final = "mcp-param-"
MAX_DIGITS: Final = 1000
"""Longer numbers are compared as text: Python refuses to read very long ones."""

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_DECIMAL: Final = re.compile(r"(-?[0-9]+)(?:\.0+)?")
_TYPES: Final = ("string", "integer", "boolean")

# The keywords of JSON Schema 2020-12 that hold schemas: one, a list of them, or a map.
_ONE: Final = (
    "items",
    "contains",
    "unevaluatedItems",
    "additionalProperties",
    "propertyNames",
    "unevaluatedProperties",
    "not",
    "if",
    "then",
    "else",
    "contentSchema",
)
_LIST: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAP: Final = ("patternProperties", "dependentSchemas", "$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Repeated:
    """One argument that has a header: where it is in the arguments, and the header's name in lower case."""

    path: tuple[str, ...]
    header: str
    is_integer: bool


def repeated_by_tool(tools: Any) -> dict[str, tuple[Repeated, ...]]:
    """The arguments with headers of each tool of a `tools/list` result; tools without any are not in it."""
    found: dict[str, tuple[Repeated, ...]] = {}
    for item in cast("list[Any]", tools) if isinstance(tools, list) else ():
        tool = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        name, repeated = tool.get("name"), repeated_in(tool.get("inputSchema"))
        if isinstance(name, str) and repeated:
            found[name] = repeated
    return found


def repeated_in(schema: Any) -> tuple[Repeated, ...]:
    """The arguments with headers of one input schema: none if any of its annotations breaks the rules, for clients
    do not offer such a tool."""
    found: dict[str, Repeated] = {}
    for path, position in _positions(schema):
        if ANNOTATION not in position:
            continue
        token, kind = position[ANNOTATION], position.get("type")
        if not path or not isinstance(token, str) or not _TOKEN.fullmatch(token) or kind not in _TYPES:
            return ()
        name = PREFIX + token.lower()
        if name in found:
            return ()
        found[name] = Repeated(path, name, kind == "integer")
    return tuple(found.values())


def may_repeat(message: Message, headers: Headers) -> bool:
    """Whether it matters which arguments of the called tool have headers: there are arguments, or such headers."""
    if message.method != "tools/call" or not isinstance(message.params.get("name"), str):
        return False
    arguments: Any = message.params.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        return False  # the server's to refuse
    return bool(cast("object", arguments)) or any(name.startswith(PREFIX.encode()) for name, _ in headers)


def check_params(message: Message, headers: Headers, repeated: tuple[Repeated, ...]) -> None:
    """Raise `Refused` (400, -32020) for a call whose headers do not say what its arguments say."""
    for each in repeated:
        name = each.header.encode()
        values = [value for key, value in headers if key == name]
        if len(values) > 1:
            told = f"Header mismatch: {each.header} appears more than once"
            raise Refused(400, told, code=HEADER_MISMATCH, id=message.id)
        argument = _at(message.params.get("arguments"), each.path)
        if _written(argument) is None and not values:
            continue
        if not values or not _says(values[0], argument, is_integer=each.is_integer):
            raise mismatch(each.header, f"the argument {'.'.join(each.path)}", message.id)


def _says(value: bytes, argument: Any, *, is_integer: bool) -> bool:
    said, written = decoded(value), _written(argument)
    if said is None or written is None:
        return False
    number = _DECIMAL.fullmatch(said) if is_integer and _is_whole(argument) else None
    if number is not None and len(number[1]) <= MAX_DIGITS:
        return int(number[1]) == int(argument)
    return said == written


def _written(argument: Any) -> str | None:
    """An argument as clients write it into a header; None for what has no such form."""
    if isinstance(argument, bool):
        return "true" if argument else "false"
    return str(argument) if isinstance(argument, str | int | float) else None


def _is_whole(argument: Any) -> bool:
    if isinstance(argument, float):
        return argument.is_integer()
    return isinstance(argument, int) and not isinstance(argument, bool)


def _at(arguments: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(arguments, dict):
            return None
        arguments = cast("dict[str, Any]", arguments).get(key)
    return arguments


def _positions(root: Any) -> Iterator[tuple[tuple[str, ...] | None, dict[str, Any]]]:
    """Every schema in a schema, with the names of the properties that lead to it; None where anything else does."""
    waiting: list[tuple[tuple[str, ...] | None, Any]] = [((), root)]
    while waiting:
        path, found = waiting.pop()
        if not isinstance(found, dict):
            continue
        schema = cast("dict[str, Any]", found)
        yield path, schema
        for name, inner in _members(schema.get("properties")).items():
            waiting.append((None if path is None else (*path, name), inner))
        waiting += [(None, schema[key]) for key in _ONE if key in schema]
        for key in _LIST:
            inner = schema.get(key)
            if isinstance(inner, list):
                waiting += [(None, each) for each in cast("list[Any]", inner)]
        for key in _MAP:
            waiting += [(None, each) for each in _members(schema.get(key)).values()]


def _members(found: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
