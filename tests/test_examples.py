"""The examples, run as a user would run them: real processes, and a gunicorn of four workers of which one is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from fleet import EXAMPLES, ROOT, SECRET, Running, run_example, run_process, wait_until

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("examples")]

CONVERSATIONS = ("alice", "bob", "carol")
RETRY_S = 0.1
NO_FLEET = dict.fromkeys(("REDIS_URL", "LEASEHOLD_REDIS_URL", "LEASEHOLD_SECRET", "COUNTER_URL"), "")


def run(folder: Path, *command: str, **env: str) -> str:
    """What a program prints; it succeeds, complains of nothing, and leaves no process and no file behind."""
    folder.mkdir()
    environ = {**os.environ, **NO_FLEET, "TMPDIR": str(folder), **env}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=environ
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    # Processes that it started have the folder in their environment, or (its Redis) in their arguments.
    wait_until(lambda: not processes_of(folder), f"left behind: {processes_of(folder)}", 5)
    assert list(folder.iterdir()) == []
    return done.stdout


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those of this run that are alive."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            named = any(str(folder) in argument for argument in process.cmdline())
            if named or process.environ().get("TMPDIR") == str(folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def check_keys(redis_url: str, sessions: int, killed: int = 0) -> None:
    """B29: what a fleet that stopped leaves in Redis ends by itself, and is no more than records of its sessions, the
    marks of its ended workers, and the mailboxes of those that were killed."""
    with redis.Redis.from_url(redis_url) as client:
        names = [name.decode() for name in client.scan_iter()]
        assert [name for name in names if client.pttl(name) <= 0] == []
        kinds = Counter(re.sub(r"leasehold:\{(\w):\w+\}:?(box|\w*).*", r"\1 \2", name) for name in names)
        assert set(kinds) <= {"s ", "w ended", "w box", "leasehold:circuits"}
        assert kinds["s "] <= sessions
        assert kinds["w box"] <= killed


# -- the pool alone ----------------------------------------------------------------------------------------------------


def test_the_pool_alone_shares_few_sessions_among_many_tasks_and_says_what_it_counted(tmp_path: Path) -> None:
    """B2, B5, B17"""
    said = run(tmp_path / "run", str(EXAMPLES / "pool_alone.py"))
    made = re.search(r"12 tasks made 60 calls on (\d+) sessions, of which there may be 4", said)
    assert made is not None
    assert 1 <= int(made[1]) <= 4
    assert "alice's session counted 1, 2; bob's 1" in said
    assert "counted 1, 2, 3, 4, 5" in said
    assert re.search(r"carol waited in vain: .* \(outcome not_run\)", said)
    assert re.search(r"a process ended under a call: .* \(outcome unknown\)", said)
    assert "a fresh session: it counted 1" in said
    counted = dict(re.findall(r"^  (\w+) +(\S.*)$", said, re.MULTILINE))
    assert counted["lent"] == counted["in_flight"] == counted["waiting"] == "0", "all that was lent came back"
    assert counted["closed"] == "{'lost': 1}"
    assert counted["sessions"] == str(int(counted["opened"]) - 1)


# -- the agent loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [False, pytest.param(True, marks=pytest.mark.acceptance)], ids=["alone", "redis given"]
)
def test_conversations_of_the_agent_loop_go_on_from_one_process_to_the_other(
    tmp_path: Path, redis_url: str, given: bool
) -> None:
    env = {"LEASEHOLD_REDIS_URL": redis_url, "LEASEHOLD_SECRET": SECRET} if given else {}
    said = run(tmp_path / "run", str(EXAMPLES / "agent_loop.py"), **env)
    rows = re.findall(r"^(process \d) +(\w+) +(\w+) +(.*)$", said, re.MULTILINE)
    for conversation in CONVERSATIONS:
        mine = [row for row in rows if row[1] == conversation]
        assert {row[0] for row in mine} == {"process 1", "process 2"}
        counts = sorted(int(row[3]) for row in mine if row[2] == "increment")
        assert counts == list(range(1, 7)), "one counter, each number once"
        assert f"{conversation}: 7 increments by 2 processes and one more, all in one session" in said
        answers = {(tool, answer) for _, _, tool, answer in mine}
        assert ("slow", "slow  done  (progress 1/3 2/3 3/3)") in answers
        assert ("ask_sampling", "sampled: the model read 'what now?'") in answers
        assert ("ask_elicitation", "accept: yes to 'go on?'") in answers
        assert any(tool == "echo" and answer.startswith("tool error: ") for tool, answer in answers)
    (first, crash, second) = [row[2:] for row in rows if row[1] == "dana"]
    assert first == second == ("increment", "1"), "the server's process, and with it the session, had ended"
    assert crash[0] == "crash"
    assert crash[1].startswith("failed, it may have run: ")
    if given:
        check_keys(redis_url, sessions=len(CONVERSATIONS))


# -- the application under gunicorn ------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """One user's conversation: what its calls came to."""

    name: str
    counts: list[int] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)

    def increment(self, base: str) -> None:
        """One more call; repeated as long as it did not run."""
        tag = f"{self.name}-{len(self.outcomes)}"
        while True:
            status, answer = post(base, self.name, "increment", tag=tag)
            outcome = "ok" if status == 200 else answer["outcome"]
            if outcome != "not_run":
                break
            time.sleep(RETRY_S)
        self.outcomes.append(outcome)
        if status == 200:
            self.counts.append(int(answer["text"]))
            self.workers.add(answer["worker"])


