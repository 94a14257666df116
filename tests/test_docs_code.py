"""Every code block of the documents: Python and commands run, the rest parses.

Python blocks of a page run in order in one namespace, in an empty folder, with the names below
defined. Commands run in a copy of the repository, with a small model. A comment before a block says
what cannot run here, or which options make it small::

    <!-- not run: needs a GPU -->
    <!-- run with: --quick -->
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "packages/*/README.md", "tools/*/README.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(
    r"(?:^<!-- (?P<verb>not run|run with): (?P<note>[^\n]*) -->\n)?"
    r"^```[ \t]*(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"(?<!`)`((?:tq|python|pytest|uvx)\s[^`…:]+)`(?!`)")
SHELL = ("", "bash", "sh", "shell", "console")
# What stands for what a reader has.
SMALL = {r"\bMODEL\b": "tiny", r"--device cuda\b": "--device cpu"}
COPIED = ("README.md", "benchmarks", "docs", "packages", "pyproject.toml", "tests", "tools")


class Block(NamedTuple):
    """A fenced block; ``verb`` and ``note`` are of the comment before it."""

    verb: str
    note: str
    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    """Fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(*(part or "" for part in match.groups())) for match in FENCE.finditer(text)]


def lines(text: str) -> list[str]:
    """Lines of a shell block: continued ones joined, prompts left out."""
    return [line.removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]


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
        "metrics": {layer: (torch.eye(heads[1]).repeat(heads[0], 1, 1),) * 2 for layer in layers},
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


@pytest.mark.filterwarnings("error:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]
)
def test_python_runs(page: str, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    code = [block.text for block in blocks(page) if block.kind == "python"]
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
    elif words[0] == "pip" and words[1] == "install":
        for word in words[2:]:
            name, _, extras = word.rstrip("]").partition("[")
            if name.startswith("tq-"):
                known = set(distribution(name).metadata.get_all("Provides-Extra") or ())
                unknown = set(filter(None, extras.split(","))) - known
                assert not unknown, f"{line}: no extra {unknown}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.kind != "python" for block in blocks(page))]
)
def test_other_blocks_are_right(page: str) -> None:
    for block in blocks(page):
        if block.kind == "json":
            json.loads(block.text)
        elif block.kind == "toml":
            tomllib.loads(block.text)
        elif block.kind in SHELL:
            for line in lines(block.text):
                for part in line.split(" && "):
                    check_command(part)
        else:
            assert block.kind in ("python", "yaml", "text", "mermaid", "bibtex"), (
                f"{page}: a block of {block.kind!r} is not checked; teach this test to"
            )


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_are_right(page: str) -> None:
    for command in INLINE.findall((ROOT / page).read_text(encoding="utf-8")):
        check_command(" ".join(command.split()))


def scripts() -> dict[str, str]:
    """Shell blocks that run, without what installs and without sessions: script, first page."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.kind not in SHELL or block.verb == "not run":
                continue
            kept = [
                line
                for line in lines(block.text)
                if line.strip() and not re.match(r"(pip install|uv pip|uv venv|uvx nox)\b", line)
            ]
            if kept and block.verb == "run with":
                kept[-1] += " " + block.note
            if kept:
                found.setdefault("\n".join(kept), page)
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository that commands may write to; packages are linked."""
    for name in COPIED:
        source = ROOT / name
        if name == "packages":
            (tmp_path / name).symlink_to(source)
        elif source.is_file():
            shutil.copy(source, tmp_path)
        else:
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    models = ROOT / "packages" / "tq-hf" / "src" / "tq_hf" / "models"
    (tmp_path / "tiny").symlink_to(models / "tiny")
    (tmp_path / "sample.txt").write_text("def double(x):\n    return 2 * x\n\n" * 300)
    return tmp_path


@pytest.mark.parametrize(
    "script", [pytest.param(s, id=f"{p}: {s.splitlines()[0]}") for s, p in scripts().items()]
)
def test_commands_run(script: str, checkout: Path) -> None:
    for pattern, small in SMALL.items():
        script = re.sub(pattern, small, script)
    env = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "TQ_"))}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_sessions_of_the_documents_run_in_a_workflow() -> None:
    workflows = "".join(p.read_text() for p in (ROOT / ".github" / "workflows").glob("*.yml"))
    for page in PAGES:
        for block in blocks(page):
            for name in re.findall(r"^uvx nox -s (\w+)", block.text, re.MULTILINE):
                assert re.search(rf"\b{name}\b", workflows), f"{page}: {name} runs in no workflow"


def test_wrong_commands_are_noticed() -> None:
    for line in (
        "uvx nox -s nothing",
        "tq codebook --dimm 3",
        "python tools/absent.py",
        "pip install 'tq-core[nothing]'",
    ):
        with pytest.raises(AssertionError, match="no "):
            check_command(line)
    with pytest.raises(KeyError, match="nothing"):
        check_command("tq nothing")
    with pytest.raises(PackageNotFoundError, match="tq-nothing"):
        check_command("pip install tq-nothing")


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE)) >= pages
