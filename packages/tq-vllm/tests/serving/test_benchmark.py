"""The script that measures serving, on the CPU with the small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[4] / "benchmarks" / "serving" / "run.py"


def test_the_script_fills_the_cache_of_the_baseline_three_times(tmp_path) -> None:
    out = tmp_path / "serving.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--scenarios", "kv-bound", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["smoke"] and result["versions"]["tq-vllm"]
    plain, ours = result["rows"]
    assert (plain["variant"], ours["variant"]) == ("16-bit", "tq4")
    # Two heads, six layers, pages of 32 tokens; 512 and 132 bytes a token and head.
    assert plain["kv_tokens"] == (2 << 20) // (32 * 12 * 512) * 32
    assert ours["kv_tokens"] == (2 << 20) // (32 * 12 * 132) * 32
    for row in (plain, ours):
        assert row["completed"] == row["requests"] >= 3 * plain["kv_tokens"] / (48 + 4)
        assert row["total_output_tokens"] == 4 * row["requests"]
        for name in ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms"):
            assert row[name] > 0
        assert "--random-input-len" in row["command"] and "--port" in row["server"]


def test_an_unknown_name_is_refused(tmp_path) -> None:
    command = [sys.executable, str(SCRIPT), "--scenarios", "long", "--out", str(tmp_path / "x")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "long not known: choose from batch-64, kv-bound, batch-1" in run.stderr
