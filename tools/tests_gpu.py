"""Run the tests of tq-kernels on this machine's GPU, and note what came of them.

Usage: ``python tools/tests_gpu.py --out benchmarks/results/tests-NAME.json [-- PYTEST ARGUMENTS]``.
Needs pytest, pytest-xdist and hypothesis beside the packages. The file is written as well when tests
fail, after ``--limit`` seconds, and after an interrupt or termination: with the counts so far, and
``"complete": false``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "packages" / "tq-kernels" / "tests"
#: Processes at most: each holds a context on the GPU.
MOST_WORKERS = 15


class Recorder:
    """A plugin of pytest that keeps the outcome of each test and writes them to a file."""

    def __init__(self, out: Path | None, fixed: dict[str, Any]) -> None:
        self.out, self.fixed = out, fixed
        self.outcomes: dict[str, str] = {}
        self.collected: int | None = None
        self.began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a step of a test says; a failure of any step is that of the test."""
        if report.failed or (self.outcomes.get(report.nodeid) != "failed" and not report.passed):
            self.outcomes[report.nodeid] = report.outcome
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep a file that cannot be read as a failed test."""
        if report.failed:
            self.outcomes[report.nodeid] = "failed"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the tests, where this process runs them itself."""
        self.collected = len(session.items) or self.collected

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count the tests."""
        self.collected = len(ids)

    def pytest_keyboard_interrupt(self) -> None:
        """Write what there is before workers are stopped, which takes a while."""
        self.write(complete=False)

    def write(self, complete: bool) -> dict[str, Any]:
        """Write the result, and return it."""
        counts = Counter(self.outcomes.values())
        result = self.fixed | {
            "complete": complete,
            "seconds": round(time.monotonic() - self.began, 1),
            "collected": self.collected,
            **{name: counts[name] for name in ("passed", "failed", "skipped")},
            "failed_tests": sorted(n for n, o in self.outcomes.items() if o == "failed"),
        }
        if self.out is not None:
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "-n",
        "--workers",
        type=int,
        default=min(MOST_WORKERS, len(os.sched_getaffinity(0))),
        help="processes that share the tests",
    )
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which to stop")
    parser.add_argument("--tests", type=Path, default=TESTS, help="folder or file of tests")
    arguments, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

    import torch
    from tq_kernels.bench.suite import commit, machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recorder = Recorder(
        arguments.out and arguments.out.resolve(),
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(ROOT),
            "machine": machine(device),
            "workers": arguments.workers,
            "pytest_arguments": rest,
        },
    )
    # pytest stops in order, and its workers too, at what an interrupt from the keyboard raises.
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, arguments.limit)
    shared = ["-n", str(arguments.workers), "--dist", "worksteal"] if arguments.workers else []
    status = pytest.main(
        ["-q", "--durations=15", *shared, str(arguments.tests), *rest], plugins=[recorder]
    )
    signal.setitimer(signal.ITIMER_REAL, 0)
    ended = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    result = recorder.write(complete=ended)
    print(*(f"{name} {result[name]}" for name in ("passed", "failed", "skipped", "complete")))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
