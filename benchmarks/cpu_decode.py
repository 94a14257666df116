"""Time decode on codes against attention of PyTorch on the CPU, one query on a long prefix.

``python benchmarks/cpu_decode.py`` writes ``benchmarks/results/cpu-decode.json``. The ways take
turns in one process, so that whatever else the machine does hits them alike; medians are reported,
of wall time and of processor time. On a busy machine only the latter means something, and only for
one thread (``--threads 1``): threads that wait for each other count as busy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tq_kernels import KVFormat, TokenCodes, attend_codes, attend_dense, encode_tokens

HEADS, KV_HEADS, DIM = 32, 8, 128
OUT = Path(__file__).parent / "results" / "cpu-decode.json"


def encode(x: torch.Tensor, fmt: KVFormat, kind: str) -> TokenCodes:
    """Codes of ``x`` [1, kv_heads, tokens, head_dim], a few thousand tokens at a time."""
    parts = [
        encode_tokens(x[:, :, i : i + 4096].float(), fmt, kind) for i in range(0, x.shape[2], 4096)
    ]
    planes = zip(*(p.planes for p in parts), strict=True)
    return TokenCodes(
        tuple(torch.cat(p, dim=2) for p in planes), torch.cat([p.scales for p in parts], dim=2)
    )


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every way, wall time and processor time, taken in turns."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times: dict[str, dict[str, list[float]]] = {n: {c: [] for c in clocks} for n in ways}
    for call in ways.values():
        call()
    for _ in range(rounds):
        for name, call in ways.items():
            starts = {clock: read() for clock, read in clocks.items()}
            call()
            for clock, read in clocks.items():
                times[name][clock].append(read() - starts[clock])
    return {
        name: {f"{clock}_ms": 1e3 * statistics.median(t) for clock, t in taken.items()}
        for name, taken in times.items()
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, 1, DIM, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, KV_HEADS, options.tokens, DIM, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        given = tuple(t.to(dtype) for t in (q, k, v))
        ways[f"sdpa-{str(dtype)[6:]}"] = lambda given=given: (
            torch.nn.functional.scaled_dot_product_attention(*given, enable_gqa=True)
        )
    errors = {}
    exact = attend_dense(q.float(), k, v)[0].double()
    for bits in (4, 3, 2, 8):
        fmt = KVFormat(DIM, bits, bits)
        keys, values = encode(k, fmt, "k"), encode(v, fmt, "v")
        name = f"k{bits}v{bits}"
        ways[name] = lambda fmt=fmt, keys=keys, values=values: attend_codes(q, keys, values, fmt)
        with torch.inference_mode():
            out = attend_codes(q, keys, values, fmt)[0].double()
            full = attend_codes(q.float(), keys, values, fmt)[0].double()
        errors[name] = {
            "of_arithmetic": float((out - full).norm() / full.norm()),
            "of_codes": float((full - exact).norm() / exact.norm()),
        }
    with torch.inference_mode():
        times = measure(ways, options.rounds)
    base = times["sdpa-bfloat16"]
    for taken in times.values():
        for clock in ("wall", "processor"):
            taken[f"{clock}_ratio"] = taken[f"{clock}_ms"] / base[f"{clock}_ms"]
    result = {
        "what": {
            "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "batch": 1, "queries": 1,
            "tokens": options.tokens, "dtype": "bfloat16", "rounds": options.rounds,
        },
        "where": {
            "processor": processor(), "threads": options.threads, "torch": torch.__version__,
            "python": platform.python_version(),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "times": times,
        "relative_errors": errors,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, t in times.items():
        print(
            f"{name:14} {t['wall_ms']:8.2f} ms {t['wall_ratio']:6.2f}x   "
            f"processor {t['processor_ms']:8.2f} ms {t['processor_ratio']:6.2f}x"
        )


if __name__ == "__main__":
    main()
