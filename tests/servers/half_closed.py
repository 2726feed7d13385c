"""An MCP server on stdio that answers the handshake and then closes one of its ends, but lives on."""

import json
import os
import sys
import time

for line in sys.stdin:
    message = json.loads(line)
    if message.get("method") == "initialize":
        result = {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "serverInfo": {"name": "half closed", "version": "1"},
        }
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
    else:
        break
if sys.argv[1] == "never-answers":
    time.sleep(3600)
os.close(0 if sys.argv[1] == "stdin" else 1)
time.sleep(3600)
