"""Kernels compile for every GPU without one, and spill no more registers than they may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tq_core import TQError
from tq_kernels.aot import MODULES, SHARED_LIMIT, TARGETS, Resources, Variant, compile_variant

pytest.importorskip("triton")


def test_quick_variants_compile_and_fit(tmp_path: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    results = tmp_path / "aot.json"
    done = subprocess.run(
        [sys.executable, "-m", "tq_kernels.aot", "--quick", "--json", str(results)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text(encoding="utf-8"))
    for module in MODULES:
        name = module.removeprefix("tq_kernels.").removesuffix("_aot")
        assert any(r["name"].startswith(f"{name}/") for r in found), name
    for target in TARGETS:
        portable = [r for r in found if r["target"] == target and "portable" in r["name"]]
        assert len(portable) >= 3
    # what inline PTX declares, and nothing of what the driver takes
    assert all(2048 < r["shared"] < 16384 for r in found if "/wide" in r["name"])
    assert any(r["shared"] == 0 for r in found if r["target"] == "sm_90")
    for r in found:
        assert r["registers"] > 0 and r["spills"] <= r["allowed"] <= 72, r
        assert r["shared"] <= SHARED_LIMIT[r["target"]]


def test_every_kernel_is_compiled() -> None:
    """Functions for a GPU that no other one calls are kernels."""
    program = """
import ast, importlib, inspect, pkgutil
from triton.runtime.jit import JITFunction
import tq_kernels
from tq_kernels.aot import variants
defined, called = set(), set()
for info in pkgutil.walk_packages(tq_kernels.__path__, "tq_kernels."):
    module = importlib.import_module(info.name)
    for function in vars(module).values():
        if isinstance(function, JITFunction) and function.__module__ == info.name:
            defined.add(function)
            for node in ast.walk(ast.parse(inspect.getsource(function.fn))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    called.add(getattr(module, node.func.id, None))
kernels, compiled = defined - called, {v.kernel for v in variants()}
print(len(kernels), [f"{k.__module__}.{k.__name__}" for k in kernels ^ compiled])
"""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, differ = done.stdout.split(" ", 1)
    assert int(count) >= 10
    assert differ == "[]\n"


def test_numbers_that_change_between_calls_compile_nothing_new() -> None:
    program = """
from tq_kernels.aot import variants
names = {"batch", "pairs", "tokens", "count", "total", "rows_total", "start", "lse_stride2"}
names |= {"block_table_stride", "table_stride"}
taken = {(v.kernel.__name__, p.name): p.do_not_specialize for v in variants()
         for p in v.kernel.params if p.name in names}
print(len(taken), [key for key, kept in taken.items() if not kept])
"""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, compiled = done.stdout.split(" ", 1)
    assert int(count) >= 10
    assert compiled == "[]\n"


def test_spills_and_too_much_shared_memory_do_not_fit() -> None:
    assert Resources("a", "sm_89", 128, 0, 101376, 4).fits
    assert not Resources("a", "sm_89", 128, 8, 0, 4).fits
    assert Resources("a", "sm_89", 128, 8, 0, 4, allowed=8).fits
    assert not Resources("a", "sm_89", 128, 16, 0, 4, allowed=8).fits
    assert not Resources("a", "sm_89", 128, 0, 101377, 4).fits


def test_errors() -> None:
    variant = Variant("a", kernel=len, signature={}, constexprs={})
    with pytest.raises(TQError, match="target='sm_75': choose one of sm_80"):
        compile_variant(variant, "sm_75")
    with pytest.raises(TQError, match="TRITON_INTERPRET"):
        compile_variant(variant, "sm_80")
