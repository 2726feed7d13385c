"""`make conformance`: the public conformance suite through four workers, every request on the next one.

Whatever the fixture upstream passes directly has to pass through the gateway, in every run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fleet import run_example, run_fleet

HERE = Path(__file__).resolve().parent


async def run(requirements: str, runs: int, at_random: bool) -> int:
    with tempfile.TemporaryDirectory() as name, run_example("conformance_upstream.py", Path(name)) as upstream:
        async with run_fleet(Path(name), {"everything": {"url": upstream.url}}, at_random=at_random) as fleet:
            suite = await asyncio.create_subprocess_exec(
                sys.executable,
                str(HERE / "conformance.py"),
                *("--url", fleet.url("everything"), "--against", upstream.url),
                *("--requirements", requirements, "--runs", str(runs)),
            )
            code = await suite.wait()
            print(
                f"requests local {fleet.metric('leasehold_calls_local'):g}, "
                f"forwarded {fleet.metric('leasehold_calls_forwarded'):g}, "
                f"per worker {fleet.proxy.served if fleet.proxy else []}"
            )
            return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requirements", action="append", choices=["2025-11-25", "2026-07-28"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="a random worker instead of the next one")
    arguments = parser.parse_args()
    codes = [
        asyncio.run(run(requirements, arguments.runs, arguments.random))
        for requirements in arguments.requirements or ["2025-11-25", "2026-07-28"]
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
