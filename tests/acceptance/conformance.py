"""`make conformance`: the public conformance suite through four workers, every request on the next one.

Whatever the fixture upstream passes directly has to pass through the gateway, in every run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from acceptance.driving import Traffic
from acceptance.environments import node, node_environment, package
from fleet import run_example, run_fleet

SUMMARY = re.compile(r"^([✓✗]) (\S+): \d+ passed, \d+ failed$", re.MULTILINE)
FOLDER = re.compile(r"^server-(.+)-\d{4}-\d\d-\d\dT[\d-]+Z?$")
SEVERITY = ["INFO", "SUCCESS", "SKIPPED", "WARNING", "FAILURE"]


@dataclass
class Results:
    """One run: scenario -> passed, and scenario -> check -> status (the worst, where a check is made repeatedly)."""

    scenarios: dict[str, bool] = field(default_factory=dict)
    checks: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        return sum(self.scenarios.values())

    def lacks(self, expected: Results) -> list[str]:
        """Everything that passes in `expected` and not here."""
        missing = [
            scenario for scenario, passed in expected.scenarios.items() if passed and not self.scenarios.get(scenario)
        ]
        for scenario, checks in expected.checks.items():
            here = self.checks.get(scenario, {})
            missing.extend(
                f"{scenario}: {check} is {here.get(check, 'absent')}"
                for check, status in checks.items()
                if status == "SUCCESS" and here.get(check) != "SUCCESS"
            )
        return missing


def run_suite(url: str, requirements: str, timeout_s: float = 300) -> Results:
    """Run the suite once."""
    results = Results()
    suite = package("@modelcontextprotocol/conformance", "dist/index.js")
    with tempfile.TemporaryDirectory() as folder:
        command = [node(), suite, "server", "--url", url, "--requirements", requirements, "--output-dir", folder]
        done = subprocess.run(
            command, env=node_environment(), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        for mark, scenario in SUMMARY.findall(done.stdout):
            results.scenarios[scenario] = mark == "✓"
        if not results.scenarios:
            raise RuntimeError(f"the suite did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
        for file in Path(folder).glob("*/checks.json"):
            if found := FOLDER.match(file.parent.name):
                _add_checks(results, found[1], json.loads(file.read_text()))
    return results


def _add_checks(results: Results, scenario: str, checks: list[dict[str, str]]) -> None:
    worst = results.checks.setdefault(scenario, {})
    for check in checks:
        status = check["status"]
        if SEVERITY.index(status) >= SEVERITY.index(worst.get(check["id"], "INFO")):
            worst[check["id"]] = status
        if status in ("WARNING", "FAILURE"):
            message = f"{status.lower()} {check['id']}: {check.get('errorMessage', '')}"
            results.messages.setdefault(scenario, []).append(message[:300])


def show(results: Results, title: str) -> None:
    print(f"== {title}")
    for scenario, passed in results.scenarios.items():
        print(f"{'pass' if passed else 'FAIL'}  {scenario}")
        for message in results.messages.get(scenario, []):
            print(f"        {message}")
    print(f"{results.passed} of {len(results.scenarios)}", flush=True)


async def compare(requirements: str, runs: int, at_random: bool) -> bool:
    """Run the suite directly, then through a fleet, and show both; whether nothing got lost on the way."""
    with tempfile.TemporaryDirectory() as name, run_example("conformance_upstream.py", Path(name)) as upstream:
        direct = await asyncio.to_thread(run_suite, upstream.url, requirements)
        show(direct, f"{requirements} directly")
        missing = []
        async with run_fleet(Path(name), {"everything": {"url": upstream.url}}, at_random=at_random) as fleet:
            for number in range(1, runs + 1):
                results = await asyncio.to_thread(run_suite, fleet.url("everything"), requirements)
                show(results, f"{requirements} run {number}")
                missing += results.lacks(direct)
            print(await Traffic.of(fleet))
    for line in missing:
        print(f"passes directly, not through the gateway: {line}")
    return not missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requirements", action="append", choices=["2025-11-25", "2026-07-28"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="a random worker instead of the next one")
    arguments = parser.parse_args()
    same = [
        asyncio.run(compare(requirements, arguments.runs, arguments.random))
        for requirements in arguments.requirements or ["2025-11-25", "2026-07-28"]
    ]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
