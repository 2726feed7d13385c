"""`make chaos`: faults in a seeded order for some minutes, real processes and clients, and a checker at the end.

    make chaos ARGS="--seed 7 --minutes 20"
    make chaos ARGS="--seed 7 --faults freeze,redis_empty --minutes 2"

The same seed makes the same faults to the same workers in the same order; what the machine does in between is its own.
The last stage is a failover under Sentinel to a replica that lags. The exit code is 1 when there was a violation; the
journals are then in results/.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Final

import uvloop

TESTS = Path(__file__).resolve().parent.parent
sys.path[0] = str(TESTS)  # not this folder, which has the name of a package

from chaos.breakage import FAULTS, break_and_recover, schedule  # noqa: E402
from chaos.checker import Report  # noqa: E402
from chaos.harness import chaos_stage  # noqa: E402

RESULTS = TESTS.parent / "results"
UNDER_SENTINEL: Final = ("kill_mid_call", "failover", "freeze")


async def stage(arguments: argparse.Namespace, names: Iterator[str], *, sentinel: bool = False) -> Report:
    """Faults until there are no more names, or the time is over."""
    begun = monotonic()
    seed = arguments.seed
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        async with chaos_stage(
            Path(folder), seed, workers=arguments.workers, clients=arguments.clients, sentinel=sentinel
        ) as chaos:
            history = chaos.history
            for name in names:
                if monotonic() - begun > arguments.minutes * 60:
                    break
                sent = len(history.calls)
                await break_and_recover(chaos, name)
                took = history.recoveries[-1].seconds
                recovered = "not recovered" if took is None else f"recovered in {took:.2f} s"
                at = monotonic() - begun
                print(f"{at:7.1f} s  {name:<18} {recovered}, {len(history.calls) - sent:,} calls", flush=True)
            report = await chaos.judged()
            print(report, *(f"VIOLATION {violation}" for violation in report.violations), sep="\n", flush=True)
            if report.violations:
                name = f"chaos-{seed}{'-sentinel' if sentinel else ''}"
                history.write(RESULTS / f"{name}.jsonl")
                for node in chaos.nodes:
                    (RESULTS / f"{name}-{node.name}.log").write_text(node.log())
                print(f"journals: {RESULTS / name}*", flush=True)
    return report


async def run(arguments: argparse.Namespace) -> bool:
    """Whether there was no violation."""
    names = islice(schedule(arguments.seed, arguments.faults or list(FAULTS)), arguments.count)
    reports = [await stage(arguments, names)]
    if arguments.faults is None:
        reports.append(await stage(arguments, iter(UNDER_SENTINEL), sentinel=True))
    return not any(report.violations for report in reports)


def fault_names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(FAULTS):
        raise argparse.ArgumentTypeError(f"out of {', '.join(FAULTS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--minutes", type=float, default=10.0, help="no fault begins after so long")
    parser.add_argument("--count", type=int, help="at most so many faults")
    parser.add_argument("--faults", type=fault_names, metavar="NAME,NAME", help="only these, without Sentinel")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=12)
    arguments = parser.parse_args()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections break here all the time
    print(f"seed {arguments.seed}", flush=True)
    return 0 if uvloop.run(run(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
