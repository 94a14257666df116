"""Run every kernel on a few small shapes under NVIDIA's compute-sanitizer, and note what it finds.

Usage: ``python tools/sanitize.py --out benchmarks/results/sanitizer-NAME.json``. Needs a GPU and
``compute-sanitizer`` of the CUDA toolkit. *memcheck* finds accesses outside of allocations and
misaligned ones, *racecheck* hazards in shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
FORMATS = ((128, 4, 4, 16), (128, 3, 3, 32), (64, 2, 8, 16), (80, 4, 3, 16))


def sweep() -> None:
    """Store, dequantize, rotate, decode and prefill of each format, on few tokens."""
    import torch
    from tq_kernels import KVFormat, decode, dequantize, prefill, rotate, store
    from tq_kernels.testing import random_cache

    device = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=device).bfloat16()

    for dim, k_bits, v_bits, page_size in FORMATS:
        fmt = KVFormat(dim, k_bits, v_bits, page_size=page_size)
        cache = random_cache(fmt, 2, [1, page_size + 1, 150]).to(device)
        pages, table, seq_lens = cache.pages, cache.block_table, cache.seq_lens
        slots = torch.cat([cache.slots(n) for n in range(3)])
        store(normal(len(slots), 2, dim), normal(len(slots), 2, dim), pages, slots, fmt)
        dequantize(pages, slots, fmt)
        rotate(normal(5, 2, dim), fmt)
        for counts in ([1, 1, 1], [1, 4, 3]):
            cu = torch.tensor([0, *counts], device=device).cumsum(0).int()
            decode(normal(sum(counts), 8, dim), pages, table, seq_lens, fmt, cu_query_lens=cu)
        new = [3, 40, 1]
        cu = torch.tensor([0, *new], device=device).cumsum(0).int()
        k, v = normal(sum(new), 2, dim), normal(sum(new), 2, dim)
        prefill(normal(sum(new), 8, dim), k, v, pages, table, cu, seq_lens - 1, fmt)
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--sweep", action="store_true", help="only run the kernels")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
        return 0
    import torch
    from tq_kernels.bench.suite import machine

    command = [sys.executable, __file__, "--sweep"]
    subprocess.run(command, check=True)  # compiles, which need not be watched
    # Each tensor an allocation of its own, so that no access outside of one falls into another.
    watched = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    for tool in TOOLS:
        began = time.monotonic()
        ran = subprocess.run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command],
            env=watched,
            capture_output=True,
            text=True,
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", ran.stdout + ran.stderr)
        found[tool] = {
            "exit_status": ran.returncode,
            "summary": summary[-1] if summary else None,
            "seconds": round(time.monotonic() - began, 1),
        }
        print(tool, found[tool], flush=True)
        if ran.returncode:
            print((ran.stdout + ran.stderr)[-3000:])
    if arguments.out is not None:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": os.environ.get("TQ_COMMIT"),
            "machine": machine(torch.device("cuda")),
            "formats": [dict(zip(("head_dim", "k_bits", "v_bits", "page_size"), f, strict=True))
                        for f in FORMATS],
            "tools": found,
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return max(t["exit_status"] for t in found.values())


if __name__ == "__main__":
    sys.exit(main())
