"""Measure the kernels on a GPU beside their peers, and write one JSON file.

Usage: ``python benchmarks/gpu.py [--sections copy,decode] [--peers FOLDER] --out FILE.json``.
``benchmarks/stage_peers.py`` makes FOLDER; without it only our own kernels run. ``tq bench`` runs
those too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the command line."""
    from tq_kernels.bench.candidates import TurboQuant
    from tq_kernels.bench.suite import SECTIONS, Suite, commit

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
    suite = Suite(kinds, arguments.out, commit=commit(ROOT), deadline=arguments.seconds)
    suite.run(sections, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
