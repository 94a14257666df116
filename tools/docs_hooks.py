"""What mkdocs adds to the pages: the list of every error message, read from the source.

Usage: ``python tools/docs_hooks.py`` prints the list.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- every error message -->"


def template(node: ast.expr, constants: Mapping[str, str]) -> str | None:
    """Text of a message, with "…" for what is filled in; None if it is not written in the module.

    ``constants`` are texts that a module names, for ``NAME.format(...)``.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) or "…" for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.value
        if node.func.attr == "format" and isinstance(name, ast.Name) and name.id in constants:
            return constants[name.id].replace("{}", "…")
    return None


def messages(path: Path) -> list[str]:
    """Messages of the errors that a module raises, in the order of the source."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = template(node.exc.args[0], constants)
            if text:
                found.append(text)
    return found


def code(text: str) -> str:
    """Markdown of code, which may have backticks of its own."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def error_list() -> str:
    """Markdown: a heading for each package, a list entry for each message."""
    lines = []
    for package in ("tq-core", "tq-kernels", "tq-hf", "tq-vllm"):
        source = ROOT / "packages" / package / "src"
        entries = []
        for path in sorted(source.rglob("*.py")):
            module = ".".join(path.relative_to(source).with_suffix("").parts)
            entries += [f"- {code(text)} ({module})" for text in messages(path)]
        lines += [f"### {package}", "", *dict.fromkeys(entries), ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Hook of mkdocs: put the list where the page asks for it."""
    return markdown.replace(MARKER, error_list()) if MARKER in markdown else markdown


if __name__ == "__main__":
    print(error_list())
