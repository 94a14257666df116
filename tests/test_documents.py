"""Documents agree with the committed results and with the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> ModuleType:
    """Import a script of ``tools``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return tool("generate_tables")


def test_tables_are_in_step_with_the_results(generator: ModuleType) -> None:
    for name in generator.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert generator.MARKER.search(text), f"{name} has no table"
        assert generator.render(text) == text, "run tools/generate_tables.py"


def test_a_changed_number_is_noticed(generator: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = generator.MARKER.search(text)[2]
    digit = re.search(r"\d\.\d", body)
    assert digit is not None
    changed = text.replace(body, body.replace(digit[0], "7.7", 1))
    assert changed != text
    assert generator.render(changed) == text


def test_an_unknown_table_is_named(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match="no table is called 'absent'"):
        generator.render("<!-- table:absent -->\n<!-- /table:absent -->")


def test_demo_table_reads_a_demo_result(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "K4V4", "perplexity": 5.1234, "agreement": 0.987, "bytes_per_token": 1584}
    row |= {"ratio": 512 / 132, "projection_bytes": 131072 * 32 * 8 * 132}
    monkeypatch.setattr(generator, "load", lambda _: {"caches": [row]})
    last = generator.TABLES["demo"]().splitlines()[-1]
    assert last == "| K4V4 | 5.123 | 98.7% | 1,584 | 3.88x | 4.12 GiB |"


@pytest.mark.parametrize("package", ["tq-core", "tq-kernels", "tq-hf", "tq-vllm"])
def test_troubleshooting_lists_every_error(package: str) -> None:
    messages = tool("docs_hooks").messages
    raised = 0
    for path in (ROOT / "packages" / package / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        ours = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Raise) and ast.unparse(node).startswith("raise TQError(")
        ]
        raised += len(ours)
        assert len(messages(path)) >= len(ours), f"write the messages of {path} where it raises"
    assert raised


@pytest.mark.parametrize("package", ["tq_core", "tq_kernels", "tq_hf", "tq_vllm"])
def test_every_public_name_is_in_the_reference(package: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert set(importlib.import_module(package).__all__) <= shown


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])  # mkdocs checks the others
def test_links_lead_to_files(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_versions_are_those_of_the_packages() -> None:
    text = (ROOT / "packages" / "tq-core" / "pyproject.toml").read_text(encoding="utf-8")
    version = tomllib.loads(text)["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", changes, re.MULTILINE)
    assert sections[0][0] == version


def test_readme_and_ci_run_the_same_command() -> None:
    command = "uvx nox -s tests"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("package", ["tq-core", "tq-kernels", "tq-hf", "tq-vllm"])
def test_every_package_carries_the_licence(package: str) -> None:
    assert (ROOT / "packages" / package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
