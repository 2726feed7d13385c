"""Settings: where they come from, and what a wrong one says (B49) without telling a secret (B19)."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from leasehold.workers.settings import Settings, SettingsError, load_settings
from pydantic import SecretStr

LONG = "sixteen characters or more"
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
        ],
    )
    def test_a_wrong_value(self, name: str, value: str, expected: str) -> None:
        (line,) = problems({f"LEASEHOLD_{name}": value})
        assert line.startswith(f"LEASEHOLD_{name}: expected {expected}")

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
            "--redis: expected a redis://, rediss:// or unix:// URL"
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
        assert line == "REDIS_URL: expected a redis://, rediss:// or unix:// URL"

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
            {**FLEET, "LEASEHOLD_PORT": "x"},
        ],
    )
    def test_messages_show_no_secret(self, environ: dict[str, str]) -> None:
        with pytest.raises(SettingsError) as caught:
            load_settings(environ)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))

    def test_reprs_show_no_secret(self) -> None:
        made = load_settings({**FLEET, "LEASEHOLD_SECRET": "s3cret" + LONG, "LEASEHOLD_TOKENS": "s3cret"})
        assert "s3cret" not in repr(made) + str(made) + made.model_dump_json()
