"""Check the wheel installed in this environment: contents, import, and nothing from above it.

Usage: ``python tools/check_wheel.py WHEEL``, in an environment that holds only that wheel and what
it requires. It uses the standard library alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from pathlib import Path

FORBIDDEN = {
    "tq_core": ("torch", "triton", "transformers", "vllm", "typer", "matplotlib"),
    "tq_kernels": ("transformers", "vllm", "tq_hf"),
    "tq_hf": ("vllm", "tq_vllm"),
    "tq_vllm": ("transformers", "vllm", "tq_hf"),
}


def main(wheel: str) -> int:
    """Return 0 if the wheel is as it should be, else raise."""
    module = Path(wheel).name.split("-")[0]
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (f"{module}/__init__.py", f"{module}/py.typed"):
        if wanted not in names:
            raise SystemExit(f"{wheel} lacks {wanted}")
    if not any(n.endswith(".dist-info/licenses/LICENSE") for n in names):
        raise SystemExit(f"{wheel} lacks its licence")
    for other in FORBIDDEN[module]:
        if importlib.util.find_spec(other) is not None:
            raise SystemExit(f"installing {module} brought {other}")
    path = importlib.import_module(module).__file__
    print(f"{module}: {len(names)} files in the wheel, imported from {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
