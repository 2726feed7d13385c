"""A stdio server that does what its requests tell it to. Run as `python -I -S fake_stdio.py`: it starts in 15 ms.

Every method answers `{}` unless it says otherwise. Lines go out exactly as given.
"""

import json
import os
import signal
import subprocess
import sys
import time

heard: list[str] = []
held: dict[str, object] = {}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def answer(identifier: object, result: object) -> None:
    say(json.dumps({"jsonrpc": "2.0", "id": identifier, "result": result}))


def handle(line: str) -> None:
    message = json.loads(line)
    method, params, identifier = message.get("method"), message.get("params", {}), message.get("id")
    heard.append(line)
    if "id" not in message or method is None:
        return
    for raw in params.get("lines", []):
        say(raw)
    result: object = {}
    match method:
        case "hold":  # answered by `release` with the same name
            held[params["name"]] = identifier
            return
        case "release":
            answer(held.pop(params["name"]), {"released": params["name"]})
        case "say":  # `lines` only
            if params.get("mute"):
                return
        case "heard":
            result = list(heard)
        case "environment":
            result = dict(os.environ)
        case "where":
            result = os.getcwd()
        case "big":
            result = "x" * params["bytes"]
        case "flood":
            for _ in range(params["count"]):
                say('{"jsonrpc":"2.0","method":"notifications/flood","params":"%s"}' % ("x" * params["bytes"]))
        case "size":
            result = len(line)
        case "deaf":  # reads nothing until a file exists
            answer(identifier, {})
            while not os.path.exists(params["until"]):
                time.sleep(0.005)
            return
        case "stderr":
            for _ in range(params["count"]):
                sys.stderr.write("y" * params["chars"] + "\n")
            sys.stderr.flush()
        case "child":  # one that outlives us unless somebody ends it
            keep = None if params.get("keeps_stdout") else subprocess.DEVNULL
            read, write = os.pipe()
            ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if params.get("stubborn") else ""
            code = f"import os, signal, time\n{ignore}\nos.write({write}, b'.')\ntime.sleep(1000)"
            grandchild = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.DEVNULL, stdout=keep, pass_fds=[write]
            )
            os.read(read, 1)
            result = grandchild.pid
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            answer(identifier, os.getpid())
            while True:
                time.sleep(1000)
        case "close":
            os.close(params["fd"])
            time.sleep(1000)
        case "exit":
            if params.get("answer"):
                answer(identifier, {})
            os._exit(params["status"])
    answer(identifier, result)


for received in sys.stdin.buffer:
    handle(received.decode().removesuffix("\n"))
