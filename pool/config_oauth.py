"""The `oauth` option of a server: how its tokens are got."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Final
from urllib.parse import SplitResult

from .config_values import JsonObject, Values, kind_of, quoted
from .upstream import OAuth, StdioTarget, Target

KEYS: Final = ("client_id", "client_secret", "scope", "issuer", "token_url")
SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+( [\x21\x23-\x5b\x5d-\x7e]+)*")

CheckUrl = Callable[[str, str], SplitResult | None]


def read_oauth(values: Values, path: str, value: object, check_url: CheckUrl) -> OAuth | None:
    """The option's value; None where there is a problem with it."""
    if not isinstance(value, JsonObject):
        values.problem(path, f"expected an object, got {kind_of(value)}")
        return None
    before = len(values.problems)
    for key in value.repeated:
        values.problem(f"{path}.{quoted(key)}", "expected once, found more than once")
    for key in value:
        if key not in KEYS:
            close = get_close_matches(key, KEYS, 1)
            known = f'did you mean "{close[0]}"?' if close else "known are " + ", ".join(KEYS)
            values.problem(f"{path}.{quoted(key)}", f"expected no such key; {known}")
    read = {key: values.string(f"{path}.{key}", value[key], "a string") for key in KEYS if key in value}
    for key in ("client_id", "client_secret"):
        if key not in value:
            values.problem(f"{path}.{key}", "expected a string, got nothing")
    for key in ("issuer", "token_url"):
        parts = None if (url := read.get(key)) is None else check_url(f"{path}.{key}", url)
        if parts is not None and "@" in parts.netloc:
            values.problem(f"{path}.{key}", "expected no user and password in the URL")
    if (scope := read.get("scope")) is not None and not SCOPE.fullmatch(scope):
        values.problem(f"{path}.scope", "expected names of scopes with one space between them")
    if "issuer" in value and "token_url" in value:
        values.problem(path, 'expected either "issuer" or "token_url", found both')
    client_id, client_secret = read.get("client_id"), read.get("client_secret")
    if len(values.problems) > before or client_id is None or client_secret is None:
        return None
    return OAuth(client_id, client_secret, read.get("scope"), read.get("issuer"), read.get("token_url"))


def check_oauth_fits(values: Values, path: str, target: Target | None, forward_headers: frozenset[str]) -> None:
    """Who sets the Authorization header must be clear, and there must be one."""
    if isinstance(target, StdioTarget):
        values.problem(path, "expected only with a url, this server is stdio")
    if target is None or isinstance(target, StdioTarget):
        return
    if any(name == "authorization" for name, _ in target.headers):
        values.problem(path, "expected no oauth beside an Authorization header, or a user and password in the URL")
    if "authorization" in forward_headers:
        values.problem(path, 'expected no oauth beside "authorization" in forward_headers')
