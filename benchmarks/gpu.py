"""Measure the kernels on a GPU beside their peers, and write one JSON file.

Usage: ``python benchmarks/gpu.py [--sections copy,decode] [--peers FOLDER] --out FILE.json``.
``benchmarks/stage_peers.py`` makes FOLDER; without it only our own kernels run. ``tq bench`` runs
those too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit of this checkout, or the variable TQ_COMMIT where there is no checkout."""
    if "TQ_COMMIT" in os.environ:
        return os.environ["TQ_COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    """Run the command line."""
    from tq_kernels.bench.candidates import TurboQuant
    from tq_kernels.bench.suite import SECTIONS, Suite

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="names, separated by commas")
    parser.add_argument("--peers", type=Path, help="folder that stage_peers.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 1)))
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no sections {unknown}; choose from {list(SECTIONS)}")
    kinds = [TurboQuant]
    if arguments.peers is not None:
        import peers

        os.environ[peers.PEERS] = str(arguments.peers.resolve())
        kinds += peers.ALL
    suite = Suite(kinds, arguments.out, commit=commit(), deadline=arguments.seconds)
    suite.run(sections, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
