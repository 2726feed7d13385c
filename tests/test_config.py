"""The `mcpServers` file: what it may say (B49), and what its messages may not say (B19)."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
from leasehold.pool import Config, HttpTarget, SseTarget, StdioTarget, load_config, parse_config
from leasehold.pool.errors import ConfigError

ENVIRON = {"TOKEN": "s3cret-token", "EMPTY": "", "HOME": "/srv", "NESTED": "${TOKEN}"}


def parse(servers: object, *, root: str = "mcpServers") -> Config:
    return parse_config(json.dumps({root: servers}), "mcp.json", ENVIRON)


def http_target(entry: object) -> HttpTarget:
    target = parse({"x": entry}).servers["x"].target
    assert isinstance(target, HttpTarget)
    return target


def stdio_target(entry: object) -> StdioTarget:
    target = parse({"x": entry}).servers["x"].target
    assert isinstance(target, StdioTarget)
    return target


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "mcp.json", ENVIRON)
    return str(caught.value).splitlines()


def problems(servers: object) -> list[str]:
    return problems_of(json.dumps({"mcpServers": servers}))


def problem(entry: object) -> str:
    """The one problem of a server called `x`, without file and server."""
    (line,) = problems({"x": entry})
    assert line.startswith("mcp.json: mcpServers.x")
    return line.removeprefix("mcp.json: mcpServers.x").removeprefix(".")


def option_problem(**options: object) -> str:
    return problem({"url": "http://h/mcp", "leasehold": options}).removeprefix("leasehold.")


class TestWhatIsAccepted:
    def test_a_url_is_a_streamable_http_server_and_a_command_a_stdio_server(self) -> None:
        config = parse(
            {
                "github": {"url": "https://h.example/mcp?a=b", "headers": {"X-Team": "blue"}},
                "files": {"command": "npx", "args": ["-y", "files"], "env": {"A": "1"}, "cwd": "/srv"},
            }
        )
        assert list(config.servers) == ["github", "files"]
        assert config.servers["github"].target == HttpTarget("https://h.example/mcp?a=b", (("x-team", "blue"),))
        assert config.servers["files"].target == StdioTarget("npx", ("-y", "files"), {"A": "1"}, "/srv")
        assert not config.warnings

    def test_the_file_of_vs_code_is_accepted(self) -> None:
        assert list(parse({"x": {"type": "http", "url": "http://h/mcp"}}, root="servers").servers) == ["x"]
        with pytest.raises(ConfigError, match=r"mcp\.json: servers\.x\.url: expected"):
            parse({"x": {"type": "http", "url": 1}}, root="servers")

    @pytest.mark.parametrize("name", ["http", "streamable-http", "streamableHttp", "streamable_http", "HTTP"])
    def test_the_spellings_of_streamable_http_are_one_type(self, name: str) -> None:
        assert http_target({"type": name, "url": "http://h/mcp"}) == http_target({"url": "http://h/mcp"})
        assert http_target({"transport": name, "url": "http://h/mcp"}) == http_target({"url": "http://h/mcp"})

    def test_options_of_the_leasehold_object_arrive(self) -> None:
        options = {
            "affinity": "session",
            "max_sessions": 7,
            "max_sessions_per_principal": 2,
            "idle_ttl": 60,
            "call_timeout": 1.5,
            "idempotent_tools": ["search"],
            "forward_headers": ["X-Request-Id", "authorization"],
            "health_check": ["ping", "list_tools", "list_prompts", "list_resources", "skip"],
            "health_check_interval": 5,
            "health_check_timeout": 0.5,
            "max_age": 3600,
            "min_sessions": 3,
        }
        made = parse({"x": {"url": "http://h/mcp", "leasehold": options}}).servers["x"]
        assert (made.affinity, made.max_sessions, made.max_sessions_per_principal) == ("session", 7, 2)
        assert (made.idle_ttl_s, made.call_timeout_s) == (60.0, 1.5)
        assert made.idempotent_tools == {"search"}
        assert made.forward_headers == {"x-request-id", "authorization"}
        assert made.health_check == ("ping", "list_tools", "list_prompts", "list_resources", "skip")
        assert (made.health_check_interval_s, made.health_check_timeout_s, made.max_age_s) == (5.0, 0.5, 3600.0)
        assert made.min_sessions == 3

    @pytest.mark.parametrize("key", ["type", "transport"])
    @pytest.mark.parametrize("word", ["sse", "SSE"])
    def test_an_sse_server_has_what_an_http_server_has(self, key: str, word: str) -> None:
        entry = {key: word, "url": "http://u:p@h/sse", "headers": {"X-Team": "blue"}}
        made = parse({"x": entry | {"leasehold": {"forward_headers": ["X-User"]}}}).servers["x"]
        assert made.target == SseTarget("http://h/sse", (("x-team", "blue"), ("authorization", "Basic dTpw")))
        assert made.forward_headers == {"x-user"}

    def test_no_session_needs_to_be_ready(self) -> None:
        made = parse({"x": {"url": "http://h/mcp", "leasehold": {"min_sessions": 0}}}).servers["x"]
        assert (made.min_sessions, made.max_age_s) == (0, None)

    def test_keys_of_other_clients_are_tolerated_and_listed(self) -> None:
        others = {"alwaysAllow": ["a"], "autoApprove": [], "timeout": 60, "description": "d", "note": 1}
        text = json.dumps({"$schema": "s", "mcpServers": {"x": {"url": "http://h/mcp", **others}}})
        config = parse_config(text, "mcp.json", {})
        assert list(config.servers) == ["x"]
        assert config.warnings == (
            "mcp.json: $schema: not used",
            *(f"mcp.json: mcpServers.x.{key}: not used" for key in others),
        )

    def test_a_disabled_server_is_skipped_whatever_else_it_says(self) -> None:
        config = parse(
            {"x": {"disabled": True, "url": "${UNSET}", "type": 3}, "y": {"url": "http://h", "disabled": False}}
        )
        assert list(config.servers) == ["y"]
        assert config.disabled == ("x",)

    def test_headers_that_the_link_sets_are_dropped_with_a_warning(self) -> None:
        config = parse({"x": {"url": "http://h", "headers": {"Accept": "*/*", "Mcp-Session-Id": "1", "A": "b"}}})
        assert config.servers["x"].target == HttpTarget("http://h", (("a", "b"),))
        assert [line.partition(": not used")[0] for line in config.warnings] == [
            "mcp.json: mcpServers.x.headers.Accept",
            "mcp.json: mcpServers.x.headers.Mcp-Session-Id",
        ]

    def test_user_and_password_leave_the_url_for_a_header(self) -> None:
        target = http_target({"url": "http://us%40er:p%3Aw@[::1]:8080/mcp"})
        assert target.url == "http://[::1]:8080/mcp"
        assert target.headers == (("authorization", "Basic dXNAZXI6cDp3"),)

    def test_a_byte_order_mark_is_no_error(self, tmp_path: Path) -> None:
        path = tmp_path / "mcp.json"
        path.write_bytes(b"\xef\xbb\xbf" + b'{"mcpServers": {"x": {"url": "http://h"}}}')
        assert list(load_config(path, {}).servers) == ["x"]


class TestVariables:
    def test_variables_expand_in_every_string(self) -> None:
        target = stdio_target(
            {
                "command": "${HOME}/run",
                "args": ["--a=${TOKEN}", "${HOME}${HOME}"],
                "env": {"K": "${TOKEN}"},
                "cwd": "${HOME}",
            }
        )
        assert target == StdioTarget("/srv/run", ("--a=s3cret-token", "/srv/srv"), {"K": "s3cret-token"}, "/srv")
        web = http_target({"url": "http://h${HOME}", "headers": {"Authorization": "Bearer ${TOKEN}"}})
        assert web == HttpTarget("http://h/srv", (("authorization", "Bearer s3cret-token"),))

    @pytest.mark.parametrize(
        ("text", "expanded"),
        [
            ("${UNSET:-d e:f}", "d e:f"),
            ("${UNSET:-}", ""),
            ("${EMPTY:-d}", "d"),
            ("${EMPTY}", ""),
            ("${HOME:-d}", "/srv"),
            ("$HOME $ {HOME} $$", "$HOME $ {HOME} $$"),
            ("$${HOME}", "${HOME}"),
            ("${NESTED}", "${TOKEN}"),
        ],
    )
    def test_defaults_and_plain_dollars(self, text: str, expanded: str) -> None:
        assert stdio_target({"command": "c", "args": [text]}).args == (expanded,)

    def test_b49_an_unset_variable_is_named_with_file_server_and_key(self) -> None:
        found = problems(
            {
                "a": {"url": "http://${HOST_A}", "headers": {"X": "${KEY_A}"}},
                "b": {"command": "${CMD_B}", "args": ["x", "${ARG_B}"], "env": {"E": "${ENV_B}"}, "cwd": "${CWD_B}"},
            }
        )
        assert [line.partition(" (")[0] for line in found] == [
            f"mcp.json: mcpServers.{key}: expected the environment variable {name} to be set"
            for key, name in [
                ("a.url", "HOST_A"),
                ("a.headers.X", "KEY_A"),
                ("b.command", "CMD_B"),
                ("b.env.E", "ENV_B"),
                ("b.cwd", "CWD_B"),
                ("b.args[1]", "ARG_B"),
            ]
        ]

    @pytest.mark.parametrize("text", ["${input:token}", "${env:TOKEN}", "${}", "${A", "${1}", "${A-b}", "${A:?b}"])
    def test_b49_another_syntax_is_refused_not_passed_on(self, text: str) -> None:
        assert problem({"command": "c", "args": [text]}).startswith("args[0]: expected ${VAR} or ${VAR:-default}")


class TestB49WrongConfiguration:
    """B49: one clear message with file, key and expected value."""

    def test_all_problems_of_a_file_are_reported_at_once(self) -> None:
        found = problems(
            {
                "bad name": {"url": "http://h"},
                "a": {"url": "ftp://h", "leasehold": {"max_sesions": 1, "idle_ttl": -1}},
                "b": {"command": 1, "args": "x"},
                "c": [],
                "d": {"url": "http://h"},
            }
        )
        assert [line.split(": ", 2)[1] for line in found] == [
            'mcpServers."bad name"',
            "mcpServers.c",
            "mcpServers.a.url",
            "mcpServers.a.leasehold.max_sesions",
            "mcpServers.a.leasehold.idle_ttl",
            "mcpServers.b.command",
            "mcpServers.b.args",
        ]
        assert all(line.startswith("mcp.json: ") and "expected" in line for line in found)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "mcp.json: line 1 column 1: expected JSON: Expecting value"),
            ('{\n  "a" 1\n}', "mcp.json: line 2 column 7: expected JSON: "),
            ('{\n  // hi\n  "a": 1}', "mcp.json: line 2 column 3: expected JSON: "),
            ('{"a": NaN}', "mcp.json: expected JSON, NaN is no JSON number"),
            ("[" * 200_000, "mcp.json: expected JSON of a sensible size"),
            ("9" * 5000, "mcp.json: expected JSON of a sensible size"),
            ("[]", 'mcp.json: expected an object with the key "mcpServers", got a list'),
            ("{}", 'mcp.json: expected an object with the key "mcpServers" (or "servers"), found neither'),
            ('{"mcpservers": {}}', 'found neither; mcpservers: did you mean "mcpServers"?'),
            ('{"mcpServers": {}, "servers": {}}', 'the key "mcpServers" (or "servers"), found both'),
            ('{"mcpServers": null}', "mcp.json: mcpServers: expected an object of servers, got nothing"),
            ('{"mcpServers": {}}', "mcp.json: mcpServers: expected at least one server"),
            (
                '{"servers": {"a": {"disabled": true}}}',
                "mcp.json: servers: expected at least one server, all are disabled",
            ),
            (
                '{"mcpServers": {"a": {"url": "http://x"}, "a": {"url": "http://y"}}}',
                "mcp.json: mcpServers.a: expected once, found more than once",
            ),
            (
                '{"mcpServers": {"a": {"url": "http://x", "url": "http://y"}}}',
                "mcp.json: mcpServers.a.url: expected once, found more than once",
            ),
        ],
    )
    def test_a_file_of_the_wrong_form(self, text: str, message: str) -> None:
        (line,) = problems_of(text)
        assert message in line
        assert line.startswith("mcp.json: ")

    def test_comments_are_named_as_what_is_wrong(self) -> None:
        assert problems_of('{\n  // hi\n  "a": 1}')[0].endswith("(JSON has no comments)")

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "a\n", "x" * 65, ".", "..", "a:b", "%2e"])
    def test_a_server_name_that_is_no_path_segment(self, name: str) -> None:
        (line,) = problems({name: {"url": "http://h"}})
        assert "expected a name of 1 to 64 characters" in line

    @pytest.mark.parametrize("name", ["a", "x" * 64, "A-b_c.d", "...a", "0"])
    def test_a_server_name_that_is_one(self, name: str) -> None:
        assert list(parse({name: {"url": "http://h"}}).servers) == [name]

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("x", ": expected an object, got a string"),
            ({}, ': expected either "url" or "command", found neither'),
            ({"url": "http://h", "command": "c"}, ': expected either "url" or "command", found both'),
            ({"type": "http", "url": "http://h", "command": "c"}, "command: expected only with another type of server"),
            ({"command": "c", "headers": {}}, "headers: expected only with another type of server, this one is stdio"),
            ({"type": "http"}, "url: expected an http:// or https:// URL, got nothing"),
            ({"type": "stdio"}, "command: expected the command to start, got nothing"),
            ({"command": ""}, "command: expected the command to start, got an empty string"),
            (
                {"type": "websocket", "url": "http://h"},
                'type: expected "http", "streamable-http", "sse" or "stdio", got websocket',
            ),
            (
                {"type": 1, "url": "http://h"},
                'type: expected "http", "streamable-http", "sse" or "stdio", got a number',
            ),
            (
                {"type": "sse", "url": "http://h", "command": "c"},
                "command: expected only with another type of server, this one is sse",
            ),
            ({"url": "http://h", "disabled": "no"}, "disabled: expected true or false, got a string"),
            ({"url": "h/mcp"}, "url: expected an http:// or https:// URL"),
            ({"url": "ftp://h/mcp"}, "url: expected an http:// or https:// URL"),
            ({"url": "http:///mcp"}, "url: expected an http:// or https:// URL with a valid host and port"),
            ({"url": "http://h:0/mcp"}, "url: expected an http:// or https:// URL with a valid host and port"),
            ({"url": "http://h:99999/mcp"}, "url: expected an http:// or https:// URL with a valid host and port"),
            ({"url": "http://[::1/mcp"}, "url: expected an http:// or https:// URL with a valid host and port"),
            ({"url": "http://h/a b"}, "without spaces and control characters"),
            ({"url": "http://h/a\nb"}, "without spaces and control characters"),
            ({"url": "http://h/#f"}, 'without a fragment ("#...")'),
            ({"url": "http://h", "headers": []}, "headers: expected an object of strings, got a list"),
            ({"url": "http://h", "headers": {"A": 1}}, "headers.A: expected a string, got a number"),
            ({"url": "http://h", "headers": {"A b": "1"}}, 'headers."A b": expected the name of an HTTP header'),
            ({"url": "http://h", "headers": {"A": "1", "a": "2"}}, "headers.a: expected once, found more than once"),
            ({"url": "http://h", "headers": {"A": "1\r\nB: 2"}}, "headers.A: expected a value without line breaks"),
            ({"url": "http://h", "headers": {"A": "\ud800"}}, "headers.A: expected a string of Unicode text"),
            ({"command": "c", "args": "x"}, "args: expected a list of strings, got a string"),
            ({"command": "c", "args": ["x", None]}, "args[1]: expected a string, got nothing"),
            ({"command": "c", "args": ["a\0b"]}, "args[0]: expected a string of Unicode text without NUL characters"),
            ({"command": "c", "env": {"A": True}}, "env.A: expected a string, got true"),
            ({"command": "c", "env": {"A=B": "x"}}, 'env."A=B": expected the name of an environment variable'),
            ({"command": "c", "cwd": ["x"]}, "cwd: expected the path of a directory, got a list"),
            ({"command": "c", "leasehold": []}, "leasehold: expected an object, got a list"),
        ],
    )
    def test_a_wrong_server_key(self, entry: object, message: str) -> None:
        assert message in ": " + problem(entry)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_session": 3}, 'max_session: expected no such key; did you mean "max_sessions"?'),
            ({"maxSessions": 3}, 'maxSessions: expected no such key; did you mean "max_sessions"?'),
            ({"zzz": 3}, "zzz: expected no such key; known are affinity, max_sessions,"),
            ({"affinity": "sesion"}, 'affinity: expected one of "session", "principal", "none", got sesion'),
            ({"affinity": None}, 'affinity: expected one of "session", "principal", "none", got nothing'),
            ({"max_age": None}, "max_age: expected seconds, from 0.1 to 604800, got nothing"),
            ({"max_age": 0}, "max_age: expected seconds, from 0.1 to 604800, got 0"),
            ({"min_sessions": -1}, "min_sessions: expected an integer from 0 to 1000000, got -1"),
            ({"min_sessions": False}, "min_sessions: expected an integer from 0 to 1000000, got false"),
            ({"min_sessions": 3, "max_sessions": 2}, "min_sessions: expected at most max_sessions, which is 2"),
            ({"health_check": "ping"}, "health_check: expected a list of strings, got a string"),
            ({"health_check": []}, 'health_check: expected at least one of "ping", "list_tools", "list_prompts"'),
            ({"health_check": ["pong"]}, 'health_check[0]: expected one of "ping", "list_tools", "list_prompts"'),
            ({"health_check": [1]}, "health_check[0]: expected a name, got a number"),
            ({"health_check": ["skip", "ping"]}, 'health_check[0]: expected "skip" only as the last one'),
            ({"health_check_interval": "1m"}, "health_check_interval: expected seconds, from 0.1 to 604800"),
            ({"health_check_timeout": 0}, "health_check_timeout: expected seconds, from 0.1 to 604800, got 0"),
            ({"healthcheck": ["ping"]}, 'healthcheck: expected no such key; did you mean "health_check"?'),
            ({"max_sessions": 0}, "max_sessions: expected an integer from 1 to 1000000, got 0"),
            ({"max_sessions": True}, "max_sessions: expected an integer from 1 to 1000000, got true"),
            ({"max_sessions": 1.5}, "max_sessions: expected an integer from 1 to 1000000, got a number"),
            ({"max_sessions": 10**400}, "max_sessions: expected an integer from 1 to 1000000, got a number beyond"),
            ({"max_sessions": 2, "max_sessions_per_principal": 3}, "expected at most max_sessions, which is 2"),
            ({"idle_ttl": "30m"}, "idle_ttl: expected seconds, from 0.1 to 604800, got a string"),
            ({"idle_ttl": 0}, "idle_ttl: expected seconds, from 0.1 to 604800, got 0"),
            ({"call_timeout": 1e300}, "call_timeout: expected seconds, from 0.1 to 604800, got a number beyond"),
            ({"call_timeout": None}, "call_timeout: expected seconds, from 0.1 to 604800, got nothing"),
            ({"idempotent_tools": "a"}, "idempotent_tools: expected a list of strings, got a string"),
            ({"idempotent_tools": [""]}, "idempotent_tools[0]: expected a name, got an empty string"),
            ({"forward_headers": ["a b"]}, 'forward_headers: expected names of HTTP headers, got "a b"'),
            (
                {"forward_headers": ["Mcp-Session-Id"]},
                'expected no "mcp-session-id": Leasehold sets this header itself',
            ),
        ],
    )
    def test_a_wrong_option(self, options: dict[str, object], message: str) -> None:
        assert message in option_problem(**options)

    def test_headers_cannot_be_forwarded_to_a_process(self) -> None:
        found = problem({"command": "c", "leasehold": {"forward_headers": ["x-a"]}})
        assert found == "leasehold.forward_headers: expected only with http or sse, this server is stdio"

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        def message(path: Path) -> str:
            with pytest.raises(ConfigError) as caught:
                load_config(path, {})
            return str(caught.value)

        binary = tmp_path / "binary.json"
        binary.write_bytes(b'{"\xff": 1}')
        missing = tmp_path / "missing.json"
        assert message(missing) == f"{missing}: expected a configuration file, found nothing of that name"
        assert message(tmp_path) == f"{tmp_path}: expected a file, found a directory"
        assert message(binary) == f"{binary}: expected UTF-8 text, byte 2 is none"
        assert "cannot be read" in message(binary / "below")
        assert "cannot be read" in message(Path("a\0b"))


class TestB19NoCredential:
    """B19: no credential appears in a message or a repr."""

    SECRET = "s3cret"

    @pytest.mark.parametrize(
        "entry",
        [
            {"url": "ftp://user:s3cret@h"},
            {"url": "http://user:s3cret@h:port"},
            {"url": "http://user:s3cret@h/a b"},
            {"url": "http://user:s3cret@h", "headers": {"Authorization": "Bearer s3cret"}},
            {"url": "http://[s3cret"},
            {"url": "http://h/?key=s3cret#x"},
            {"url": "http://h", "headers": {"A": "s3cret\n"}},
            {"url": "http://h", "headers": {"A": "${TOKEN}\n"}},
            {"url": "http://h", "headers": {"A": "${UNSET} s3cret"}},
            {"url": "http://h", "headers": {"A": "${B-s3cret}"}},
            {"url": "http://h", "headers": {"A": ["s3cret"]}},
            {"url": "http://h", "headers": "s3cret"},
            {"command": "c", "env": {"A": "s3cret\0"}},
            {"command": "c", "env": {"A": "${UNSET}s3cret"}},
            {"command": "c", "args": ["--key=s3cret\0"]},
            {"command": "c", "args": "--key=s3cret"},
        ],
    )
    def test_messages_show_no_value(self, entry: object) -> None:
        with pytest.raises(ConfigError) as caught:
            parse({"x": entry})
        assert self.SECRET not in "".join(traceback.format_exception(caught.value))

    def test_reprs_show_no_value(self) -> None:
        config = parse(
            {
                "a": {"url": "http://user:s3cret@h/mcp?key=s3cret", "headers": {"X-Key": "s3cret"}},
                "b": {"command": "run", "args": ["--key", "s3cret"], "env": {"KEY": "s3cret"}},
                "c": {"type": "sse", "url": "http://user:s3cret@h/sse?key=s3cret", "headers": {"Y-Key": "s3cret"}},
            }
        )
        shown = repr(config) + str(config) + repr(dict(config.servers))
        assert self.SECRET not in shown
        assert "HttpTarget(http://h/mcp?..." in shown
        assert "SseTarget(http://h/sse?..." in shown
        assert "y-key" in shown
        assert "x-key" in shown
        assert "KEY" in shown

    def test_syntax_errors_quote_nothing_of_the_file(self) -> None:
        (line,) = problems_of('{"mcpServers": {"a": {"headers": {"A": "s3cret" "s3cret"}}}}')
        assert self.SECRET not in line
