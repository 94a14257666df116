"""``tq reproduce``: measure the experiments of the paper and draw them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tq_core.reproduce import EXPERIMENTS
from tq_core.reproduce.rows import write_csv

__all__ = ["environment", "reproduce"]


def environment() -> dict[str, Any]:
    """What times depend on: machine, threads and versions."""
    versions: dict[str, str | None] = {}
    for name in ("tq-core", "numpy", "scipy", "faiss-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "versions": versions,
    }


def reproduce(
    only: Annotated[
        list[str] | None, typer.Argument(help=f"Some of: {', '.join(EXPERIMENTS)}. Default: all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of PNG, CSV and JSON files.")] = Path(
        "reproduce-output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, and noisy numbers.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw the figures (needs matplotlib).")] = True,
) -> None:
    """Measure the paper's experiments: distortion, inner products, neighbours, time."""
    names = only or list(EXPERIMENTS)
    for name in names:
        if name not in EXPERIMENTS:
            raise typer.BadParameter(f"{name!r}: choose from {', '.join(EXPERIMENTS)}")
    console = Console(stderr=True)
    if plots:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            console.print(
                "tq reproduce: figures need matplotlib; install it with pip install "
                "'tq-core[plots]', or pass --no-plots",
                style="red",
                markup=False,
            )
            raise typer.Exit(1) from None
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        with console.status(name) as status:
            note = status.update if console.is_terminal else console.print
            rows = EXPERIMENTS[name].measure(quick, note)
            status.update(f"{name}: drawing")
            if plots:
                EXPERIMENTS[name].draw(rows, out / f"{name}.png")
        write_csv(rows, out / f"{name}.csv")
        result = {"experiment": name, "quick": quick, "environment": environment(), "rows": rows}
        text = json.dumps(result, indent=1) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")
        files = "png, csv, json" if plots else "csv, json"
        seconds = time.perf_counter() - start
        typer.echo(f"{name}: {seconds:.0f} s, {out / name}.{{{files}}}")
