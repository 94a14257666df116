"""Check the wheel installed in this environment: contents, a use, and nothing from above it.

Usage: ``python tools/check_wheel.py WHEEL``, in an environment that holds only that wheel and what
it requires. Beside them it uses the standard library alone.
"""

from __future__ import annotations

import contextlib
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


def use_core() -> None:
    import numpy as np
    from tq_core import MSEQuantizer

    x = np.random.default_rng(0).standard_normal((100, 128))
    quantizer = MSEQuantizer(dim=128, bits=4)
    error = np.sum((quantizer.decode(quantizer.encode(x)) - x) ** 2) / np.sum(x**2)
    assert error < 0.02, error


def use_kernels() -> None:
    import torch
    from tq_kernels import KVFormat, decode_tokens, encode_tokens

    fmt = KVFormat(128, 4, 4)
    x = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
    error = (decode_tokens(encode_tokens(x, fmt, "k"), fmt, "k") - x).norm() / x.norm()
    assert error < 0.15, error


def use_hf() -> None:
    from tq_hf import TurboQuantCache, cache_argument
    from tq_hf.models import load_model

    model, tokenizer = load_model("tiny")
    inputs = tokenizer("def mean(values):\n", return_tensors="pt")
    cache = TurboQuantCache(model.config, window_tokens=16)
    model.generate(**inputs, max_new_tokens=64, do_sample=False, **cache_argument(model, cache))
    assert cache.memory_usage().ratio > 1, cache.memory_usage()


def use_vllm() -> None:
    import os

    from tq_core import TQError
    from tq_vllm import register
    from tq_vllm.settings import load_settings

    register()  # vLLM is not installed: nothing happens unless a variable asks for it
    os.environ["TQ_PRESET"] = "tq5"
    with contextlib.suppress(TQError):
        load_settings()
        raise SystemExit("tq_vllm took a preset that is not known")


USES = {"tq_core": use_core, "tq_kernels": use_kernels, "tq_hf": use_hf, "tq_vllm": use_vllm}


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
    USES[module]()
    print(f"{module}: {len(names)} files in the wheel, used from {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
