"""The command ``tq``: gathers the sub-commands of every installed package.

A package adds one with an entry point in the group ``tq.commands``: its name is the command's, its
object a `typer.Typer` or a function with typer's annotations. A sub-command whose requirements are
missing is still listed, and says so when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["build_app", "main"]

GROUP = "tq.commands"
_NEEDS_CLI = (
    "tq: the command line needs typer and rich ({missing} is missing); "
    "install them with: pip install 'tq-core[cli]'"
)


def build_app(commands: Iterable[EntryPoint] | None = None) -> typer.Typer:
    """Build the application from entry points, by default those of all installed packages.

    Raises
    ------
    ImportError
        If typer is not installed (extra ``cli``).
    """
    import typer

    app = typer.Typer(
        name="tq",
        help="TurboQuant: vector quantization for key-value caches.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root() -> None:
        """TurboQuant: vector quantization for key-value caches."""

    found = entry_points(group=GROUP) if commands is None else commands
    for point in sorted(found, key=lambda p: p.name):
        try:
            command = point.load()
        except ImportError as error:
            command = _unavailable(point.name, error)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=point.name)
        else:
            app.command(point.name)(command)
    return app


def _unavailable(name: str, error: ImportError) -> Callable[[], None]:
    def command() -> None:
        raise SystemExit(f"tq {name}: cannot be loaded: {error}")

    command.__doc__ = f"Unavailable: {error}."
    return command


def main() -> None:
    """Run ``tq``; the console script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(_NEEDS_CLI.format(missing=error.name), file=sys.stderr)
        raise SystemExit(2) from None
    build_app()()
