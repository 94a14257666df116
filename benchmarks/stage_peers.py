"""Take what the benchmark compares with out of a vLLM wheel, so that vLLM need not be installed.

The folder that this writes holds FlashAttention 3's library and the Triton kernels of vLLM's
``turboquant_*`` and ``int4_per_token_head`` caches, with stand-ins for the modules those import.
``benchmarks/gpu.py --peers FOLDER`` uses it. Nothing of it belongs in this repository. Where a
copy of vLLM of the same version is installed, its kernels are the same files.

Usage: ``python benchmarks/stage_peers.py vllm-0.26.0-....whl FOLDER``. ``tar cJf`` packs the folder
into about 8 MB.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

LIBRARY = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
OPS = "vllm/v1/attention/ops/"
COPIED = (
    *(
        f"{OPS}{name}.py"
        for name in (
            "int4_per_token_head",
            "triton_attention_helpers",
            "triton_decode_attention",
            "triton_turboquant_decode",
            "triton_turboquant_store",
            "triton_unified_attention",
        )
    ),
    "vllm/model_executor/layers/quantization/turboquant/centroids.py",
)
STAND_INS = {
    "vllm/envs.py": "VLLM_BATCH_INVARIANT = False\n",
    "vllm/logger.py": "from logging import getLogger as init_logger  # noqa: F401\n",
    "vllm/triton_utils.py": "import triton  # noqa: F401\nimport triton.language as tl  # noqa: F401\n",
    "vllm/platforms.py": '''\
import torch


class current_platform:
    """An NVIDIA GPU."""

    is_cuda = staticmethod(lambda: True)
    is_cuda_alike = staticmethod(lambda: True)
    is_rocm = staticmethod(lambda: False)
    is_xpu = staticmethod(lambda: False)
    fp8_dtype = staticmethod(lambda: torch.float8_e4m3fn)

    @staticmethod
    def has_device_capability(number):
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= number

    @staticmethod
    def is_device_capability_family(number):
        return torch.cuda.get_device_capability()[0] == number // 10
''',
    "vllm/v1/kv_cache_interface.py": """\
from enum import IntEnum


class KVQuantMode(IntEnum):
    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5
""",
}


def stage(wheel: Path, folder: Path) -> None:
    """Write the folder."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in COPIED}
        files["fa3.so"] = archive.read(LIBRARY)
    files |= {name: text.encode() for name, text in STAND_INS.items()}
    for name in list(files):
        for parent in Path(name).parents:
            if parent != Path():
                files.setdefault(f"{parent}/__init__.py", b"")
    files["WHEEL"] = wheel.name.encode() + b"\n"
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    stage(arguments.wheel, arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
