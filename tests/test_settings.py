"""Settings: where they come from, and what a wrong one says (B49) without telling a secret (B19)."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from issuer import SECRET, ec_key, ed_key, jwk, pem, private_pem, rsa_key
from leasehold.coordinator.urls import EXPECTED as REDIS_URLS
from leasehold.workers.settings import KEY, Settings, SettingsError, load_settings
from pydantic import SecretStr

LONG = "sixteen characters or more"
JWKS = {
    "LEASEHOLD_JWT_JWKS_URL": "https://:s3cret@issuer.example/keys",
    "LEASEHOLD_JWT_ALGORITHMS": "RS256,ES256",
}
SOURCES = "LEASEHOLD_JWT_JWKS_URL or LEASEHOLD_JWT_KEY or LEASEHOLD_JWT_KEY_FILE"
FLEET = {"LEASEHOLD_REDIS_URL": "redis://:s3cret@redis.example:6379/0", "LEASEHOLD_SECRET": LONG}


def problems(environ: dict[str, str], **flags: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, **flags)
    return str(caught.value).splitlines()


def plain(values: tuple[SecretStr, ...]) -> list[str]:
    return [value.get_secret_value() for value in values]


class TestSources:
    def test_nothing_set_is_one_worker_on_loopback_with_a_redis_of_its_own(self) -> None:
        made = load_settings({})
        assert (made.host, made.port, made.workers) == ("127.0.0.1", 8333, 1)
        assert (made.redis_url, made.secret, made.tokens, made.config) == (None, (), (), None)
        assert (made.lease_ttl_ms, made.max_body_bytes, made.max_waiting) == (3000, 4 * 1024 * 1024, 10_000)
        assert (made.namespace, made.log_level, made.log_format) == ("leasehold", "info", "text")

    def test_variables_are_read(self) -> None:
        made = load_settings(
            {
                **FLEET,
                "LEASEHOLD_HOST": "0.0.0.0",
                "LEASEHOLD_PORT": "80",
                "LEASEHOLD_WORKERS": "4",
                "LEASEHOLD_TOKENS": "a, b,,",
                "LEASEHOLD_ALLOWED_HOSTS": "Example.com:*, [::1]:8333",
                "LEASEHOLD_ALLOWED_ORIGINS": "https://Example.com",
                "LEASEHOLD_LOG_LEVEL": "DEBUG",
                "LEASEHOLD_LOG_FORMAT": "json",
                "LEASEHOLD_SHUTDOWN_GRACE_S": "2.5",
                "LEASEHOLD_CONFIG": "mcp.json",
                "UNRELATED": "x",
            }
        )
        assert made.redis_url is not None
        assert made.redis_url.get_secret_value() == FLEET["LEASEHOLD_REDIS_URL"]
        assert (made.host, made.port, made.workers) == ("0.0.0.0", 80, 4)
        assert plain(made.tokens) == ["a", "b"]
        assert made.allowed_hosts == ("example.com:*", "[::1]:8333")
        assert made.allowed_origins == ("https://example.com",)
        assert (made.log_level, made.log_format) == ("debug", "json")
        assert (made.shutdown_grace_s, made.config) == (2.5, Path("mcp.json"))

    def test_who_calls_is_read(self) -> None:
        by_header = load_settings(
            {"LEASEHOLD_PRINCIPAL_HEADER": "X-Forwarded-User", "LEASEHOLD_TRUSTED_PROXIES": "10.0.0.0/8, ::1"}
        )
        assert (by_header.principal_header, by_header.trusted_proxies) == ("x-forwarded-user", ("10.0.0.0/8", "::1"))
        by_token = load_settings(
            {
                **JWKS,
                "LEASEHOLD_JWT_AUDIENCE": "a, b",
                "LEASEHOLD_JWT_ISSUER": "https://i",
                "LEASEHOLD_JWT_CLAIMS": "sub",
            }
        )
        assert by_token.jwt_jwks_url is not None
        assert by_token.jwt_jwks_url.get_secret_value() == JWKS["LEASEHOLD_JWT_JWKS_URL"]
        assert (by_token.jwt_algorithms, by_token.jwt_audience) == (("RS256", "ES256"), ("a", "b"))
        assert (by_token.jwt_issuer, by_token.jwt_claims) == (("https://i",), ("sub",))

    @pytest.mark.parametrize("written", [pem(rsa_key()), SECRET], ids=["pem", "secret"])
    def test_a_key_is_read_from_a_file(self, tmp_path: Path, written: str) -> None:
        """Of a shared secret, the end of the line is no part."""
        file = tmp_path / "key"
        file.write_text(written.strip() + "\n")
        algorithm = "HS256" if written == SECRET else "PS256"
        made = load_settings({"LEASEHOLD_JWT_KEY_FILE": str(file), "LEASEHOLD_JWT_ALGORITHMS": algorithm})
        assert made.jwt_key is not None
        assert made.jwt_key.get_secret_value() == written.strip()
        assert made.verifies_tokens

    def test_a_command_that_only_looks_reads_no_key(self) -> None:
        made = load_settings({"LEASEHOLD_JWT_KEY_FILE": "/nowhere", "LEASEHOLD_JWT_AUDIENCE": "a"}, serving=False)
        assert made.jwt_key is None

    @pytest.mark.parametrize(
        ("environ", "is_open"),
        [
            ({}, True),
            ({"LEASEHOLD_TOKENS": "a"}, False),
            ({"LEASEHOLD_PRINCIPAL_HEADER": "x-user"}, False),
            (JWKS, False),
            ({"LEASEHOLD_JWT_KEY": SECRET, "LEASEHOLD_JWT_ALGORITHMS": "HS256"}, False),
        ],
        ids=["nothing", "tokens", "header", "keys", "key"],
    )
    def test_a_gateway_is_open_unless_callers_have_to_say_who_they_are(
        self, environ: dict[str, str], is_open: bool
    ) -> None:
        assert load_settings(environ).is_open is is_open

    def test_secrets_come_several_for_rotation_in_order(self) -> None:
        made = load_settings({"LEASEHOLD_SECRET": f"new {LONG} , old {LONG}"})
        assert plain(made.secret) == [f"new {LONG}", f"old {LONG}"]

    def test_flags_win_over_variables_and_a_flag_not_given_does_not(self) -> None:
        made = load_settings({"LEASEHOLD_PORT": "1", "LEASEHOLD_WORKERS": "2"}, port=3, workers=None)
        assert (made.port, made.workers) == (3, 2)

    def test_a_flag_may_correct_a_wrong_variable(self) -> None:
        assert load_settings({"LEASEHOLD_PORT": "abc"}, port=3).port == 3

    def test_plain_redis_url_is_read_and_ours_wins(self) -> None:
        secret = {"LEASEHOLD_SECRET": LONG}
        only = load_settings({"REDIS_URL": "redis://plain", **secret}).redis_url
        both = load_settings({"REDIS_URL": "redis://plain", **FLEET}).redis_url
        assert only is not None
        assert both is not None
        assert only.get_secret_value() == "redis://plain"
        assert both.get_secret_value() == FLEET["LEASEHOLD_REDIS_URL"]

    def test_an_empty_variable_counts_as_unset(self) -> None:
        empty = dict.fromkeys(["REDIS_URL", *(f"LEASEHOLD_{name.upper()}" for name in Settings.model_fields)], "")
        assert load_settings(empty) == load_settings({})

    def test_only_the_given_environment_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEASEHOLD_PORT", "1")
        monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
        assert load_settings({}) == Settings()
        assert load_settings({}).port == 8333

    def test_variables_that_kubernetes_makes_for_a_service_of_our_name_do_no_harm(self) -> None:
        made = load_settings(
            {
                "LEASEHOLD_PORT": "tcp://10.0.0.7:8333",
                "LEASEHOLD_PORT_8333_TCP": "tcp://10.0.0.7:8333",
                "LEASEHOLD_PORT_8333_TCP_ADDR": "10.0.0.7",
                "LEASEHOLD_PORT_8333_TCP_PORT": "8333",
                "LEASEHOLD_PORT_8333_TCP_PROTO": "tcp",
                "LEASEHOLD_SERVICE_HOST": "10.0.0.7",
                "LEASEHOLD_SERVICE_PORT": "8333",
                "LEASEHOLD_SERVICE_PORT_HTTP": "8333",
            }
        )
        assert made == load_settings({})


class TestB49WrongSettings:
    """B49: one clear message with the variable (or flag) and the expected value."""

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("PORT", "abc", 'an integer from 0 to 65535, got "abc"'),
            ("PORT", "65536", 'an integer from 0 to 65535, got "65536"'),
            ("PORT", "-1", 'an integer from 0 to 65535, got "-1"'),
            ("PORT", "80.5", 'an integer from 0 to 65535, got "80.5"'),
            ("HOST", "http://x", 'a host name or an address to listen on, got "http://x"'),
            ("WORKERS", "0", 'an integer from 1 to 256, got "0"'),
            ("LEASE_TTL_MS", "299", 'an integer from 300 to 60000, got "299"'),
            ("LEASE_TTL_MS", "60001", 'an integer from 300 to 60000, got "60001"'),
            ("SHUTDOWN_GRACE_S", "nan", 'a number from 0 to 3600, got "nan"'),
            ("SHUTDOWN_GRACE_S", "inf", 'a number from 0 to 3600, got "inf"'),
            ("MAX_BODY_BYTES", "4MiB", 'an integer from 1024 to 1073741824, got "4MiB"'),
            ("MAX_WAITING", "0", 'an integer from 1 to 1000000, got "0"'),
            ("NAMESPACE", "a{b}", '1 to 64 characters out of A-Z a-z 0-9 _ . : -, got "a{b}"'),
            ("NAMESPACE", "a*", '1 to 64 characters out of A-Z a-z 0-9 _ . : -, got "a*"'),
            ("NAMESPACE", "a\n", '1 to 64 characters out of A-Z a-z 0-9 _ . : -, got "a\\n"'),
            ("LOG_LEVEL", "loud", 'debug, info, warning, error or critical, got "loud"'),
            ("LOG_FORMAT", "xml", 'text or json, got "xml"'),
            ("ALLOWED_HOSTS", "a/b", 'hosts, each with a port, with :* or without, separated by commas, got "a/b"'),
            ("ALLOWED_ORIGINS", "example.com", "origins (scheme://host[:port]), separated by commas, got"),
            ("ALLOWED_ORIGINS", ",", "origins (scheme://host[:port]), separated by commas, got"),
            ("PRINCIPAL_HEADER", "x user", 'the name of a header, got "x user"'),
            ("PRINCIPAL_HEADER", "x-user:", 'the name of a header, got "x-user:"'),
        ],
    )
    def test_a_wrong_value(self, name: str, value: str, expected: str) -> None:
        (line,) = problems({f"LEASEHOLD_{name}": value})
        assert line.startswith(f"LEASEHOLD_{name}: expected {expected}")

    @pytest.mark.parametrize("value", ["10.0.0.1/8", "10.0.0.0/33", "proxy.example", "*", "10.0.0.1,x", ","])
    def test_a_proxy_is_an_address_or_a_network(self, value: str) -> None:
        (line,) = problems({"LEASEHOLD_PRINCIPAL_HEADER": "x-user", "LEASEHOLD_TRUSTED_PROXIES": value})
        expected = "IP addresses and networks (10.0.0.0/8), separated by commas"
        assert line.startswith(f"LEASEHOLD_TRUSTED_PROXIES: expected {expected}, got ")

    @pytest.mark.parametrize(
        "url", ["issuer.example/keys", "ftp://issuer.example", "https://", "https://h:x/", "http://h:0"]
    )
    def test_keys_are_published_at_a_url(self, url: str) -> None:
        (line,) = problems({**JWKS, "LEASEHOLD_JWT_JWKS_URL": url})
        assert line == "LEASEHOLD_JWT_JWKS_URL: expected an http:// or https:// URL"

    @pytest.mark.parametrize(
        "key",
        [
            "a secret of less than 32 bytes",
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
            private_pem(rsa_key()),
            pem(rsa_key(2, 1024)),
            pem(rsa_key()) + pem(rsa_key(1)),
            pem(ec_key(ec.SECP256K1)),
            "".join(pem(rsa_key()).splitlines()[1:-1]),
            "\n".join(pem(rsa_key()).splitlines()[1:-1]),
            "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQDJ a key of OpenSSH",
            json.dumps(jwk(rsa_key())),
            "\udcff" * 40,
        ],
        ids=["short", "no pem", "private", "weak", "two", "curve", "base64", "lines", "ssh", "jwk", "bytes"],
    )
    @pytest.mark.parametrize("algorithm", ["RS256", "HS256"])
    def test_what_is_no_key_to_verify_with(self, key: str, algorithm: str, tmp_path: Path) -> None:
        """B17: above all no public key that would count as shared secret."""
        (line,) = problems({"LEASEHOLD_JWT_KEY": key, "LEASEHOLD_JWT_ALGORITHMS": algorithm})
        assert line == f"LEASEHOLD_JWT_KEY: expected {KEY}"
        file = tmp_path / "key"
        file.write_text(key, errors="surrogateescape")
        (line,) = problems({"LEASEHOLD_JWT_KEY_FILE": str(file), "LEASEHOLD_JWT_ALGORITHMS": algorithm})
        assert line == f'LEASEHOLD_JWT_KEY_FILE: expected the path of a file that holds {KEY}, got "{file}"'

    @pytest.mark.parametrize("name", ["missing", "", "\0"])
    def test_a_key_file_that_cannot_be_read(self, name: str, tmp_path: Path) -> None:
        (line,) = problems({"LEASEHOLD_JWT_KEY_FILE": f"{tmp_path}/{name}", "LEASEHOLD_JWT_ALGORITHMS": "RS256"})
        assert line.startswith(f"LEASEHOLD_JWT_KEY_FILE: expected the path of a file that holds {KEY}, got ")

    @pytest.mark.parametrize("value", ["none", "RS256,none", "rs256", "HS1", "RS256 ES256", "*"])
    def test_an_algorithm_is_one_of_those(self, value: str) -> None:
        (line,) = problems({**JWKS, "LEASEHOLD_JWT_ALGORITHMS": value})
        assert line.startswith(
            "LEASEHOLD_JWT_ALGORITHMS: expected algorithms, separated by commas, out of RS256, RS384,"
        )

    @pytest.mark.parametrize(
        ("source", "algorithms", "fitting"),
        [
            (
                {"JWKS_URL": "https://h"},
                "RS256,HS256",
                "published nothing but ES256, ES384, ES512, EdDSA, PS256, PS384,",
            ),
            ({"KEY": pem(rsa_key())}, "HS256", "this key nothing but PS256, PS384, PS512, RS256, RS384, RS512"),
            ({"KEY": pem(rsa_key())}, "RS256,ES256", "this key nothing but PS256, PS384, PS512, RS256, RS384, RS512"),
            ({"KEY": pem(ec_key())}, "ES384", "this key nothing but ES256"),
            ({"KEY": pem(ed_key())}, "RS256", "this key nothing but EdDSA"),
            ({"KEY": "x" * 32}, "HS512", "this key nothing but HS256"),
            ({"KEY": SECRET}, "RS256", "this key nothing but HS256"),
        ],
        ids=["published", "rsa", "mixed", "curve", "ed", "short", "shared"],
    )
    def test_algorithms_are_those_that_a_key_is_made_for(
        self, source: dict[str, str], algorithms: str, fitting: str
    ) -> None:
        """B17"""
        environ = {f"LEASEHOLD_JWT_{name}": value for name, value in source.items()}
        (line,) = problems({**environ, "LEASEHOLD_JWT_ALGORITHMS": algorithms})
        assert line.startswith("LEASEHOLD_JWT_ALGORITHMS: expected for ")
        assert fitting in line

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"TRUSTED_PROXIES": "::1"}, {"TRUSTED_PROXIES": "only with LEASEHOLD_PRINCIPAL_HEADER"}),
            ({"JWT_AUDIENCE": "a"}, {"JWT_AUDIENCE": f"only with {SOURCES}"}),
            (
                {"JWT_ALGORITHMS": "RS256", "JWT_CLAIMS": "sub"},
                {"JWT_ALGORITHMS": f"only with {SOURCES}", "JWT_CLAIMS": f"only with {SOURCES}"},
            ),
            (
                {"JWT_KEY": SECRET, "JWT_JWKS_URL": "https://h", "JWT_ALGORITHMS": "RS256"},
                {"JWT_KEY": f"only one of {SOURCES}", "JWT_JWKS_URL": f"only one of {SOURCES}"},
            ),
            (
                {"JWT_KEY": SECRET},
                {"JWT_ALGORITHMS": "algorithms, separated by commas, out of", "": "required with LEASEHOLD_JWT_KEY"},
            ),
            (
                {"JWT_KEY_FILE": "/k", "JWT_ALGORITHMS": "RS256", "TOKENS": "a", "PRINCIPAL_HEADER": "x"},
                {"TOKENS": "none with LEASEHOLD_JWT_KEY_FILE", "PRINCIPAL_HEADER": "none with LEASEHOLD_JWT_KEY_FILE"},
            ),
            (
                {"JWT_JWKS_URL": "https://h", "JWT_ALGORITHMS": "RS256", "JWT_ISSUER": "a,b", "JWT_CLAIMS": "sub"},
                {"JWT_CLAIMS": "iss among them, as there are several issuers"},
            ),
        ],
        ids=["proxies", "audience", "rules", "keys", "algorithms", "doors", "issuers"],
    )
    def test_what_does_not_go_together(self, environ: dict[str, str], expected: dict[str, str]) -> None:
        """Above all no rule for tokens that are not asked for: the door would stand open, unnoticed."""
        found = problems({f"LEASEHOLD_{name}": value for name, value in environ.items()})
        for name, text in expected.items():
            assert any(line.startswith(f"LEASEHOLD_{name}") and text in line for line in found), found
        assert len(found) == len([name for name in expected if name])

    def test_all_problems_are_reported_at_once_one_line_each(self) -> None:
        found = problems({"LEASEHOLD_PORT": "x", "LEASEHOLD_SECRET": "a,b,c", "LEASEHOLD_LOG_FORMAT": "x"})
        assert [line.partition(":")[0] for line in found] == [
            "LEASEHOLD_PORT",
            "LEASEHOLD_SECRET",
            "LEASEHOLD_LOG_FORMAT",
        ]

    def test_a_wrong_flag_is_named_as_the_flag(self) -> None:
        assert problems({"LEASEHOLD_PORT": "1"}, port=70000) == [
            '--port: expected an integer from 0 to 65535, got "70000"'
        ]
        assert problems({"LEASEHOLD_SECRET": LONG}, redis_url="x") == [
            f"--redis: expected {REDIS_URLS}: unknown scheme"
        ]

    def test_the_exit_code_is_2(self) -> None:
        assert SettingsError.exit_code == 2

    @pytest.mark.parametrize("secret", [{}, {"LEASEHOLD_SECRET": " "}, {"LEASEHOLD_SECRET": "short"}])
    @pytest.mark.parametrize("name", ["REDIS_URL", "LEASEHOLD_REDIS_URL"])
    def test_a_redis_of_ones_own_needs_a_secret_of_16_characters(self, name: str, secret: dict[str, str]) -> None:
        (line,) = problems({name: "redis://redis.example", **secret})
        assert line.startswith("LEASEHOLD_SECRET: expected secrets of at least 16 characters each")

    def test_each_of_several_secrets_has_16_characters(self) -> None:
        (line,) = problems({"LEASEHOLD_SECRET": f"{LONG},fifteen letters"})
        assert line.startswith("LEASEHOLD_SECRET: expected secrets of at least 16 characters each")

    @pytest.mark.parametrize("name", ["SECRET", "TOKENS"])
    def test_a_list_of_nothing_is_not_taken_for_an_open_door(self, name: str) -> None:
        assert problems({f"LEASEHOLD_{name}": " , "})[0].startswith(f"LEASEHOLD_{name}: expected")

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [("TOKEN", "TOKENS"), ("SECRETS", "SECRET"), ("REDIS_URI", "REDIS_URL"), ("tokens", "TOKENS")],
    )
    def test_a_misspelt_variable_is_an_error_with_the_right_name(self, wrong: str, right: str) -> None:
        (line,) = problems({f"LEASEHOLD_{wrong}": LONG})
        assert line == f"LEASEHOLD_{wrong}: expected no such variable; did you mean LEASEHOLD_{right}?"

    @pytest.mark.parametrize(
        "url",
        ["http://h", "h:6379", "redis://", "redis://:6379", "redis://h:port", "redis://h:0", "unix://", "redis://[x"],
    )
    def test_a_url_that_is_no_redis_url(self, url: str) -> None:
        (line,) = problems({"REDIS_URL": url, "LEASEHOLD_SECRET": LONG})
        assert line.startswith(f"REDIS_URL: expected {REDIS_URLS}: ")

    @pytest.mark.parametrize("url", ["redis://h", "rediss://u:p@h:1/2", "unix:///tmp/a.sock", "redis://[::1]:6379/0"])
    def test_a_url_that_is_one(self, url: str) -> None:
        assert load_settings({"REDIS_URL": url, "LEASEHOLD_SECRET": LONG}).redis_url is not None


class TestB19NoSecret:
    """B19: no secret appears in a message or a repr."""

    @pytest.mark.parametrize(
        "environ",
        [
            {"LEASEHOLD_SECRET": "s3cret"},
            {"LEASEHOLD_TOKENS": "s3cret token"},
            {"LEASEHOLD_TOKENS": "s3cret\x7f"},
            {"LEASEHOLD_REDIS_URL": "http://:s3cret@h"},
            {"LEASEHOLD_REDIS_URL": "redis://:s3cret@h:port"},
            {"REDIS_URL": "redis://:s3cret@h"},
            {"LEASEHOLD_TOKEN": "s3cret"},
            {"LEASEHOLD_JWT_KEY": "s3cret"},
            {"LEASEHOLD_JWT_KEY": "s3cret" + LONG * 2, "LEASEHOLD_JWT_ALGORITHMS": "RS256"},
            {"LEASEHOLD_JWT_KEY": "s3cret\udcff" + LONG * 2, "LEASEHOLD_JWT_ALGORITHMS": "HS256"},
            {"LEASEHOLD_JWT_JWKS_URL": "https://u:s3cret@h:port", "LEASEHOLD_JWT_ALGORITHMS": "RS256"},
            {"LEASEHOLD_JWT_JWKS_URL": "https://u:s3cret@h", "LEASEHOLD_JWT_ALGORITHMS": "HS256"},
            {**FLEET, "LEASEHOLD_PORT": "x"},
        ],
    )
    def test_messages_show_no_secret(self, environ: dict[str, str]) -> None:
        with pytest.raises(SettingsError) as caught:
            load_settings(environ)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))

    def test_reprs_show_no_secret(self) -> None:
        for more in (
            {"LEASEHOLD_TOKENS": "s3cret"},
            {"LEASEHOLD_JWT_KEY": "s3cret" + LONG * 2, "LEASEHOLD_JWT_ALGORITHMS": "HS256"},
            {"LEASEHOLD_JWT_JWKS_URL": "https://u:s3cret@h", "LEASEHOLD_JWT_ALGORITHMS": "RS256"},
        ):
            made = load_settings({**FLEET, "LEASEHOLD_SECRET": "s3cret" + LONG, **more})
            assert "s3cret" not in repr(made) + str(made) + made.model_dump_json()
