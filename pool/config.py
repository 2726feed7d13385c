"""The configuration: what the `mcpServers` JSON says, checked once and turned into upstreams.

People already have this file, written for some client, so keys of other clients are tolerated (and listed as warnings),
while everything under our own `leasehold` key is strict: a typing error there would silently change a limit.

All problems of a file are collected and reported at once, one line each: file, key, expected value. How a single value
is read, and what of it may be shown, is `config_values.py`'s.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Final, get_args
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from .config_oauth import check_oauth_fits, read_oauth
from .config_values import JsonObject, Values, did_you_mean, kind_of, parse_json, quoted
from .errors import ConfigError
from .health import METHODS
from .upstream import Affinity, Config, HttpTarget, SseTarget, StdioTarget, Target, Transport, Upstream

# Clients spell the same transports in many ways ("streamable-http", "streamableHttp", "streamable_http").
TYPES: Final[Mapping[str, Transport]] = {"http": "http", "streamablehttp": "http", "sse": "sse", "stdio": "stdio"}

OPTIONS: Final = (
    "affinity",
    "max_sessions",
    "max_sessions_per_principal",
    "idle_ttl",
    "max_age",
    "min_sessions",
    "health_check",
    "health_check_interval",
    "health_check_timeout",
    "call_timeout",
    "idempotent_tools",
    "forward_headers",
    "oauth",
)
COMMON_KEYS: Final = frozenset({"type", "transport", "leasehold", "disabled"})
KEYS_OF: Final[Mapping[Transport, tuple[str, ...]]] = {
    "http": ("url", "headers"),
    "sse": ("url", "headers"),
    "stdio": ("command", "args", "env", "cwd"),
}

LINK_HEADERS: Final = frozenset(
    {
        "accept",
        "connection",
        "content-length",
        "content-type",
        "host",
        "keep-alive",
        "last-event-id",
        "mcp-protocol-version",
        "mcp-session-id",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers the link sets or relays by itself."""

