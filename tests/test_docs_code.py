"""Every code block of the documents: Python runs, commands exist, the rest parses.

Blocks of a page run in order in one namespace, in an empty folder, with the names below defined.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "packages/*/README.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
# Diagrams and formulas of pages whose plain blocks are no commands.
TEXT = {"docs/architecture.md", "docs/format.md"}
# A page of this package whose Python needs the engine, which the tests here do not have.
NEEDS = {"docs/vllm.md": "vllm", "packages/tq-vllm/README.md": "vllm"}


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


def model_names() -> dict[str, Any]:
    """A small trained model under the names that the guides use."""
    import copy

    import torch
    from tq_hf.models import load_model

    model, tokenizer = load_model("tiny")
    prompt = tokenizer("def mean(values):\n", return_tensors="pt").input_ids
    heads = (model.config.num_key_value_heads, model.config.head_dim)
    layers = range(model.config.num_hidden_layers)
    return {
        "centers": {layer: torch.zeros(heads) for layer in layers},
        "copy": copy,
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "input_ids": prompt,
        "prompt_ids": prompt,
        "questions": [prompt[:, :4], prompt[:, :2]],
    }


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.random.seed(0)  # noqa: NPY002
    return {"__name__": "docs"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))]
)
def test_python_runs(page: str, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    code = [text for kind, text in blocks(page) if kind == "python"]
    for text in code:
        ast.parse(text)
    if page in NEEDS and importlib.util.find_spec(NEEDS[page]) is None:
        pytest.skip(f"{NEEDS[page]} is not installed; the blocks were parsed")
    names = {n.id for text in code for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    context: AbstractContextManager[object] = nullcontext()
    if names & {"model", "model_name", "input_ids"}:
        given = model_names()
        namespace |= given
        context = given["torch"].no_grad()
        if "model_name" in names:
            given["model"].save_pretrained("model")
            given["tokenizer"].save_pretrained("model")
            namespace["model_name"] = "model"
    with context:
        for number, text in enumerate(code):
            exec(compile(text, f"{page}, block {number}", "exec"), namespace)


def sessions() -> set[str]:
    """Names of the sessions of noxfile.py."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("session" in ast.unparse(d) for d in node.decorator_list)
    }


def commands() -> dict[str, str]:
    """Sub-commands of ``tq``: the object of each."""
    found: dict[str, str] = {}
    for path in ROOT.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        found |= project.get("entry-points", {}).get("tq.commands", {})
    return found


def options_of(command: str) -> set[str]:
    """Options of a sub-command of ``tq``."""
    import typer
    from click import Context

    module, _, name = commands()[command].partition(":")
    app = loaded = getattr(importlib.import_module(module), name)
    if not isinstance(loaded, typer.Typer):
        app = typer.Typer()
        app.command()(loaded)
    found = typer.main.get_command(app)
    many = getattr(found, "commands", None)
    nodes = [found, *(many.values() if many else [])]
    return {
        option
        for node in nodes
        for parameter in node.get_params(Context(node))
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def check_command(line: str) -> None:
    """Raise unless our part of a shell line exists: sub-commands, options, sessions, files."""
    words = [w for w in shlex.split(line, comments=True) if w not in ("&&", "nice")]
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", words[0]):
        words.pop(0)
    if not words:
        return
    if words[:2] == ["uvx", "nox"]:
        for word in words[2:]:
            if word == "--":
                break
            if not word.startswith("-"):
                assert re.split(r"[(-]", word)[0] in sessions(), f"{line}: no session {word}"
    elif words[0] == "tq" and len(words) > 1 and not words[1].startswith("-"):
        known = options_of(words[1])
        for word in words[2:]:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{line}: no option {word}; {sorted(known)}"
    elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), f"{line}: no file {words[1]}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(kind != "python" for kind, _ in blocks(page))]
)
def test_other_blocks_are_right(page: str) -> None:
    for kind, text in blocks(page):
        if kind == "json":
            json.loads(text)
        elif kind == "toml":
            tomllib.loads(text)
        elif kind in ("", "bash", "sh", "shell", "console"):
            if page in TEXT:
                continue
            for line in text.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    check_command(part.removeprefix("$ "))
        else:
            assert kind in ("python", "yaml", "text", "mermaid", "bibtex"), (
                f"{page}: a block of {kind!r} is not checked; teach this test to"
            )


def test_wrong_commands_are_noticed() -> None:
    for line in ("uvx nox -s nothing", "tq codebook --dimm 3", "python tools/absent.py"):
        with pytest.raises(AssertionError, match="no "):
            check_command(line)
    with pytest.raises(KeyError, match="nothing"):
        check_command("tq nothing")


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE)) >= pages
