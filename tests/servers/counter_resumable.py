"""The counter server over streamable HTTP, with an event store: its events have ids, and streams can be resumed."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from conformance_upstream import RecentEvents
from counter_http import serve
from counter_tools import Journal, build_server

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--journal", type=Path, help="append every execution to this file")
    args = parser.parse_args()
    serve(build_server(Journal(args.journal)).streamable_http_app(event_store=RecentEvents()), args.port)
