"""``tq codebook``: show a codebook and what it costs."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tq_core import TQError, gaussian_codebook, lloyd_max
from tq_core.codebook import Codebook, GridName

__all__ = ["codebook"]

_GRIDS: dict[str, GridName | None] = {
    "none": None,
    "int7": "int7",
    "int8": "int8",
    "e4m3": "e4m3",
}


def codebook(
    dim: Annotated[int, typer.Option(help="Dimension of the vectors; 0: Gaussian limit.")] = 128,
    bits: Annotated[int, typer.Option(help="Bits a coordinate, 1 to 8.")] = 4,
    grid: Annotated[str, typer.Option(help="none, int7, int8 or e4m3.")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the codebook of a dimension and bit width."""
    if grid not in _GRIDS:
        raise typer.BadParameter(f"grid={grid!r}: choose one of {', '.join(_GRIDS)}")
    if dim == 0 and _GRIDS[grid] is not None:
        raise typer.BadParameter("dim=0 (Gaussian limit) has no grid; give the head dimension")
    try:
        book = lloyd_max(dim, bits, grid=_GRIDS[grid]) if dim else gaussian_codebook(bits)
    except TQError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        typer.echo(json.dumps(_as_dict(book)))
        return
    console = Console()
    console.print(_table(book))
    console.print(
        f"error of a unit vector {book.mse:.6g} ({-10 * math.log10(book.mse):.2f} dB), "
        f"entropy of a code {book.entropy:.4f} bits"
    )


def _as_dict(book: Codebook) -> dict[str, Any]:
    return {
        "dim": book.dim,
        "bits": book.bits,
        "grid": book.grid,
        "mse": book.mse,
        "entropy": book.entropy,
        "step": book.step,
        "centroids": book.centroids.tolist(),
        "boundaries": book.boundaries.tolist(),
        "levels": None if book.levels is None else book.levels.tolist(),
    }


def _table(book: Codebook) -> Table:
    name = "Gaussian limit" if book.dim is None else f"dimension {book.dim}"
    on = "" if book.grid is None else f", grid {book.grid}"
    table = Table(title=f"Codebook: {name}, {book.bits} bits{on}")
    columns = ["code", "from", "centroid", "to"] + (["level"] if book.levels is not None else [])
    for column in columns:
        table.add_column(column, justify="right")
    edges = [-math.inf, *book.boundaries.tolist(), math.inf]
    for code, centroid in enumerate(book.centroids.tolist()):
        row = [str(code), *(f"{x:.6f}" for x in (edges[code], centroid, edges[code + 1]))]
        table.add_row(*row, *([] if book.levels is None else [str(book.levels[code])]))
    return table
