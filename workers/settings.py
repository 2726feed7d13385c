"""Settings of a worker process, from `LEASEHOLD_...` variables and command-line flags; a flag wins.

Every wrong value is reported at once, one line each, named as its writer knows it: the variable or the flag. Secrets,
and the Redis URL (it may hold a password), are never shown, neither in messages nor in a `repr`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

PREFIX: Final = "LEASEHOLD_"
MIN_SECRET: Final = 16
UNSHOWN: Final = frozenset({"redis_url", "secret", "tokens"})
FLAGS: Final = {"redis_url": "--redis", "config": "CONFIG"}
"""Flags that are not named after the field."""

HOST: Final = r"(\*|\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(\d{1,5}|\*))?"


class SettingsError(Exception):
    """Raised when a setting is wrong; each line of the message names one variable or flag and the expected value."""

    exit_code: ClassVar[int] = 2


def _comma_list(value: object) -> object:
    """`a, b` as its parts; a sequence given from code stays what it is."""
    if not isinstance(value, str):
        return value
    parts = tuple(part for part in (raw.strip() for raw in value.split(",")) if part)
    if not parts and value.strip():
        raise ValueError  # "," is a mistake: as a list of no tokens it would open the gateway
    return parts


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    parts = urlsplit(value.get_secret_value())
    place = parts.path.strip("/") if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not place or parts.port == 0:  # .port raises ValueError too
        raise ValueError
    return value


def _number(default: float, low: int, high: int) -> Any:
    """A number with inclusive bounds, and the sentence that says so."""
    kind = "an integer" if isinstance(default, int) else "a number"
    return Field(default, ge=low, le=high, description=f"{kind} from {low} to {high}")


RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
Secret = Annotated[SecretStr, Field(min_length=MIN_SECRET)]
Token = Annotated[SecretStr, AfterValidator(_token)]
Host = Annotated[str, Field(pattern=f"^({HOST})$")]
Origin = Annotated[str, Field(pattern=f"^(\\*|null|[a-z][a-z0-9+.-]*://{HOST})$")]
COMMA_LIST: Final = (NoDecode, BeforeValidator(_comma_list))
LOWER: Final = BeforeValidator(_lower)


class Settings(BaseSettings):
    """What a worker process needs to know. Made by `load_settings`, which is all that reads the environment.

    A field's description is what its error message says was expected.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    config: Path | None = Field(None, description="the path of a configuration file")
    host: str = Field("127.0.0.1", pattern=r"^[^\s/]+$", description="a host name or an address to listen on")
    port: int = _number(8333, 0, 65535)
    workers: int = _number(1, 1, 256)

    redis_url: RedisUrl | None = Field(None, description="a redis://, rediss:// or unix:// URL")
    """None: a private Redis server is started and stopped with the command."""
    namespace: str = Field(
        "leasehold",
        # Part of every key and of SCAN patterns: no braces (hash tags), no glob characters.
        pattern=r"^[A-Za-z0-9_.:-]{1,64}$",
        description="1 to 64 characters out of A-Z a-z 0-9 _ . : -",
    )
    secret: Annotated[tuple[Secret, ...], *COMMA_LIST] = Field(
        (), description=f"secrets of at least {MIN_SECRET} characters each, separated by commas, the newest first"
    )
    """Seals frames and records with the first, opens with any: rotation. Empty only without a Redis of one's own."""
    tokens: Annotated[tuple[Token, ...], *COMMA_LIST] = Field(
        (), description="bearer tokens of visible ASCII characters, separated by commas"
    )
    """Empty: the gateway is open to whoever reaches it."""
    allowed_hosts: Annotated[tuple[Host, ...], *COMMA_LIST, LOWER] = Field(
        (), description="hosts, each with a port, with :* or without, separated by commas"
    )
    allowed_origins: Annotated[tuple[Origin, ...], *COMMA_LIST, LOWER] = Field(
        (), description="origins (scheme://host[:port]), separated by commas"
    )

    lease_ttl_ms: int = _number(3000, 300, 60_000)
    shutdown_grace_s: float = _number(10.0, 0, 3600)
    """How long a drain may take before what still runs is cut off."""
    max_body_bytes: int = _number(4 * 1024 * 1024, 1024, 1024**3)
    max_waiting: int = _number(10_000, 1, 1_000_000)
    """Calls in flight in one worker; above it they get 503."""

    route_headers: bool = Field(False, description="true or false")
    """Whether answers say which worker they landed on and which one owns the session: for demos and debugging."""

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], LOWER] = Field(
        "info", description="debug, info, warning, error or critical"
    )
    log_format: Annotated[Literal["text", "json"], LOWER] = Field("text", description="text or json")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load_settings` passes the environment it was given; a hidden second look at os.environ would mix the two.
        return (init_settings,)


def load_settings(environ: Mapping[str, str], *, serving: bool = True, **overrides: object) -> Settings:
    """Settings from an environment and from flags (a flag that is None was not given). Raises `SettingsError`.

    Not `serving`: a command that only looks, and needs no secret.
    """
    flags = {name: value for name, value in overrides.items() if value is not None}
    variables = _variables(environ)
    source = EnvSettingsSource(Settings)
    source.env_vars = variables
    values: dict[str, Any] = {**source(), **flags}

    def name_of(field: str) -> str:
        if field in flags:
            return FLAGS.get(field, "--" + field.replace("_", "-"))
        if field == "redis_url" and PREFIX + "REDIS_URL" not in environ:
            return "REDIS_URL"
        return PREFIX + field.upper()

    problems = _unknown_variables(environ)
    made = None
    try:
        made = Settings(**values)
    except ValidationError as error:
        # One line for a field, however many of its items are wrong.
        for field in dict.fromkeys(str(item["loc"][0]) for item in error.errors(include_input=False)):
            problems.append(f"{name_of(field)}: {_expected(field, values.get(field))}")
    if serving and values.get("redis_url") and not values.get("secret"):
        problems.append(
            f"{name_of('secret')}: expected {Settings.model_fields['secret'].description}: required with a Redis URL, "
            "and the same for all workers"
        )
    if problems or made is None:
        raise SettingsError("\n".join(problems))
    return made


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Our variables, as pydantic-settings looks them up (lower case). An empty one counts as unset."""
    ours = (name for name in environ if name.startswith(PREFIX) and name.isupper())
    made = {name.lower(): environ[name] for name in ours if environ[name].strip()}
    if environ.get("REDIS_URL", "").strip():
        made.setdefault("leasehold_redis_url", environ["REDIS_URL"])
    # Kubernetes gives every pod LEASEHOLD_PORT=tcp://10.0.0.7:8333 where a Service is called "leasehold".
    if made.get("leasehold_port", "").startswith("tcp://"):
        del made["leasehold_port"]
    return made


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Misspelt variables: a LEASEHOLD_TOKEN would leave the gateway open. Names far from ours are left to others."""
    problems: list[str] = []
    known = [field.upper() for field in Settings.model_fields]
    for name in environ:
        suffix = name.removeprefix(PREFIX)
        if suffix != name and suffix not in known:
            close = get_close_matches(suffix.upper(), known, 1, cutoff=0.8)
            if close:
                problems.append(f"{name}: expected no such variable; did you mean {PREFIX}{close[0]}?")
    return problems


def _expected(field: str, value: object) -> str:
    info = Settings.model_fields.get(field)
    if info is None:
        return "expected no such setting"
    got = "" if field in UNSHOWN else f", got {json.dumps(str(value)[:80])}"
    return f"expected {info.description}{got}"
