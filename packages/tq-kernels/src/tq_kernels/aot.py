"""Compile kernels ahead of time, without a GPU, and report what they need of one.

A module with kernels defines ``aot_variants() -> list[Variant]`` and is named in `MODULES`.
A variant is a kernel with the types of its arguments and its constants::

    def aot_variants() -> list[Variant]:
        return [
            Variant(
                name="scale-fp16",
                kernel=scale_kernel,
                signature={"x": "*fp16", "out": "*fp16", "factor": "fp32", "n": "i32"},
                constexprs={"BLOCK": 128},
                num_warps=4,
                quick=True,
            )
        ]

``signature`` holds the arguments that are no constants, in any order; pointers count as aligned
to 16 bytes, and so do the integers named in ``aligned``. ``targets`` leaves out GPUs that the kernel
is not meant for; ``quick`` puts the variant into the subset that the tests compile. ``maxnreg`` is
the launch option of that name, on NVIDIA; ``spills`` allows a kernel some bytes of stack.

`compile_variant` compiles one variant for one target and returns `Resources`.
``python -m tq_kernels.aot`` compiles all of them; it fails if a kernel spills more registers
than its variant allows, which is none unless stated. Kernels cannot be compiled in a process with
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tq_core import TQError

__all__ = ["MODULES", "TARGETS", "Resources", "Variant", "compile_variant", "variants"]

#: Modules that define ``aot_variants``.
MODULES: tuple[str, ...] = (
    "tq_kernels.portable.decode",
    "tq_kernels.portable.prefill",
    "tq_kernels.portable.store",
    "tq_kernels.portable.rotate",
    "tq_kernels.portable.dequantize",
    "tq_kernels.nvidia.decode_aot",
)

#: Name of each target: backend, architecture and lanes of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
#: Shared memory that a program may use, in bytes.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}

#: Bytes that the driver takes of a program with shared memory, from compute capability 9.0 on.
_RESERVED = 1024


@dataclass(frozen=True)
class Variant:
    """A kernel, the types of its arguments, and its constants.

    ``spills`` is the stack in bytes that the kernel may take, for one that was measured to be
    faster with it.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(TARGETS)
    quick: bool = False
    maxnreg: int | None = None
    spills: int = 0


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs of a GPU.

    Attributes
    ----------
    registers : int
        Registers a lane (AMD: vector registers, accumulators included).
    spills : int
        Bytes of stack a lane on NVIDIA, spilled vector registers on AMD.
    shared : int
        Bytes of shared memory a program.
    allowed : int
        Spills that the variant may have.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    allowed: int = 0

    @property
    def fits(self) -> bool:
        """Whether no more spills than allowed and the shared memory suffices."""
        return self.spills <= self.allowed and self.shared <= SHARED_LIMIT[self.target]


def variants(match: str = "*", quick: bool = False) -> list[Variant]:
    """All variants of `MODULES` whose name matches; names carry that of their module."""
    found = []
    for module in MODULES:
        short = module.removeprefix("tq_kernels.").removesuffix("_aot")
        for variant in importlib.import_module(module).aot_variants():
            named = Variant(**{**vars(variant), "name": f"{short}/{variant.name}"})
            if fnmatch(named.name, match) and (named.quick or not quick):
                found.append(named)
    return found


def _nvidia_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and the shared memory that inline PTX declares."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if found is None:
        raise TQError(f"cuobjdump printed no register count: {text!r}; check its version")
    return int(found[1]), int(found[2]), int(found[3])


def _amd_usage(assembly: str) -> tuple[int, int]:
    def count(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    # Scalar registers spill into lanes of vector registers, not into memory.
    return count("vgpr_count"), count("vgpr_spill_count")


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile for one of `TARGETS`; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if target not in TARGETS:
        raise TQError(f"target={target!r}: choose one of {', '.join(TARGETS)}")
    kernel = variant.kernel
    if not isinstance(kernel, JITFunction):
        raise TQError(
            f"kernel {variant.name} was defined under TRITON_INTERPRET=1: unset it and start again"
        )
    missing = set(kernel.arg_names) ^ {*variant.signature, *variant.constexprs}
    if missing:
        raise TQError(
            f"variant {variant.name}: arguments {sorted(missing)} do not match the kernel"
        )
    signature = {n: variant.signature.get(n, "constexpr") for n in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    source = ASTSource(
        kernel, signature=signature, constexprs=dict(variant.constexprs), attrs=attributes
    )
    backend, architecture, lanes = TARGETS[target]
    options: dict[str, int] = {"num_warps": variant.num_warps}
    if backend == "cuda" or variant.num_stages <= 2:
        options["num_stages"] = variant.num_stages
    if backend == "cuda" and variant.maxnreg is not None:
        options["maxnreg"] = variant.maxnreg
    compiled = triton.compile(
        source, target=GPUTarget(backend, architecture, lanes), options=options
    )
    shared = int(compiled.metadata.shared)
    if backend == "cuda":
        registers, spills, declared = _nvidia_usage(compiled.asm["cubin"])
        shared += max(0, declared - (_RESERVED if int(architecture) >= 90 else 0))
    else:
        registers, spills = _amd_usage(compiled.asm["amdgcn"])
    return Resources(
        variant.name, target, registers, spills, shared, variant.num_warps, variant.spills
    )


@lru_cache(maxsize=1)
def _by_name() -> dict[tuple[str, str], Variant]:
    return {(v.name, target): v for v in variants() for target in v.targets}


def _compile_named(name: str, target: str) -> Resources:
    """`compile_variant` of a variant that another process names."""
    return compile_variant(_by_name()[name, target], target)


def _compile_all(found: list[Variant], targets: list[str], jobs: int) -> Iterator[Resources]:
    chosen = [(v.name, target) for v in found for target in targets if target in v.targets]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        yield from processes.map(_compile_named, *zip(*chosen, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a line for each kernel, and return 1 if one spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m tq_kernels.aot", description=main.__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="all if not given")
    parser.add_argument("--match", default="*", help="pattern of the names, such as '*store*'")
    parser.add_argument("--quick", action="store_true", help="only the subset of the tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args(arguments)
    found = variants(options.match, options.quick)
    results = []
    print(f"{'registers':>9} {'spills':>6} {'shared':>7}  target   kernel")
    for r in _compile_all(found, options.target or list(TARGETS), options.jobs):
        results.append(r)
        line = f"{r.registers:>9} {r.spills:>6} {r.shared:>7}  {r.target:<8} {r.name}"
        print(line + ("" if r.fits else "   <- does not fit"), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 0 if all(r.fits for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
