from __future__ import annotations

import subprocess
import sys

import pytest
import tq_vllm


def test_register_says_what_is_missing_and_what_to_use() -> None:
    with pytest.raises(tq_vllm.BackendUnavailableError, match="no attention backend.*tq-hf"):
        tq_vllm.register()


def test_import_loads_no_framework() -> None:
    code = "import sys, tq_vllm; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
