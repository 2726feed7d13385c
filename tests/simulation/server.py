"""A Redis node in memory: the commands that Leasehold uses, its real Lua scripts, expiry by the node's own clock.

Only what is needed, as the server of that name does it: what a command answers, when a list wakes who blocks on it,
what a script may still do when memory is full. A command that is not known here is a failure of the test.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, Final

from lupa.lua51 import LuaError, LuaRuntime

Value = bytes | dict[bytes, bytes] | list[bytes]

GROWS: Final = frozenset({b"HSET", b"RPUSH", b"SET"})
"""Commands that are refused when memory is full."""


class Refusal(Exception):
    """An error answer."""


class Ok:
    """The status answer `+OK`."""


OK: Final = Ok()


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value; values are replaced, never changed. `expires_ms`: by the node's clock."""

    value: Value
    expires_ms: float | None = None


class RedisNode:
    """One run of one server. `time_s` is true time; the node's own clock is `skew_s` ahead of it."""

    def __init__(
        self,
        time_s: Callable[[], float],
        rng: random.Random,
        *,
        skew_s: float = 0.0,
        data: dict[bytes, Entry] | None = None,
        promoted: bool = False,
    ) -> None:
        self._time_s = time_s
        self.skew_s = skew_s
        self.run_id = rng.randbytes(20).hex()
        self.started_at = time_s()
        self.promoted = promoted
        self.data: dict[bytes, Entry] = dict(data or {})
        self.is_full = False
        self.on_write: Callable[[bytes, Entry | None], None] = lambda _key, _entry: None
        """Called with each change of a key; None: deleted."""
        self.on_script: Callable[[str, list[bytes], list[bytes], Any], None] = lambda _name, _keys, _args, _answer: None
        self.grown: dict[bytes, None] = {}
        """Lists to which something was added since this was last emptied: who blocks on them is to be served."""
        self._scripts: dict[bytes, Any] = {}
        self._wrote = False

    @property
    def now_ms(self) -> float:
        return (self._time_s() + self.skew_s) * 1000

    # -- commands --------------------------------------------------------------------------------------------------

    def execute(self, command: Sequence[bytes]) -> Any:
        """The answer; raises `Refusal`. BLPOP is the business of whoever holds the connection."""
        name = command[0].upper()
        args = list(command[1:])
        words = name.split()  # redis-py sends "SCRIPT LOAD" as two words, a caller may give it as one
        if len(words) > 1:
            name, args = words[0], [*words[1:], *args]
        if name in GROWS and self.is_full and not self._wrote:
            raise Refusal("OOM command not allowed when used memory > 'maxmemory'.")
        handler = getattr(self, f"do_{name.decode().lower()}", None)
        if handler is None:
            raise NotImplementedError(f"the simulated Redis does not know {name!r}")
        return handler(*args)

    def get(self, key: bytes) -> Entry | None:
        """What is under a key, if it has not expired."""
        entry = self.data.get(key)
        if entry is None or (entry.expires_ms is not None and entry.expires_ms <= self.now_ms):
            self.data.pop(key, None)
            return None
        return entry

    def put(self, key: bytes, value: Value, expires_ms: float | None = None) -> None:
        """Write a key; empty lists and hashes are no keys."""
        self._wrote = True
        if value in ([], {}):
            self.data.pop(key, None)
            self.on_write(key, None)
            return
        self.data[key] = entry = Entry(value, expires_ms)
        self.on_write(key, entry)

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        entry = self.get(key)
        value = {} if entry is None else entry.value
        if not isinstance(value, dict):
            raise Refusal("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _list(self, key: bytes) -> list[bytes]:
        entry = self.get(key)
        value = [] if entry is None else entry.value
        if not isinstance(value, list):
            raise Refusal("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _expiry(self, key: bytes) -> float | None:
        entry = self.get(key)
        return None if entry is None else entry.expires_ms

    def do_ping(self) -> bytes:
        return b"PONG"

    def do_client(self, *_what: bytes) -> Ok:
        return OK

    def do_select(self, _db: bytes) -> Ok:
        return OK

    def do_info(self, section: bytes = b"server") -> bytes:
        uptime = int(self._time_s() - self.started_at)
        offset = b"1234" if self.promoted else b"-1"
        texts = {
            b"server": b"# Server\r\nrun_id:%s\r\nuptime_in_seconds:%d\r\nserver_time_usec:%d\r\n"
            % (self.run_id.encode(), uptime, self.now_ms * 1000),
            b"replication": b"# Replication\r\nrole:master\r\nsecond_repl_offset:%s\r\n" % offset,
        }
        return texts[section.lower()]

    def do_role(self) -> list[Any]:
        return [b"master", 0, []]

    def do_time(self) -> list[bytes]:
        microseconds = int(self.now_ms * 1000)
        return [b"%d" % (microseconds // 1_000_000), b"%d" % (microseconds % 1_000_000)]

    def do_exists(self, *keys: bytes) -> int:
        return sum(self.get(key) is not None for key in keys)

    def do_del(self, *keys: bytes) -> int:
        there = [key for key in keys if self.get(key) is not None]
        for key in there:
            del self.data[key]
            self._wrote = True
            self.on_write(key, None)
        return len(there)

    def do_set(self, key: bytes, value: bytes, *options: bytes) -> Ok:
        expires_ms = None
        if options:
            assert options[0].upper() == b"PX"
            expires_ms = self.now_ms + int(options[1])
        self.put(key, value, expires_ms)
        return OK

    def do_get(self, key: bytes) -> bytes | None:
        entry = self.get(key)
        return None if entry is None else entry.value  # type: ignore[return-value]

    def do_pexpire(self, key: bytes, ms: bytes) -> int:
        entry = self.get(key)
        if entry is None:
            return 0
        self.put(key, entry.value, self.now_ms + int(float(ms)))
        return 1

    def do_pttl(self, key: bytes) -> int:
        entry = self.get(key)
        if entry is None:
            return -2
        return -1 if entry.expires_ms is None else int(entry.expires_ms - self.now_ms)

    def do_scan(self, _cursor: bytes, *options: bytes) -> list[Any]:
        """All keys at once."""
        given = dict(zip((name.upper() for name in options[::2]), options[1::2], strict=True))
        pattern = _regex(given.get(b"MATCH", b"*"))
        return [b"0", [key for key in list(self.data) if self.get(key) is not None and pattern.fullmatch(key)]]

    def do_hset(self, key: bytes, *pairs: bytes) -> int:
        before = self._hash(key)
        changes = dict(zip(pairs[::2], pairs[1::2], strict=True))
        self.put(key, {**before, **changes}, self._expiry(key))
        return len(changes.keys() - before.keys())

    def do_hget(self, key: bytes, name: bytes) -> bytes | None:
        return self._hash(key).get(name)

    def do_hmget(self, key: bytes, *names: bytes) -> list[bytes | None]:
        there = self._hash(key)
        return [there.get(name) for name in names]

    def do_hgetall(self, key: bytes) -> list[bytes]:
        return [item for pair in self._hash(key).items() for item in pair]

    def do_hdel(self, key: bytes, *names: bytes) -> int:
        before = self._hash(key)
        after = {name: value for name, value in before.items() if name not in names}
        if len(after) < len(before):
            self.put(key, after, self._expiry(key))
        return len(before) - len(after)

    def do_rpush(self, key: bytes, *elements: bytes) -> int:
        after = [*self._list(key), *elements]
        self.put(key, after, self._expiry(key))
        self.grown[key] = None
        return len(after)

    def do_llen(self, key: bytes) -> int:
        return len(self._list(key))

    def do_lrange(self, key: bytes, start: bytes, stop: bytes) -> list[bytes]:
        first, last = int(start), int(stop)
        assert first >= 0
        assert last >= 0
        return self._list(key)[first : last + 1]

    def do_lpop(self, key: bytes, count: bytes) -> list[bytes] | None:
        there = self._list(key)
        if not there:
            return None
        self.put(key, there[int(count) :], self._expiry(key))
        return there[: int(count)]

    # -- scripts ---------------------------------------------------------------------------------------------------

    def do_script(self, what: bytes, source: bytes) -> bytes:
        assert what.upper() == b"LOAD"
        digest = sha1(source).hexdigest().encode()
        self._scripts[digest] = _compiled(source)
        return digest

    def do_evalsha(self, digest: bytes, count: bytes, *rest: bytes) -> Any:
        if digest not in self._scripts:
            raise Refusal("NOSCRIPT No matching script. Please use EVAL.")
        keys, args = list(rest[: int(count)]), list(rest[int(count) :])
        self._wrote = False
        try:
            answer = _from_lua(self._scripts[digest](_to_lua(keys), _to_lua(args), _bridge(self)))
        except LuaError as error:
            raise Refusal(str(error)) from error
        finally:
            self._wrote = False
        self.on_script(SCRIPT_NAMES.get(digest, ""), keys, args, answer)
        return answer

    def do_eval(self, source: bytes, count: bytes, *rest: bytes) -> Any:
        return self.do_evalsha(self.do_script(b"LOAD", source), count, *rest)


SCRIPT_NAMES: Final[dict[bytes, str]] = {}
"""By digest; filled by whoever wants to know which script ran."""

_LUA: Final = LuaRuntime(encoding=None, unpack_returned_tuples=True, register_eval=False)
_COMPILE: Final = _LUA.eval(
    b"function(source) return assert(loadstring('return function(KEYS, ARGV, redis) ' .. source .. '\\nend'))() end"
)
_REDIS: Final = _LUA.eval(
    b"""function(execute)
  local function run(...)
    local answer = execute(...)
    if type(answer) == 'table' and answer.err and answer.raised then error(answer.err, 0) end
    return answer
  end
  local function try(...)
    local answer = execute(...)
    if type(answer) == 'table' then answer.raised = nil end
    return answer
  end
  return {call = run, pcall = try}
end"""
)
_KNOWN: Final[dict[bytes, Any]] = {}


def _regex(pattern: bytes) -> re.Pattern[bytes]:
    """A glob of `*`, with a backslash before what is meant literally."""
    parts = re.findall(rb"\\.|.", pattern, re.DOTALL)
    return re.compile(b"".join(b".*" if part == b"*" else re.escape(part[-1:]) for part in parts), re.DOTALL)


def _compiled(source: bytes) -> Any:
    if source not in _KNOWN:
        _KNOWN[source] = _COMPILE(source)
    return _KNOWN[source]


def _bridge(node: RedisNode) -> Any:
    def execute(*command: Any) -> Any:
        try:
            return _to_lua(node.execute([_argument(part) for part in command]))
        except Refusal as refusal:
            return _LUA.table_from({b"err": str(refusal).encode(), b"raised": True})

    return _REDIS(execute)


def _argument(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b"%d" % value if value == int(value) else repr(value).encode()


def _to_lua(value: Any) -> Any:
    if value is None:
        return False
    if isinstance(value, Ok):
        return _LUA.table_from({b"ok": b"OK"})
    if isinstance(value, list):
        return _LUA.table_from([_to_lua(item) for item in value])
    return value


def _from_lua(value: Any) -> Any:
    """As Redis turns a script's result into an answer: numbers lose their fraction, a table ends at its first nil."""
    if value is None or value is False:
        return None
    if value is True:
        return 1
    if isinstance(value, bytes):
        return value
    if isinstance(value, int | float):
        return int(value)
    items: list[Any] = []
    while (item := value[len(items) + 1]) is not None:
        items.append(_from_lua(item))
    return items


def packed(answer: Any) -> bytes:
    """An answer in RESP2."""
    if isinstance(answer, Ok):
        return b"+OK\r\n"
    if isinstance(answer, Refusal):
        return b"-%s\r\n" % str(answer).encode()
    if answer is None:
        return b"*-1\r\n"
    if isinstance(answer, int):
        return b":%d\r\n" % answer
    if isinstance(answer, bytes):
        return b"$%d\r\n%s\r\n" % (len(answer), answer)
    return b"*%d\r\n%s" % (len(answer), b"".join(packed(item) for item in answer))
