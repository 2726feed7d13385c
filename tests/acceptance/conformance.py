"""Runs the public conformance suite against a URL and compares: what passes directly has to pass here.

Without `--expect` and `--against` every scenario has to pass.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from environments import ensure_node, node_environment, package

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

    def lacks(self, expected: "Results") -> list[str]:
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
        command = [ensure_node(), suite, "server", "--url", url, "--requirements", requirements, "--output-dir", folder]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--requirements", default="2025-11-25", choices=["2025-11-25", "2026-07-28"])
    parser.add_argument("--runs", type=int, default=1)
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--against", metavar="URL", help="run against this URL first, and expect what passes there")
    reference.add_argument("--expect", type=Path, metavar="FILE", help="expect what passes in a file of --save")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the first run to this file")
    args = parser.parse_args()

    expected = None
    if args.against:
        expected = run_suite(args.against, args.requirements)
        show(expected, f"{args.requirements} directly")
    elif args.expect:
        expected = Results(**json.loads(args.expect.read_text()))

    failed = False
    for number in range(1, args.runs + 1):
        results = run_suite(args.url, args.requirements)
        show(results, f"{args.requirements} run {number}")
        if args.save and number == 1:
            content = {"scenarios": results.scenarios, "checks": results.checks}
            args.save.write_text(json.dumps(content, indent=1) + "\n")
        if expected is None:
            failed |= results.passed < len(results.scenarios)
            continue
        for missing in results.lacks(expected):
            failed = True
            print(f"passes directly, not here: {missing}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
