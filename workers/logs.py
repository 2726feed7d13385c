"""Logs: one line an event, `event key=value ...`, as text or as JSON. Payloads and credentials are never logged."""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Final

import orjson

FIELD: Final = re.compile(r"(\w+)=(\S+)")


class TextFormatter(logging.Formatter):
    """`2026-07-28T12:00:00.000Z INFO leasehold.workers.worker[123] worker_ready incarnation=0a1b2c3d`"""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {record.name}[{record.process}] {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """The same as one JSON object a line, the event's fields beside `event`."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "event": message.partition(" ")[0],
            "message": message,
            **{f"{name}": value for name, value in FIELD.findall(message) if name not in ("time", "level", "logger")},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


def configure_logs(level: str, form: str) -> None:
    """Send the logs of this process to its standard error. Called once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("leasehold").setLevel(level.upper())
    # An answer that was cut off on purpose is no error of the server's: what matters is logged by the gateway itself.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
