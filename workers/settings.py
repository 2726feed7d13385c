"""Settings of a worker process, from `LEASEHOLD_...` variables and command-line flags; a flag wins.

Every wrong value is reported at once, one line each, named as its writer knows it: the variable or the flag. Secrets,
and the Redis URL (it may hold a password), are never shown, neither in messages nor in a `repr`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ..coordinator.urls import EXPECTED as REDIS_URLS
from ..coordinator.urls import RedisUrl as ParsedUrl

PREFIX: Final = "LEASEHOLD_"
MIN_SECRET: Final = 16
UNSHOWN: Final = frozenset({"redis_url", "secret", "tokens", "jwt_jwks_url", "jwt_key"})
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
    ParsedUrl.parse(value.get_secret_value())
    return value


def _jwks_url(value: SecretStr) -> SecretStr:
    parts = urlsplit(value.get_secret_value())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    return value


def _key(value: SecretStr) -> SecretStr:
    from .public_keys import read_key  # not before there is one

    read_key(value.get_secret_value())
    return value


def _network(value: str) -> str:
    ip_network(value)
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
Network = Annotated[str, AfterValidator(_network)]
JwksUrl = Annotated[SecretStr, AfterValidator(_jwks_url)]
JwtKey = Annotated[SecretStr, AfterValidator(_key)]
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512"
]
Text = Annotated[str, Field(pattern=r"^\S+$")]
KEY: Final = "a PEM public key (RSA of at least 2048 bits, EC or Ed25519), or a shared secret of at least 32 bytes"
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

    redis_url: RedisUrl | None = Field(None, description=REDIS_URLS)
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
    """Empty: the gateway is open to whoever reaches it, unless callers are known by a header or a JWT."""
    principal_header: Annotated[str, LOWER] | None = Field(
        None, pattern=r"^[a-z0-9!#$%&'*+.^_`|~-]+$", description="the name of a header"
    )
    """Set by an authenticating proxy in front to the name of who calls; sessions are then that principal's, whatever
    his credential. Who reaches the gateway past the proxy could forge it: it counts from `trusted_proxies` only, others
    that send it are refused (403), and so is who comes without (401). The proxy must overwrite what clients send."""
    trusted_proxies: Annotated[tuple[Network, ...], *COMMA_LIST] = Field(
        (), description="IP addresses and networks (10.0.0.0/8), separated by commas"
    )
    """Peers that may set `principal_header`. Empty: this machine (loopback and unix sockets), so all its processes."""

    jwt_jwks_url: JwksUrl | None = Field(None, description="an http:// or https:// URL")
    """Where the keys are published that sign tokens. With this or a key, every request needs a valid JWT as bearer
    token, and its claims are the principal."""
    jwt_key: JwtKey | None = Field(None, description=KEY)
    jwt_key_file: Path | None = Field(None, description=f"the path of a file that holds {KEY}")
    """Read once, at the start."""
    jwt_algorithms: Annotated[tuple[Algorithm, ...], *COMMA_LIST] = Field(
        (), description=f"algorithms, separated by commas, out of {', '.join(get_args(Algorithm))}"
    )
    """Required, and never guessed from a token. HS ones go with a shared secret only, the others never with one."""
    jwt_audience: Annotated[tuple[Text, ...], *COMMA_LIST] = Field((), description="audiences, separated by commas")
    """A token must name one of them. Empty: a token that names any is refused, for it is meant for somebody else."""
    jwt_issuer: Annotated[tuple[Text, ...], *COMMA_LIST] = Field((), description="issuers, separated by commas")
    """Empty: whoever has the key."""
    jwt_claims: Annotated[tuple[Text, ...], *COMMA_LIST] = Field(
        ("iss", "sub"), min_length=1, description="names of claims, separated by commas"
    )
    """The principal is the values of all of them: strings or integers. A token that lacks one is refused."""

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

    rebalance: int = _number(0, 0, 10_000)
    """Idle sessions a minute that a worker which has more than its share may hand to others; 0: none."""

    route_headers: bool = Field(False, description="true or false")
    """Whether answers say which worker they landed on and which one owns the session: for demos and debugging."""

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], LOWER] = Field(
        "info", description="debug, info, warning, error or critical"
    )
    log_format: Annotated[Literal["text", "json"], LOWER] = Field("text", description="text or json")

    @property
    def verifies_tokens(self) -> bool:
        """Whether callers are known by a JWT."""
        return self.jwt_jwks_url is not None or self.jwt_key is not None

    @property
    def is_open(self) -> bool:
        """Whether whoever reaches the gateway may call."""
        return not self.tokens and self.principal_header is None and not self.verifies_tokens

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
    conflicts = _conflicts(values) if serving else {}
    is_key_read = serving and not conflicts and "jwt_key_file" in values
    if is_key_read:
        values["jwt_key"] = _read_file(values["jwt_key_file"])

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
            if field == "jwt_key" and is_key_read:
                field = "jwt_key_file"
            problems.append(f"{name_of(field)}: {_expected(field, values.get(field))}{_why(field, error)}")
    problems.extend(f"{name_of(field)}: {text}" for field, text in conflicts.items())
    if made is not None and serving and not conflicts:
        problems.extend(f"{name_of(field)}: {text}" for field, text in _mismatches(made).items())
    if serving and values.get("redis_url") and not values.get("secret"):
        problems.append(
            f"{name_of('secret')}: expected {Settings.model_fields['secret'].description}: required with a Redis URL, "
            "and the same for all workers"
        )
    if problems or made is None:
        raise SettingsError("\n".join(problems))
    return made


JWT_SOURCES: Final = ("jwt_jwks_url", "jwt_key", "jwt_key_file")
JWT_RULES: Final = ("jwt_algorithms", "jwt_audience", "jwt_issuer", "jwt_claims")
JWT_NAMES: Final = " or ".join(PREFIX + name.upper() for name in JWT_SOURCES)


def _conflicts(values: Mapping[str, object]) -> dict[str, str]:
    """What is set without what it belongs to, or beside what it does not go with. By field: what was expected."""
    sources = [PREFIX + name.upper() for name in JWT_SOURCES if name in values]
    found: dict[str, str] = {}
    if "trusted_proxies" in values and "principal_header" not in values:
        found["trusted_proxies"] = f"expected only with {PREFIX}PRINCIPAL_HEADER"
    for name in JWT_RULES:
        if name in values and not sources:
            found[name] = f"expected only with {JWT_NAMES}"  # or the door would stand open, unnoticed
    if sources:
        for name in JWT_SOURCES:
            if name in values and len(sources) > 1:
                found[name] = f"expected only one of {JWT_NAMES}"
        for name in ("tokens", "principal_header"):
            if values.get(name):
                found[name] = f"expected none with {sources[0]}: a valid JWT opens the door, and says who calls"
        if not values.get("jwt_algorithms"):
            description = Settings.model_fields["jwt_algorithms"].description
            found["jwt_algorithms"] = f"expected {description}: required with {sources[0]}"
    return found


def _mismatches(made: Settings) -> dict[str, str]:
    """Settings that are right, and do not fit each other. By field: what was expected."""
    found: dict[str, str] = {}
    if made.verifies_tokens:
        from .public_keys import SHARED, algorithms_for, read_key

        fitting = frozenset[str](get_args(Algorithm)) - frozenset(SHARED)
        if made.jwt_key is not None:
            fitting = algorithms_for(read_key(made.jwt_key.get_secret_value()))
        if not fitting.issuperset(made.jwt_algorithms):
            what = "keys that are published" if made.jwt_key is None else "this key"
            found["jwt_algorithms"] = f"expected for {what} nothing but {', '.join(sorted(fitting))}"
        if len(made.jwt_issuer) > 1 and "iss" not in made.jwt_claims:
            found["jwt_claims"] = "expected iss among them, as there are several issuers"
    return found


def _read_file(path: object) -> str:
    """What a file holds, without the end of its last line; nothing if it cannot be read: no key."""
    try:
        return Path(str(path)).read_text().rstrip("\r\n")
    except (OSError, ValueError):
        return ""


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


def _why(field: str, error: ValidationError) -> str:
    """What is wrong with a Redis URL; other validators do not say."""
    if field != "redis_url":
        return ""
    found = (item.get("ctx", {}).get("error") for item in error.errors(include_input=False) if field in item["loc"])
    return "".join(f": {reason}" for reason in found if reason)


def _expected(field: str, value: object) -> str:
    info = Settings.model_fields.get(field)
    if info is None:
        return "expected no such setting"
    got = "" if field in UNSHOWN else f", got {json.dumps(str(value)[:80])}"
    return f"expected {info.description}{got}"
