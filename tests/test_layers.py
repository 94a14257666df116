"""What importing a package brings along, measured in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

ABOVE = {
    "tq_core": {
        "torch",
        "triton",
        "transformers",
        "vllm",
        "typer",
        "tq_kernels",
        "tq_hf",
        "tq_vllm",
    },
    "tq_kernels": {"transformers", "vllm", "tq_hf", "tq_vllm"},
    "tq_hf": {"vllm", "tq_vllm"},
    "tq_vllm": {"transformers", "vllm", "tq_hf"},
}


@pytest.mark.parametrize("package", sorted(ABOVE))
def test_import_brings_nothing_from_above(package: str) -> None:
    code = f"import sys, {package}; print(*sorted({ABOVE[package]!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_kernels_import_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import tq_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)