def post(base: str, conversation: str, tool: str, user: str = "alice", **arguments: Any) -> tuple[int, Any]:
    """Status and body of one call, on a connection of its own."""
    request = urllib.request.Request(
        f"{base}/chat/{conversation}",
        json.dumps({"tool": tool, "arguments": arguments}).encode(),
        {"content-type": "application/json", "x-user": user},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError as error:  # its worker was killed: from here it may have run
        return 0, {"outcome": "unknown", "message": repr(error)}


@contextmanager
def gunicorn(folder: Path, **env: str) -> Iterator[tuple[Running, str]]:
    """The command of the example's own words, on a free port."""
    documented = re.search(r"^    gunicorn (.*)$", (EXAMPLES / "fastapi_app.py").read_text(), re.MULTILINE)
    assert documented is not None
    assert "-w 4" in documented[1]
    command = [sys.executable, "-m", "gunicorn", *documented[1].split(), "--bind", "127.0.0.1:0"]
    # From a checkout, as its user would; what gunicorn keeps in a home is not kept in ours.
    with run_process([*command, "--chdir", str(ROOT)], folder, {**NO_FLEET, "HOME": str(folder), **env}) as running:

        def ready() -> str | None:
            assert running.process.poll() is None, running.output()
            found = re.search(r"Listening at: (http://\S+)", running.output())
            started = running.output().count("Application startup complete")
            return found[1] if found and started == 4 else None

        yield running, wait_until(ready, f"gunicorn is not ready:\n{running.output()}", 60)


def owners(redis_url: str) -> dict[int, int]:
    """How many sessions each process owns, by its id."""
    environ = {**os.environ, "LEASEHOLD_REDIS_URL": redis_url, "LEASEHOLD_SECRET": SECRET}

    def listed(what: str) -> Any:
        command = [sys.executable, "-m", "leasehold.workers.cli", what, "ls", "--json"]
        return json.loads(subprocess.run(command, capture_output=True, check=True, env=environ, timeout=60).stdout)

    pids = {worker["incarnation"]: worker["pid"] for worker in listed("workers")}
    owned: dict[int, int] = defaultdict(int)
    for session in listed("sessions"):
        owned[pids[session["owner"]]] += 1
    return owned


def test_conversations_of_the_web_application_go_on_at_any_worker_and_past_the_death_of_one(
    tmp_path: Path, redis_url: str
) -> None:
    """B33, B34, B47: four workers of gunicorn, a connection per request; the one that owns most is killed."""
    journal = tmp_path / "journal"
    conversations = [Conversation(f"c{number}") for number in range(8)]
    with (
        run_example("counter_http.py", tmp_path, "--journal", str(journal)) as upstream,
        gunicorn(tmp_path, COUNTER_URL=upstream.url, LEASEHOLD_REDIS_URL=redis_url, LEASEHOLD_SECRET=SECRET) as served,
    ):
        running, base = served
        check_answers(base)
        for _ in range(5):
            in_parallel(conversations, base, calls=2)
        for conversation in conversations:
            assert conversation.counts == list(range(1, 11)), "in order, none lost, none twice"
            assert set(conversation.outcomes) == {"ok"}

        def all_served() -> bool:
            in_parallel(conversations, base, calls=1)
            return len(set().union(*(conversation.workers for conversation in conversations))) == 4

        wait_until(all_served, "some worker answers nothing")

        owned = owners(redis_url)
        assert sum(owned.values()) >= len(conversations)
        victim = max(owned, key=lambda pid: owned[pid])
        before = [len(conversation.counts) for conversation in conversations]
        in_parallel(conversations, base, calls=20, in_the_middle=lambda: os.kill(victim, signal.SIGKILL))
        wait_until(lambda: f"Booting worker with pid: {victim}" in running.output(), "who was killed was a worker")
        in_parallel(conversations, base, calls=2)
        for conversation, count in zip(conversations, before, strict=True):
            assert len(conversation.counts) > count + 2, "it went on"
            assert conversation.outcomes[-2:] == ["ok", "ok"]
            assert conversation.counts == sorted(set(conversation.counts)), "no number twice"
            assert victim not in {post(base, conversation.name, "whoami")[1]["worker"]}
        assert running.stop() == 0, running.output()
    check_executions(journal, conversations)
    check_keys(redis_url, sessions=len(conversations) + 2, killed=1)
    assert not processes_of(tmp_path)


def check_answers(base: str) -> None:
    """What each kind of failure is told by."""
    assert post(base, "errors", "increment")[0] == 200
    status, answer = post(base, "errors", "no such tool")
    assert (status, answer["outcome"]) == (422, "error")
    assert post(base, "errors", "increment", user="bob")[1]["text"] == "1", "bob's conversation of that name is another"
    assert post(base, "errors", "increment")[1]["text"] == "2"


def in_parallel(
    conversations: list[Conversation], base: str, calls: int, in_the_middle: Callable[[], None] = lambda: None
) -> None:
    """Each conversation makes so many calls, one after the other; all at the same time."""

    def go_on(conversation: Conversation) -> None:
        for number in range(calls):
            if conversation is conversations[0] and number == calls // 2:
                in_the_middle()
            conversation.increment(base)

    threads = [threading.Thread(target=go_on, args=(conversation,)) for conversation in conversations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check_executions(journal: Path, conversations: list[Conversation]) -> None:
    """Each call ran at most once, those that were answered ran, and all of a conversation in one upstream session."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    ran = [(line["tag"], line["session"]) for line in lines if re.fullmatch(r"c\d-\d+", line["tag"])]
    tags = [tag for tag, _ in ran]
    assert len(tags) == len(set(tags))
    for conversation in conversations:
        answered = {f"{conversation.name}-{i}" for i, outcome in enumerate(conversation.outcomes) if outcome == "ok"}
        assert answered <= set(tags)
        assert len({session for tag, session in ran if tag.startswith(f"{conversation.name}-")}) == 1