SERVER_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check a configuration file. Raises `ConfigError`."""
    source = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{source}: expected a configuration file, found nothing of that name") from None
    except IsADirectoryError:
        raise ConfigError(f"{source}: expected a file, found a directory") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: expected UTF-8 text, byte {error.start} is none") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{source}: cannot be read: {reason}") from None
    return parse_config(text, source, environ)


def parse_config(text: str, source: str, environ: Mapping[str, str]) -> Config:
    """Check a configuration; `source` names it in messages. Raises `ConfigError` with every problem, one a line."""
    reader = _Reader(source, environ)
    servers: dict[str, Upstream] = {}
    disabled: list[str] = []
    for name, path, entry in reader.entries(parse_json(text, source)):
        if reader.is_disabled(path, entry):
            disabled.append(name)
        elif (upstream := reader.upstream(name, path, entry)) is not None:
            servers[name] = upstream
    if not servers and not reader.problems:
        reader.problem(reader.root, "expected at least one server" + (", all are disabled" if disabled else ""))
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return Config(source, MappingProxyType(servers), tuple(disabled), tuple(reader.warnings))


class _Reader(Values):
    """Walks the servers of a file."""

    root = "mcpServers"

    # The file

    def entries(self, document: object) -> list[tuple[str, str, JsonObject]]:
        """The servers of a file: name, path for messages, object."""
        if not isinstance(document, JsonObject):
            self.problem("", f'expected an object with the key "mcpServers", got {kind_of(document)}')
            return []
        roots = [key for key in ("mcpServers", "servers") if key in document]
        if len(roots) != 1:
            expected = 'expected an object with the key "mcpServers" (or "servers")'
            found = "both" if roots else "neither" + did_you_mean(document, ("mcpServers", "servers"))
            self.problem("", f"{expected}, found {found}")
            return []
        self.root = roots[0]
        for key in document:
            if key != self.root:
                self.warn(quoted(key), "not used")
        servers = document[self.root]
        if self.root in document.repeated:
            self.problem(self.root, "expected once, found more than once")
        if not isinstance(servers, JsonObject):
            self.problem(self.root, f"expected an object of servers, got {kind_of(servers)}")
            return []
        found_entries: list[tuple[str, str, JsonObject]] = []
        for name, entry in servers.items():
            path = f"{self.root}.{quoted(name)}"
            if name in servers.repeated:
                self.problem(path, "expected once, found more than once")
            # `..` would be taken out of the endpoint's path by every client.
            if not SERVER_NAME.fullmatch(name) or not name.strip("."):
                self.problem(path, "expected a name of 1 to 64 characters out of A-Z a-z 0-9 _ . -, not dots alone")
            elif not isinstance(entry, JsonObject):
                self.problem(path, f"expected an object, got {kind_of(entry)}")
            else:
                found_entries.append((name, path, entry))
        return found_entries

    def is_disabled(self, path: str, entry: JsonObject) -> bool:
        disabled = entry.get("disabled", False)
        if not isinstance(disabled, bool):
            self.problem(f"{path}.disabled", f"expected true or false, got {kind_of(disabled)}")
        return disabled is True

    # One server

    def upstream(self, name: str, path: str, entry: JsonObject) -> Upstream | None:
        before = len(self.problems)
        for key in entry.repeated:
            self.problem(f"{path}.{quoted(key)}", "expected once, found more than once")
        transport = self._transport(path, entry)
        if transport is None:
            return None
        for key in entry:
            if key in COMMON_KEYS or key in KEYS_OF[transport]:
                continue
            if any(key in keys for keys in KEYS_OF.values()):
                self.problem(f"{path}.{key}", f"expected only with another type of server, this one is {transport}")
            else:
                self.warn(f"{path}.{quoted(key)}", "not used")
        target = self._stdio(path, entry) if transport == "stdio" else self._web(path, entry, transport)
        made = self._options(name, path, entry.get("leasehold", JsonObject()), target)
        return made if len(self.problems) == before else None

    def _transport(self, path: str, entry: JsonObject) -> Transport | None:
        key = "transport" if "transport" in entry and "type" not in entry else "type"
        if key not in entry:
            if ("url" in entry) == ("command" in entry):
                self.problem(
                    path, 'expected either "url" or "command", found ' + ("both" if "url" in entry else "neither")
                )
                return None
            return "http" if "url" in entry else "stdio"
        value = entry[key]
        path = f"{path}.{key}"
        expected = 'expected "http", "streamable-http", "sse" or "stdio"'
        if not isinstance(value, str):
            self.problem(path, f"{expected}, got {kind_of(value)}")
            return None
        known = TYPES.get(value.lower().replace("-", "").replace("_", ""))
        if known is None:
            self.problem(path, f"{expected}, got {quoted(value)}")
        return known

    def _web(self, path: str, entry: JsonObject, transport: Transport) -> HttpTarget | SseTarget | None:
        url = self.string(f"{path}.url", entry.get("url"), "an http:// or https:// URL")
        headers = self._headers(f"{path}.headers", entry.get("headers", JsonObject()))
        parts = None if url is None else self._url(f"{path}.url", url)
        if parts is None or headers is None:
            return None
        if "@" in parts.netloc:
            # Out of the URL, so that no log line of any layer below can show it.
            userinfo, _, place = parts.netloc.rpartition("@")
            parts = parts._replace(netloc=place)
            if "authorization" in headers:
                self.problem(f"{path}.url", "expected no user and password beside an Authorization header")
            headers["authorization"] = "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()
        made = SseTarget if transport == "sse" else HttpTarget
        return made(urlunsplit(parts), tuple(headers.items()))

    def _url(self, path: str, url: str) -> SplitResult | None:
        expected = "expected an http:// or https:// URL"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            self.problem(path, f"{expected} with a valid host and port")
            return None
        if parts.scheme not in ("http", "https"):
            self.problem(path, expected)
        elif not parts.hostname or port == 0:
            self.problem(path, f"{expected} with a valid host and port")
        elif any(char.isspace() or not char.isprintable() for char in url):
            self.problem(path, f"{expected} without spaces and control characters")
        elif parts.fragment:
            self.problem(path, f'{expected} without a fragment ("#...")')
        else:
            return parts
        return None

    def _headers(self, path: str, value: object) -> dict[str, str] | None:
        pairs = self.strings(path, value)
        if pairs is None:
            return None
        headers: dict[str, str] = {}
        for name, text in pairs.items():
            key = name.lower()
            where = f"{path}.{quoted(name)}"
            if not HEADER_NAME.fullmatch(name):
                self.problem(where, "expected the name of an HTTP header")
            elif key in LINK_HEADERS:
                self.warn(where, "not used: Leasehold sets this header itself")
            elif key in headers:
                self.problem(where, "expected once, found more than once (case does not matter)")
            elif CONTROL.search(text):
                self.problem(where, "expected a value without line breaks and control characters")
            else:
                headers[key] = text.strip(" \t")
        return headers

    def _stdio(self, path: str, entry: JsonObject) -> StdioTarget | None:
        command = self.string(f"{path}.command", entry.get("command"), "the command to start")
        args = self.items(f"{path}.args", entry.get("args", []))
        env = self.strings(f"{path}.env", entry.get("env", JsonObject()))
        cwd = None
        if entry.get("cwd") is not None:
            cwd = self.string(f"{path}.cwd", entry["cwd"], "the path of a directory")
        if args is None or env is None:
            return None
        expanded = [self.string(f"{path}.args[{i}]", arg, "a string", empty=True) for i, arg in enumerate(args)]
        for name in env:
            if not name or "=" in name or not name.isprintable():
                self.problem(f"{path}.env.{quoted(name)}", "expected the name of an environment variable")
        if command is None:
            return None
        return StdioTarget(command, tuple(arg for arg in expanded if arg is not None), MappingProxyType(env), cwd)

    # The `leasehold` object

    def _options(self, name: str, path: str, value: object, target: Target | None) -> Upstream | None:
        path = f"{path}.leasehold"
        if not isinstance(value, JsonObject):
            self.problem(path, f"expected an object, got {kind_of(value)}")
            return None
        for key in value.repeated:
            self.problem(f"{path}.{quoted(key)}", "expected once, found more than once")
        for key in value:
            if key not in OPTIONS:
                close = get_close_matches(key, OPTIONS, 1)
                known = f'did you mean "{close[0]}"?' if close else "known are " + ", ".join(OPTIONS)
                self.problem(f"{path}.{quoted(key)}", f"expected no such key; {known}")
        # One placeholder where the target is wrong: the problems of the options are still to be found.
        limits = Upstream(name, StdioTarget("") if target is None else target)
        made = Upstream(
            name=name,
            target=limits.target,
            affinity=self._affinity(f"{path}.affinity", value.get("affinity", limits.affinity)),
            max_sessions=self.count(f"{path}.max_sessions", value, "max_sessions") or limits.max_sessions,
            max_sessions_per_principal=self.count(
                f"{path}.max_sessions_per_principal", value, "max_sessions_per_principal"
            ),
            idle_ttl_s=self.seconds(f"{path}.idle_ttl", value.get("idle_ttl", limits.idle_ttl_s)),
            call_timeout_s=self.seconds(f"{path}.call_timeout", value.get("call_timeout", limits.call_timeout_s)),
            idempotent_tools=frozenset(self.names(f"{path}.idempotent_tools", value.get("idempotent_tools", []))),
            forward_headers=frozenset(
                name.lower() for name in self.names(f"{path}.forward_headers", value.get("forward_headers", []))
            ),
            health_check=self._health_check(f"{path}.health_check", value.get("health_check", [*limits.health_check])),
            health_check_interval_s=self.seconds(
                f"{path}.health_check_interval", value.get("health_check_interval", limits.health_check_interval_s)
            ),
            health_check_timeout_s=self.seconds(
                f"{path}.health_check_timeout", value.get("health_check_timeout", limits.health_check_timeout_s)
            ),
            max_age_s=self.seconds(f"{path}.max_age", value["max_age"]) if "max_age" in value else limits.max_age_s,
            min_sessions=self.count(f"{path}.min_sessions", value, "min_sessions", least=0) or limits.min_sessions,
            oauth=read_oauth(self, f"{path}.oauth", value["oauth"], self._url) if "oauth" in value else None,
        )
        if "oauth" in value:
            check_oauth_fits(self, f"{path}.oauth", target, made.forward_headers)
        for header in sorted(made.forward_headers):
            where = f"{path}.forward_headers"
            if not HEADER_NAME.fullmatch(header):
                self.problem(where, f"expected names of HTTP headers, got {quoted(header)}")
            elif header in LINK_HEADERS:
                self.problem(where, f'expected no "{header}": Leasehold sets this header itself')
        if made.forward_headers and isinstance(target, StdioTarget):
            self.problem(f"{path}.forward_headers", "expected only with http or sse, this server is stdio")
        if (made.max_sessions_per_principal or 0) > made.max_sessions:
            where = f"{path}.max_sessions_per_principal"
            self.problem(where, f"expected at most max_sessions, which is {made.max_sessions}")
        if made.min_sessions > made.max_sessions:
            self.problem(f"{path}.min_sessions", f"expected at most max_sessions, which is {made.max_sessions}")
        return made

    def _health_check(self, path: str, value: object) -> tuple[str, ...]:
        words = ", ".join(f'"{word}"' for word in METHODS)
        steps = self.names(path, value)
        for i, step in enumerate(steps):
            if step not in METHODS:
                self.problem(f"{path}[{i}]", f"expected one of {words}, got {quoted(step)}")
            elif step == "skip" and i + 1 < len(steps):
                self.problem(f"{path}[{i}]", 'expected "skip" only as the last one: nothing is asked after it')
        if value == []:
            self.problem(path, f"expected at least one of {words}")
        return tuple(steps)

    def _affinity(self, path: str, value: object) -> Affinity:
        for affinity in get_args(Affinity):
            if value == affinity:
                return affinity
        words = ", ".join(f'"{word}"' for word in get_args(Affinity))
        got = quoted(value) if isinstance(value, str) else kind_of(value)
        self.problem(path, f"expected one of {words}, got {got}")
        return "session"
