"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp
import pytest
from fleet import SECRET, Running, run_example, run_gateway, write_config
from leasehold import __version__
from leasehold.coordinator.embedded import EmbeddedRedis
from leasehold.workers import cli
from mcp_http import RawSession

pytestmark = [pytest.mark.anyio, pytest.mark.process]

NOWHERE = "redis://user:s3cret@127.0.0.1:1/0"
TOKEN = "t0ken-of-a-user"


@dataclass
class Result:
    code: int
    out: str
    err: str


def settings_of(env: dict[str, str]) -> dict[str, str]:
    """This environment without the settings of whoever runs the tests."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LEASEHOLD_") and k != "REDIS_URL"}
    return {**clean, **env}


def run_command(*arguments: str, folder: Path | None = None, **env: str) -> Result:
    """Run the command in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "leasehold.workers.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=settings_of(env),
    )
    return Result(ended.returncode, ended.stdout, ended.stderr)


class Command(Protocol):
    def __call__(self, *arguments: str, folder: Path | None = None, **env: str) -> Result: ...


@pytest.fixture
def leasehold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process, which spares its start."""

    def run(*arguments: str, folder: Path | None = None, **env: str) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["leasehold", *arguments])
            patch.setattr(os, "environ", settings_of(env))
            if folder is not None:
                patch.chdir(folder)
            try:
                code = cli.main()
            except SystemExit as end:
                code = end.code
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run


def columns(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


class TestHelp:
    def test_version(self, leasehold: Command) -> None:
        assert leasehold("--version") == Result(0, f"leasehold {__version__}\n", "")

    @pytest.mark.parametrize(
        ("command", "mentions"),
        [
            ("", ["serve", "workers", "sessions", "config", "--version"]),
            ("serve", ["CONFIG", "--host", "127.0.0.1", "--port", "8333", "--workers", "--redis", "$REDIS_URL"]),
            ("workers", ["ls"]),
            ("workers ls", ["--redis", "$LEASEHOLD_REDIS_URL", "--json"]),
            ("sessions", ["ls"]),
            ("sessions ls", ["--redis", "$LEASEHOLD_REDIS_URL", "--json"]),
            ("sessions show", ["SESSION", "--redis", "--json"]),
            ("sessions move", ["SESSION", "--to", "WORKER"]),
            ("sessions evict", ["SESSION"]),
            ("drain", ["WORKER", "--wait", "SECONDS", "--json"]),
            ("config", ["check"]),
            ("config check", ["CONFIG", "$LEASEHOLD_CONFIG", "mcp.json", "--json"]),
        ],
    )
    def test_of_every_command_names_its_options_and_their_defaults(
        self, command: str, mentions: list[str], leasehold: Command
    ) -> None:
        result = leasehold(*command.split(), "--help")
        assert (result.code, result.err) == (0, "")
        assert [word for word in mentions if word not in result.out] == []

    @pytest.mark.parametrize("command", ["", "workers", "sessions", "config"])
    def test_is_what_a_group_without_a_command_shows(self, command: str, leasehold: Command) -> None:
        result = leasehold(*command.split())
        assert result.code == 2
        assert "Commands:" in result.out + result.err


class TestWrongUse:
    @pytest.mark.parametrize(
        ("command", "says"),
        [
            ("serve --wrong", "--wrong"),
            ("serve --port abc", "'--port'"),
            ("serve --port 99999", "--port: expected an integer from 0 to 65535"),
            ("serve --workers 0", "--workers: expected an integer from 1 to 256"),
            ("serve --redis http://x", "--redis: expected a redis://, rediss:// or unix:// URL"),
            ("serve one.json two.json", "two.json"),
            ("config check nowhere.json", "nowhere.json: expected a configuration file"),
            ("frobnicate", "frobnicate"),
            ("workers frobnicate", "frobnicate"),
            ("sessions ls extra", "extra"),
            ("workers ls", "LEASEHOLD_REDIS_URL: expected the Redis URL of the fleet (or --redis URL)"),
            ("drain abc", "LEASEHOLD_REDIS_URL: expected the Redis URL of the fleet (or --redis URL)"),
            ("drain abc --redis redis://127.0.0.1:1", "LEASEHOLD_SECRET: expected the secret of the fleet"),
            ("sessions move abc --redis redis://127.0.0.1:1", "LEASEHOLD_SECRET: expected the secret of the fleet"),
            ("sessions ls --json", "LEASEHOLD_REDIS_URL: expected the Redis URL of the fleet (or --redis URL)"),
        ],
    )
    def test_is_said_on_standard_error_with_exit_code_2(
        self, command: str, says: str, tmp_path: Path, leasehold: Command
    ) -> None:
        result = leasehold(*command.split(), folder=tmp_path)
        assert (result.code, result.out) == (2, "")
        assert says in result.err

    def test_has_no_traceback_in_a_process_of_its_own_either(self, tmp_path: Path) -> None:
        assert run_command("serve", folder=tmp_path) == Result(
            2, "", "leasehold: mcp.json: expected a configuration file, found nothing of that name\n"
        )
        wrong = run_command("serve", "--wrong", folder=tmp_path)
        assert (wrong.code, wrong.out) == (2, "")
        assert "Traceback" not in wrong.err

    def test_a_wrong_variable_is_named(self, tmp_path: Path, leasehold: Command) -> None:
        result = leasehold("serve", folder=tmp_path, LEASEHOLD_PORT="many", LEASEHOLD_TOKEN="x")
        assert result.code == 2
        assert "LEASEHOLD_PORT: expected an integer" in result.err
        assert "did you mean LEASEHOLD_TOKENS?" in result.err


class TestConfigCheck:
    def test_shows_what_would_be_served_and_no_secret(self, tmp_path: Path, leasehold: Command) -> None:
        config = write_config(
            tmp_path,
            {
                "web": {"url": "https://example.com/mcp", "headers": {"Authorization": "Bearer s3cret"}},
                "local": {"command": "server", "args": ["--key", "s3cret"], "env": {"KEY": "s3cret"}},
                "off": {"command": "server", "disabled": True},
            },
        )
        text = leasehold("config", "check", str(config))
        assert (text.code, text.err) == (0, "")
        head, *rows, last = columns(text.out)
        assert head == ["server", "type", "affinity", "target"]
        assert [row[:3] for row in rows] == [["web", "http", "session"], ["local", "stdio", "session"]]
        assert last == [f"{config}: ok"]

        report = leasehold("config", "check", str(config), "--json")
        assert (report.code, report.err) == (0, "")
        read = json.loads(report.out)
        assert [server["server"] for server in read["servers"]] == ["web", "local"]
        assert read["disabled"] == ["off"]
        assert read["warnings"] == []
        assert "s3cret" not in text.out + report.out

    def test_names_every_fault(self, tmp_path: Path, leasehold: Command) -> None:
        config = write_config(tmp_path, {"a": {"url": 7}, "b": {"args": []}})
        result = leasehold("config", "check", str(config))
        assert (result.code, result.out) == (2, "")
        assert "mcpServers.a.url" in result.err
        assert "mcpServers.b" in result.err


class TestListings:
    @pytest.mark.parametrize("what", ["workers", "sessions"])
    def test_of_a_redis_that_is_down_fail_with_exit_code_1_and_one_line_without_its_password(
        self, what: str, leasehold: Command
    ) -> None:
        result = leasehold(what, "ls", "--redis", NOWHERE)
        assert (result.code, result.out) == (1, "")
        assert re.fullmatch(r"leasehold: Redis at redis://127\.0\.0\.1:1 does not answer: .+\n", result.err)
        assert "s3cret" not in result.err

    @pytest.mark.parametrize("what", ["workers", "sessions"])
    def test_of_nothing(self, what: str, redis_url: str, leasehold: Command) -> None:
        assert leasehold(what, "ls", REDIS_URL=redis_url) == Result(0, "none\n", "")
        assert leasehold(what, "ls", "--json", "--redis", redis_url) == Result(0, "[]\n", "")

    @pytest.fixture
    async def listed(self, tmp_path: Path) -> AsyncIterator[tuple[Running, str, RawSession]]:
        """A gateway of two workers with one session."""
        with EmbeddedRedis() as server, run_example("counter_http.py", tmp_path) as upstream:
            config = write_config(tmp_path, {"counter": {"url": upstream.url}})
            with run_gateway(
                config, tmp_path, "--workers", "2", redis_url=server.url, env={"LEASEHOLD_TOKENS": TOKEN}
            ) as gateway:
                async with aiohttp.ClientSession() as http:
                    url = f"{gateway.url}/servers/counter/mcp"
                    async with RawSession(http, url, {"authorization": f"Bearer {TOKEN}"}) as session:
                        yield gateway, server.url, session

    async def test_name_workers_and_sessions_but_no_secret(self, listed: tuple[Running, str, RawSession]) -> None:
        gateway, url, session = listed
        workers = run_command("workers", "ls", LEASEHOLD_REDIS_URL=url)
        assert (workers.code, workers.err) == (0, "")
        head, *rows = columns(workers.out)
        assert head == ["worker", "role", "host", "pid", "started", "lease"]
        read = json.loads(run_command("workers", "ls", "--json", "--redis", url).out)
        shown = [[row["incarnation"][:8], "worker", row["host"], str(row["pid"])] for row in read]
        assert shown == [row[:4] for row in rows]
        assert {row["index"] for row in read} == {0, 1}
        assert all(
            f"[{row['pid']}] worker_ready incarnation={row['incarnation'][:8]}" in gateway.output() for row in read
        )

        sessions = run_command("sessions", "ls", REDIS_URL=url)
        assert (sessions.code, sessions.err) == (0, "")
        head, (key, server, principal, owner, _age, adoptable) = columns(sessions.out)
        assert head == ["session", "server", "principal", "owner", "age", "adoptable"]
        assert (key, server, adoptable) == (session.key[:12], "counter", "yes")
        report = run_command("sessions", "ls", "--json", "--redis", url)
        (row,) = json.loads(report.out)
        assert (row["session"], row["server"], row["principal"]) == (session.key, "counter", principal)
        assert row["owner"] in {worker["incarnation"] for worker in read}
        assert row["owner"].startswith(owner)
        assert row["adoptable"] is True
        assert row["ttl_ms"] > 0
        shown = workers.out + sessions.out + report.out
        assert session.session_id not in shown
        assert TOKEN not in shown
        assert session.session_id not in gateway.output()

    @pytest.mark.acceptance
    async def test_operations_act_on_what_runs(self, listed: tuple[Running, str, RawSession]) -> None:
        """B46: a client notices nothing of a move or a drain."""
        gateway, url, session = listed

        async def command(*words: str, secret: str = SECRET) -> Result:
            env = {"LEASEHOLD_REDIS_URL": url, "LEASEHOLD_SECRET": secret}
            return await asyncio.to_thread(lambda: run_command(*words, **env))

        async def owner() -> str:
            shown = await command("sessions", "show", session.key[:12], "--json")
            assert (shown.code, shown.err) == (0, "")
            return json.loads(shown.out)["owner"]

        assert (await session.call("increment")).text == "1"
        first = await owner()
        moved = await command("sessions", "move", session.key[:12])
        second = await owner()
        assert moved == Result(0, f"{session.key[:12]}: {first[:8]} -> {second[:8]}\n", "")
        assert first != second
        assert (await session.call("increment")).text == "2"
        back = await command("sessions", "move", session.key, "--to", first[:8])
        assert (back.code, back.out) == (0, f"{session.key[:12]}: {second[:8]} -> {first[:8]}\n")
        drained = await command("drain", first[:8], "--wait", "10")
        assert (drained.code, drained.err) == (0, "")
        assert drained.out.startswith(f"{first[:8]}: drained; 0 sessions are left on it")
        assert (await session.call("increment")).text == "3"
        assert await owner() == second
        wrong = await command("sessions", "evict", session.key, secret="another secret that is long enough")
        assert (wrong.code, wrong.out) == (1, "")
        assert "did not answer" in wrong.err
        evicted = await command("sessions", "evict", session.key[:12])
        assert evicted == Result(0, f"{session.key[:12]}: ended\n", "")
        assert (await session.post({"jsonrpc": "2.0", "id": "gone", "method": "ping"})).status == 404
        assert "Traceback" not in gateway.output()
