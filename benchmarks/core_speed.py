"""Speed of tq-core on one core: encoding, and search against faiss' product quantization.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/core_speed.py [output.json]``; needs faiss-cpu. Times are
CPU times of the process, the best of several repeats, so that other work on the machine counts
little. Codes of the search are those of random vectors; times do not depend on their values.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tq_core import CodeIndex, MSEQuantizer
from tq_core.reproduce.command import environment

VECTORS = 1_000_000
DIM = 200
BITS = 4
TOP = 10


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Least CPU time of a call."""
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return float(best)


def encoding() -> list[dict[str, Any]]:
    """Vectors a second and core, d = 128."""
    x = np.random.default_rng(0).standard_normal((200_000, 128)).astype(np.float32)
    rows = []
    for dtype in ("float64", "float32"):
        for rotation in ("haar", "hadamard"):
            for bits in (2, 3, 4, 8):
                quantizer = MSEQuantizer(128, bits, rotation, compute_dtype=dtype)
                some = x if dtype == "float32" else x[:50_000]
                quantizer.encode(some[:4096])
                seconds = cpu_seconds(lambda q=quantizer, s=some: q.encode(s), 3)
                rows.append(
                    {
                        "dim": 128,
                        "bits": bits,
                        "rotation": rotation,
                        "compute_dtype": dtype,
                        "vectors_per_second": len(some) / seconds,
                    }
                )
                print(rows[-1])
    return rows


def search() -> list[dict[str, Any]]:
    """Milliseconds a query for the best 10 of a million codes of d = 200, 100 bytes each."""
    rng = np.random.default_rng(1)
    faiss.omp_set_num_threads(1)
    index = CodeIndex(MSEQuantizer(DIM, BITS, "haar", "unbiased", compute_dtype="float32"))
    for _ in range(20):
        index.add(rng.standard_normal((VECTORS // 20, DIM)).astype(np.float32))
    plain = faiss.IndexPQ(DIM, DIM * BITS // 8, 8)
    packed = faiss.IndexPQFastScan(DIM, DIM * BITS // 4, 4)
    sample = rng.standard_normal((10_000, DIM)).astype(np.float32)
    for peer in (plain, packed):
        peer.pq.cp.niter = 2  # times do not depend on how good the codebooks are
        peer.train(sample)
    plain.add_sa_codes(rng.integers(0, 256, (VECTORS, DIM * BITS // 8), dtype=np.uint8))
    for _ in range(20):
        packed.add(rng.standard_normal((VECTORS // 20, DIM)).astype(np.float32))
    indexes = {
        "TurboQuant": (index, 4),
        "faiss IndexPQ, 8-bit codebooks": (plain, 0),
        "faiss IndexPQFastScan, 4-bit codebooks": (packed, 0),
    }
    rows = []
    for count in (1, 4, 16, 64):
        q = rng.standard_normal((count, DIM)).astype(np.float32)
        for name, (one, scale) in indexes.items():
            one.search(q, TOP)
            seconds = cpu_seconds(lambda i=one, q=q: i.search(q, TOP), 2)
            rows.append(
                {
                    "index": name,
                    "bytes_per_vector": DIM * BITS // 8 + scale,
                    "queries": count,
                    "milliseconds_per_query": 1e3 * seconds / count,
                }
            )
            print(rows[-1])
    return rows


def main() -> None:
    """Measure and write the result file."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "core-speed.json")
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    result = {"environment": environment() | {"processor": cpu}}
    result |= {"encoding": encoding(), "search": search()}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
