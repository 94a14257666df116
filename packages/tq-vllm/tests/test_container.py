"""The Containerfile names packages, versions and modules that are there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from tq_vllm.versions import supports_vllm

ROOT = Path(__file__).resolve().parents[3]
TEXT = re.sub(r"#.*\n", "", (ROOT / "Containerfile").read_text(encoding="utf-8"))
INSTRUCTIONS = [
    line.split(maxsplit=1) for line in TEXT.replace("\\\n", " ").splitlines() if line.strip()
]


def instruction(name: str) -> str:
    (found,) = (rest for word, rest in INSTRUCTIONS if word == name)
    return found


def test_it_builds_on_the_version_of_vllm_that_is_tested() -> None:
    assert [word for word, _ in INSTRUCTIONS] == ["ARG", "FROM", "COPY", "RUN", "ENTRYPOINT"]
    name, _, version = instruction("ARG").partition("=")
    assert instruction("FROM").endswith(f"/vllm-openai:${{{name}}}")
    assert supports_vllm(version.removeprefix("v"))
    sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert f'"{version.removeprefix("v")}"' in sessions


def test_it_installs_the_packages_with_extras_that_they_have() -> None:
    source, target = instruction("COPY").split()
    names = [w for w in shlex.split(instruction("RUN")) if w.startswith(f"{target}/")]
    found = {}
    for name in names:
        path, _, extra = name.removeprefix(f"{target}/").partition("[")
        project = tomllib.loads((ROOT / source / path / "pyproject.toml").read_text())["project"]
        assert not extra or extra.rstrip("]") in project["optional-dependencies"]
        found[project["name"]] = project["dependencies"]
    own = {r.partition("==")[0] for needed in found.values() for r in needed if r.startswith("tq-")}
    assert own <= set(found)  # no package of ours comes from elsewhere
    assert not any(r.startswith("vllm") for needed in found.values() for r in needed)


def test_the_server_is_there() -> None:
    command = json.loads(instruction("ENTRYPOINT"))
    assert command[:2] == ["python3", "-m"]
    assert command[3:] == ["--attention-backend", "CUSTOM"]
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    assert importlib.util.find_spec(command[2]) is not None
