"""The counter server over stdio: the process is the session."""

import argparse
from pathlib import Path

from counter_tools import Journal, build_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--journal", type=Path, help="append every execution to this file")
    args = parser.parse_args()
    build_server(Journal(args.journal)).run("stdio")


if __name__ == "__main__":
    main()
