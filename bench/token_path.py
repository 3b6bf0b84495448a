"""The way of a token, measured: this gateway beside a reference and a bare loop, in turns, on the same host.

    python bench/token_path.py [--quick] [--only CASE ...] [--rounds N]

Starts all that it needs on loopback and stops it. Prints a table and, as the last line, the same as JSON.
README.md says how to read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from typing import NoReturn

from cases import CASES, Case, Load
from processes import BenchError
from report import Measured, print_header, print_ratios, print_row, ratios
from stage import Stage

TIME_LIMIT_SECONDS = 450.0
"""What has not begun by then is skipped."""
HARD_LIMIT_SECONDS = 570
"""What has not ended by then is broken off."""
QUICK_TOKENS = 64


class TimeUp(Exception):
    """All together takes too long."""


def main() -> None:
    """Measure, print, stop."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    signal.signal(signal.SIGALRM, break_off)
    signal.alarm(HARD_LIMIT_SECONDS)
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    rows: list[Measured] = []
    failures: list[str] = []
    print_header()
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        if time.monotonic() > deadline:
            failures.append(f"{case.name}: skipped, the time is up")
            continue
        stage = Stage(
            quickened(case) if arguments.quick else case,
            rounds=arguments.rounds,
            threads=arguments.threads,
            use_generate=arguments.use_generate,
        )
        try:
            with stage:
                for row in stage.measure(deadline, arguments.users):
                    print_row(row)
                    rows.append(row)
        except (BenchError, TimeUp) as error:
            failures.append(f"{case.name}: {error}")
            print(f"    failed: {error}", flush=True)
    figures = ratios(rows)
    print_ratios(figures)
    print(json.dumps({"rows": [row.as_json() for row in rows], "ratios": figures, "failures": failures}))
    if failures:
        sys.exit(1)


def break_off(*_: object) -> NoReturn:
    """What the alarm does."""
    raise TimeUp(f"broken off after {HARD_LIMIT_SECONDS} s")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round each, to try it")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--users", type=int, nargs="+", default=(), help="only loads with so many users")
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 9), help="of each contender and load (default: 3)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="of torch in each process (default: as torch chooses)"
    )
    parser.add_argument(
        "--use-generate", action="store_true", help="the reference calls transformers' generate()"
    )
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    return arguments


def quickened(case: Case) -> Case:
    """The case with shorter rounds."""

    def shorter(load: Load) -> Load:
        return dataclasses.replace(load, tokens=min(load.tokens, QUICK_TOKENS))

    return dataclasses.replace(case, loads=tuple(map(shorter, case.loads)))


if __name__ == "__main__":
    main()
