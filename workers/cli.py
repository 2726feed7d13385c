"""The command `leasehold`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..coordinator import CoordinatorError, Directory, Keys, RedisClients, SessionRecord, list_peers
from ..coordinator.embedded import EmbeddedRedisError
from ..pool import Config, ConfigError, load_config
from .errors import ServeError
from .logs import configure_logs
from .settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from .operator import Operator

T = TypeVar("T")

MACHINE_WIDTH: Final = 1000
"""Where no terminal says how wide it is, lines are whole: they are for grep."""


class CommandError(Exception):
    """Raised when a command did not do what it is for; the message is for the operator."""


app = typer.Typer(
    name="leasehold",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take "[default: ...]" for markup
)
workers_app = typer.Typer(help="Workers of the fleet.", no_args_is_help=True)
sessions_app = typer.Typer(help="Sessions of the fleet.", no_args_is_help=True)
config_app = typer.Typer(help="The configuration file.", no_args_is_help=True)
app.add_typer(workers_app, name="workers")
app.add_typer(sessions_app, name="sessions")
app.add_typer(config_app, name="config")

ConfigPath = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="File with `mcpServers`. [default: $LEASEHOLD_CONFIG or mcp.json]"),
]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="Redis URL. [default: $LEASEHOLD_REDIS_URL or $REDIS_URL]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"leasehold {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """A distributed MCP session pool: any worker answers any request."""


@app.command()
def serve(
    config: ConfigPath = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one. [default: 8333]")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes. [default: 1]")] = None,
    redis: RedisUrl = None,
) -> None:
    """Serve the MCP servers of CONFIG at /servers/{name}/mcp.

    Without a Redis URL a private Redis server is started and stopped with the command; several machines need one of
    their own, and LEASEHOLD_SECRET.
    """
    settings = load_settings(os.environ, config=config, host=host, port=port, workers=workers, redis_url=redis)
    configure_logs(settings.log_level, settings.log_format)
    loaded = _load(settings.config)
    for warning in loaded.warnings:
        Console(stderr=True).print(f"warning: {warning}", markup=False, highlight=False)
    from .supervisor import Supervisor  # the listings need none of it

    raise typer.Exit(Supervisor(settings, loaded).run())


WorkerName = Annotated[str, typer.Argument(metavar="WORKER", help="As `workers ls` shows it, or its beginning.")]
SessionName = Annotated[str, typer.Argument(metavar="SESSION", help="As `sessions ls` shows it, or its beginning.")]


@app.command()
def drain(
    worker: WorkerName,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until nothing is left on it.")] = 0,
    redis: RedisUrl = None,
    as_json: Json = False,
) -> None:
    """Have WORKER take no more sessions, and hand those that can move to the others.

    It goes on to live, and to serve what cannot move (stdio, SSE), until it is stopped. Exit code 1 if something is
    left on it when the time to wait is over.
    """
    settings = _operator_settings(redis)
    peer, status = _operate(settings, lambda operator: operator.drain(worker, wait))
    if as_json:
        _print_json({"incarnation": peer.incarnation, **status})
    else:
        left = f"{status['sessions']} sessions are left on it, {status['pinned']} of them pinned"
        print(f"{peer.incarnation[:8]}: drained; {left}, and {status['in_flight']} calls and streams in flight")
    if wait and (status["sessions"] or status["in_flight"]):
        raise typer.Exit(1)


@sessions_app.command("show")
def show_session(session: SessionName, redis: RedisUrl = None, as_json: Json = False) -> None:
    """Show what is known of SESSION, and what its owner says of it."""
    shown = _operate(_operator_settings(redis), lambda operator: operator.show(session))
    if as_json:
        _print_json(shown)
    else:
        _print_table(["", ""], [[name, value] for name, value in shown.items()])


@sessions_app.command("move")
def move_session(
    session: SessionName,
    to: Annotated[str | None, typer.Option(metavar="WORKER", help="Where to. [default: any other]")] = None,
    redis: RedisUrl = None,
) -> None:
    """Have another worker continue SESSION. Calls that run go on to their answers; clients notice nothing."""
    record, owner = _operate(_operator_settings(redis), lambda operator: operator.move(session, to))
    print(f"{record.key[:12]}: {record.registration.owner[:8] or '-'} -> {owner[:8]}")


@sessions_app.command("evict")
def evict_session(session: SessionName, redis: RedisUrl = None) -> None:
    """End SESSION, here and at its server. Its client gets 404, and has to initialize again."""
    record = _operate(_operator_settings(redis), lambda operator: operator.evict(session))
    print(f"{record.key[:12]}: ended")


@workers_app.command("ls")
def list_workers(redis: RedisUrl = None, as_json: Json = False) -> None:
    """List the workers that have a lease."""
    settings = load_settings(os.environ, serving=False, redis_url=redis)

    async def read() -> list[dict[str, Any]]:
        client = RedisClients(_redis_url(settings)).lookups()
        async with client:
            peers = await list_peers(client, Keys(settings.namespace))
        return [{"incarnation": peer.incarnation, "lease_ms": peer.lease_ms, **peer.info} for peer in peers]

    rows = _read(read(), settings)
    rows = [row for row in rows if row.get("role") != "operator"]
    if as_json:
        _print_json(rows)
        return
    _print_table(
        ["worker", "role", "host", "pid", "started", "lease"],
        [
            [
                row["incarnation"][:8],
                row.get("role", ""),
                row.get("host", ""),
                row.get("pid", ""),
                row.get("started", ""),
                f"{row['lease_ms']} ms",
            ]
            for row in rows
        ],
    )


@sessions_app.command("ls")
def list_sessions(redis: RedisUrl = None, as_json: Json = False) -> None:
    """List the sessions of all workers. Session ids are secrets and not known here; a session is named by their
    SHA-256."""
    settings = load_settings(os.environ, serving=False, redis_url=redis)

    async def read() -> list[SessionRecord]:
        client = RedisClients(_redis_url(settings)).lookups()
        async with client:
            return [record async for record in Directory(client, Keys(settings.namespace)).scan()]

    records = sorted(_read(read(), settings), key=lambda record: (record.upstream, record.created_ms))
    rows: list[dict[str, Any]] = [
        {
            "session": record.key,
            "server": record.upstream,
            "principal": record.principal,
            "owner": record.registration.owner,
            "epoch": record.registration.epoch,
            "created_ms": record.created_ms,
            "ttl_ms": record.ttl_ms,
            "adoptable": record.resume is not None,
        }
        for record in records
    ]
    if as_json:
        _print_json(rows)
        return
    now_ms = int(time.time() * 1000)
    _print_table(
        ["session", "server", "principal", "owner", "age", "adoptable"],
        [
            [
                row["session"][:12],
                row["server"],
                row["principal"],
                row["owner"][:8],
                f"{max(0, now_ms - row['created_ms']) // 1000} s",
                "yes" if row["adoptable"] else "no",
            ]
            for row in rows
        ],
    )


@config_app.command("check")
def check_config(config: ConfigPath = None, as_json: Json = False) -> None:
    """Check CONFIG and the LEASEHOLD_ variables; prints what would be served. Exit code 2 when something is wrong."""
    settings = load_settings(os.environ, serving=False, config=config)
    loaded = _load(settings.config)
    rows = [
        {
            "server": name,
            "type": upstream.target.transport,
            "affinity": upstream.affinity,
            "target": repr(upstream.target),
        }
        for name, upstream in loaded.servers.items()
    ]
    if as_json:
        _print_json({"servers": rows, "disabled": list(loaded.disabled), "warnings": list(loaded.warnings)})
        return
    _print_table(["server", "type", "affinity", "target"], [list(row.values()) for row in rows])
    for warning in loaded.warnings:
        print(f"warning: {warning}")
    print(f"{loaded.source}: ok")


def main() -> int:
    """Entry point: what is wrong is one clear message; exit code 2 for what is configured wrong, 1 for what failed."""
    try:
        app()  # exits by itself, with typer's own message for a wrong flag
    except (ConfigError, SettingsError) as error:
        return _fail(str(error), 2)
    except (ServeError, EmbeddedRedisError, CommandError) as error:
        return _fail(str(error), 1)
    return 0


def _load(path: Path | None) -> Config:
    return load_config(path or Path("mcp.json"), os.environ)


def _redis_url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise SettingsError(
            "LEASEHOLD_REDIS_URL: expected the Redis URL of the fleet (or --redis URL); "
            "`leasehold serve` without one logs that of its private server"
        )
    return settings.redis_url.get_secret_value()


def _operator_settings(redis: str | None) -> Settings:
    settings = load_settings(os.environ, serving=False, redis_url=redis)
    _redis_url(settings)
    if not settings.secret:
        raise SettingsError(
            "LEASEHOLD_SECRET: expected the secret of the fleet: what is asked of its workers is sealed with it"
        )
    return settings


def _operate(settings: Settings, work: Callable[[Operator], Awaitable[T]]) -> T:
    """Be a member of the fleet for one command."""
    from .control_client import ControlError
    from .operator import operator

    async def working() -> T:
        async with operator(settings, RedisClients(_redis_url(settings))) as member:
            return await work(member)

    configure_logs("error", settings.log_format)
    try:
        return _read(working(), settings)
    except ControlError as error:
        raise CommandError(str(error)) from None


def _read(reading: Coroutine[Any, Any, T], settings: Settings) -> T:
    try:
        return asyncio.run(reading)
    except CoordinatorError as error:
        place = RedisClients(_redis_url(settings)).place
        raise CommandError(f"Redis at {place} does not answer: {error}") from None


def _print_json(value: Any) -> None:
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def _print_table(columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, highlight=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    if not rows:
        print("none")
        return
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = MACHINE_WIDTH
    console.print(table)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"leasehold: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
