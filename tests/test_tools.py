"""What the tools that run on a GPU write, wherever they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import time, pytest

def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken():
    yield
    raise ValueError
def test_wrong_at_its_end(broken): pass
"""
# The signal that comes after ``--limit`` seconds, once the other tests are reported.
STOPS = """
def test_slow():
    import os, signal
    time.sleep(2)
    os.kill(os.getppid(), signal.SIGALRM)
    time.sleep(4)
"""


def run(folder: Path, text: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result of ``tools/tests_gpu.py`` on a file of tests."""
    (folder / "test_some.py").write_text(text)
    command = [sys.executable, str(ROOT / "tools" / "tests_gpu.py"), "--tests", str(folder)]
    command += ["--out", str(folder / "out.json"), "-n", "1", *arguments]
    status = subprocess.run(command, capture_output=True, text=True, timeout=100).returncode
    return status, json.loads((folder / "out.json").read_text())


def test_outcomes_of_gpu_tests_are_counted(tmp_path: Path) -> None:
    status, result = run(tmp_path, TESTS)
    assert status == 1
    assert result["complete"] is True
    assert result["collected"] == 4
    assert [result[name] for name in ("passed", "failed", "skipped")] == [1, 2, 1]
    failed = ["test_some.py::test_wrong", "test_some.py::test_wrong_at_its_end"]
    # relative to pytest's root, which depends on where the repository is
    assert [name.rpartition("/")[2] for name in result["failed_tests"]] == failed
    assert {"device", "python", "packages"} <= set(result["machine"])


def test_gpu_tests_that_are_stopped_leave_their_counts(tmp_path: Path) -> None:
    status, result = run(tmp_path, TESTS + STOPS, "--limit", "90")
    assert status == 2
    assert result["complete"] is False
    assert result["collected"] == 5
    assert [result[name] for name in ("passed", "failed", "skipped")] == [1, 2, 1]


SANITIZER = """#!/bin/sh
echo "swept 128 4 4 16"
if [ "$2" = racecheck ]; then sleep 300; fi
echo "========= ERROR SUMMARY: 3 errors"
exit 9
"""


def test_a_sanitizer_that_fails_or_is_stopped_leaves_the_rest(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    command = [sys.executable, str(ROOT / "tools" / "sanitize.py"), "--limit", "2"]
    command += ["--out", str(tmp_path / "out.json")]
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert ran.returncode == 1, ran.stderr
    tools = json.loads((tmp_path / "out.json").read_text())["tools"]
    assert list(tools) == ["none", "memcheck", "racecheck"]
    wanted = {"exit_status": 9, "summary": "3 errors", "formats_swept": 1}
    assert {name: tools["memcheck"][name] for name in wanted} == wanted
    wanted = {"exit_status": None, "summary": None, "formats_swept": 1}
    assert {name: tools["racecheck"][name] for name in wanted} == wanted
