"""Run every kernel on a few small shapes under NVIDIA's compute-sanitizer, and note what it finds.

Usage: ``python tools/sanitize.py --out benchmarks/results/sanitizer-NAME.json``. Needs a GPU and
``compute-sanitizer`` of the CUDA toolkit, on the PATH or in its folder. *memcheck* finds accesses
outside of allocations and misaligned ones, *racecheck* hazards in shared memory. A tool that fails,
or that ``--limit`` stops, is noted as such and costs nothing of the other's result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
#: head_dim, bits of keys and values, page size. The kernels for NVIDIA decode the first and the
#: last, with one query token and with four; the portable ones decode 80 dimensions.
FORMATS = ((128, 4, 4, 16), (80, 3, 8, 32), (64, 2, 3, 16))
#: Where the CUDA toolkit is mostly installed.
CUDA = Path("/usr/local/cuda")
DONE = "swept"


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
        print(DONE, dim, k_bits, v_bits, page_size, flush=True)


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    folders = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    places = [str(folder / "bin") for folder in (*folders, CUDA)]
    search = os.pathsep.join([os.environ.get("PATH", ""), *places])
    return shutil.which("compute-sanitizer", path=search)


def watch(command: Sequence[str], env: Mapping[str, str], limit: float) -> dict[str, Any]:
    """Run a command and all that it starts for at most ``limit`` seconds.

    Returns its exit status (None if it was stopped), seconds, how many formats it went through, the
    last summary and the end of the output.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # also what is left of a tool that ended: the group has only its children
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    return {
        "exit_status": status,
        "summary": summaries[-1].strip() if summaries else None,
        "formats_swept": len(re.findall(rf"^{DONE} ", text, re.MULTILINE)),
        "seconds": round(time.monotonic() - began, 1),
        "end": text[-3000:] if status != 0 else "",
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for each tool")
    parser.add_argument("--sweep", action="store_true", help="only run the kernels")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        parser.error(f"no compute-sanitizer on the PATH or in {CUDA}/bin: set CUDA_HOME")
    import torch
    from tq_kernels.bench.suite import commit, machine

    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(ROOT),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "limit_seconds": arguments.limit,
        "formats": [dict(zip(("head_dim", "k_bits", "v_bits", "page_size"), f, strict=True))
                    for f in FORMATS],
        "tools": {},
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).resolve()), "--sweep"]
    # Each tensor an allocation of its own, so that no access outside of one falls into another.
    watched = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # First without a tool: this compiles, which need not be watched.
    for tool in (None, *TOOLS):
        under = () if tool is None else (sanitizer, "--tool", tool, "--error-exitcode", "9")
        found = watch([*under, *command], os.environ if tool is None else watched, arguments.limit)
        result["tools"][tool or "none"] = found
        print(tool, {n: x for n, x in found.items() if n != "end"}, found["end"], flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    clean = all(found["exit_status"] == 0 for found in result["tools"].values())
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
