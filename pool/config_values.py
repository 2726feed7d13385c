"""Values of a configuration: read from JSON, checked one by one, `${VAR}` expanded, and never shown.

Header values, environment values, arguments and URLs may hold credentials. So messages say what kind a wrong value is
of, and only keys, numbers and words of our own vocabulary are quoted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Final, cast

from .errors import ConfigError

VARIABLE: Final = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<bad>))")
PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_.$-]{1,64}")


class JsonObject(dict[str, object]):
    """A JSON object that remembers which of its keys were written twice: JSON lets the last one win silently."""

    repeated: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: list[tuple[str, object]]) -> JsonObject:
        made = cls(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            made.repeated = tuple(name for name in made if names.count(name) > 1)
        return made


def parse_json(text: str, source: str) -> object:
    def no_constant(name: str) -> object:
        raise ConfigError(f"{source}: expected JSON, {name} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=JsonObject.of, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1 : error.lineno]
        hint = " (JSON has no comments)" if line and line[0][error.colno - 1 :].startswith(("//", "/*", "#")) else ""
        where = f"{source}: line {error.lineno} column {error.colno}"
        raise ConfigError(f"{where}: expected JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets by the thousand
        raise ConfigError(f"{source}: expected JSON of a sensible size") from None


class Values:
    """Reads values, collecting problems and warnings. `path` says in messages where a value stands. A method that found
    a problem returns None, or what is left."""

    def __init__(self, source: str, environ: Mapping[str, str]) -> None:
        self.source = source
        self._environ = environ
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def problem(self, path: str, text: str) -> None:
        self.problems.append(f"{self.source}: {path}: {text}" if path else f"{self.source}: {text}")

    def warn(self, path: str, text: str) -> None:
        self.warnings.append(f"{self.source}: {path}: {text}")

    def count(self, path: str, options: JsonObject, key: str, *, least: int = 1) -> int | None:
        if key not in options:
            return None
        value = options[key]
        expected = f"expected an integer from {least} to 1000000"
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(path, f"{expected}, got {kind_of(value)}")
        elif not least <= value <= 1_000_000:
            self.problem(path, f"{expected}, got {_number(value)}")
        else:
            return value
        return None

    def seconds(self, path: str, value: object) -> float:
        expected = "expected seconds, from 0.1 to 604800"
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problem(path, f"{expected}, got {kind_of(value)}")
        elif not 0.1 <= value <= 604_800:
            self.problem(path, f"{expected}, got {_number(value)}")
        else:
            return float(value)
        return 0.0

    def names(self, path: str, value: object) -> list[str]:
        names: list[str] = []
        for i, item in enumerate(self.items(path, value) or []):
            if isinstance(item, str) and item:
                names.append(item)
            else:
                self.problem(f"{path}[{i}]", f"expected a name, got {kind_of(item)}")
        return names

    def items(self, path: str, value: object) -> list[object] | None:
        if isinstance(value, list):
            return cast(list[object], value)
        self.problem(path, f"expected a list of strings, got {kind_of(value)}")
        return None

    def strings(self, path: str, value: object) -> dict[str, str] | None:
        if not isinstance(value, JsonObject):
            self.problem(path, f"expected an object of strings, got {kind_of(value)}")
            return None
        for key in value.repeated:
            self.problem(f"{path}.{quoted(key)}", "expected once, found more than once")
        made: dict[str, str] = {}
        for key, item in value.items():
            text = self.string(f"{path}.{quoted(key)}", item, "a string", empty=True)
            if text is not None:
                made[key] = text
        return made

    def string(self, path: str, value: object, expected: str, *, empty: bool = False) -> str | None:
        if not isinstance(value, str):
            self.problem(path, f"expected {expected}, got {kind_of(value)}")
            return None
        text = self._expand(path, value)
        if text is None:
            return None
        if not text and not empty:
            self.problem(path, f"expected {expected}, got an empty string")
            return None
        # JSON can write both: one half of a surrogate pair, and a character that ends strings of the operating system.
        if any("\ud800" <= char <= "\udfff" or char == "\0" for char in text):
            self.problem(path, f"expected {expected} of Unicode text without NUL characters")
            return None
        return text

    def _expand(self, path: str, text: str) -> str | None:
        """Replace `${VAR}` and `${VAR:-default}`, once: values are not expanded again. `$${` is a plain `${`."""
        sound = True

        def replacement(match: re.Match[str]) -> str:
            nonlocal sound
            name, default = match["name"], match["default"]
            if match["bad"] is not None:
                sound = False
                # What follows is not shown: it may be the default, and the default may be a credential.
                self.problem(path, "expected ${VAR} or ${VAR:-default} after a $ (a plain ${ is written $${)")
            elif name is None:
                return "${"
            elif default is not None:
                return self._environ.get(name) or default  # as in a shell: an empty variable counts as unset
            elif name not in self._environ:
                sound = False
                self.problem(
                    path, f"expected the environment variable {name} to be set (or write ${{{name}:-default}})"
                )
            else:
                return self._environ[name]
            return ""

        expanded = VARIABLE.sub(replacement, text)
        return expanded if sound else None


def kind_of(value: object) -> str:
    """What a JSON value is, without showing it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case "":
            return "an empty string"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _number(value: float) -> str:
    return str(value) if abs(value) < 1e15 else "a number beyond all bounds"


def quoted(name: str) -> str:
    """A key as it stands in messages: on one line, of bounded length."""
    return name if PLAIN_KEY.fullmatch(name) else json.dumps(name[:64])


def did_you_mean(found: Mapping[str, object], known: tuple[str, ...]) -> str:
    for key in found:
        close = get_close_matches(key.lower(), [name.lower() for name in known], 1)
        if close:
            right = next(name for name in known if name.lower() == close[0])
            return f'; {quoted(key)}: did you mean "{right}"?'
    return ""
