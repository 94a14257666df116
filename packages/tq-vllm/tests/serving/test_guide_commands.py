"""The commands of the guide serve: they start a server on this machine's CPU, made small."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = (
    "--host 127.0.0.1 --dtype float32 --enforce-eager --max-model-len 512 --block-size 16 "
    f"--max-num-seqs 4 --kv-cache-memory-bytes {8 << 20} --port"
)
# The command ``vllm`` itself does not start with the build for the CPU.
SERVE = f"{shlex.quote(sys.executable)} -m vllm.entrypoints.openai.api_server --model"


def commands() -> list[str]:
    """Lines that serve with a setting, which is what turns the backend on without a GPU."""
    guide = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    lines = "".join(BLOCK.findall(guide)).splitlines()
    return [line for line in lines if re.match(r"TQ_\w+=\S+ vllm serve MODEL ", line)]


def test_the_guide_serves_with_both_settings() -> None:
    assert [line.partition("=")[0] for line in commands()] == ["TQ_PRESET", "TQ_KEY_CENTER"]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_guide_serves(
    command: str, tiny: Path, tmp_path: Path, port, serve
) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if "center.safetensors" in command:
        calibrate = ["tq", "calibrate", str(tiny), "--windows", "1", "--tokens", "128"]
        where = {"cwd": tmp_path, "env": os.environ | path, "check": True, "capture_output": True}
        subprocess.run([*calibrate, "--out", "center.safetensors"], **where)
    script = command.replace("vllm serve MODEL", f"{SERVE} {shlex.quote(str(tiny))}")
    log, here = tmp_path / "log", port()
    with serve(["bash", "-c", f"exec env {script} {SMALL} {here}"], path, here, log):
        pass
    assert "TurboQuant KV cache: keys 4 bits, values 4 bits" in log.read_text()
