"""Rows of results: how they are written, and what an experiment is."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Experiment", "Note", "Row", "select", "write_csv"]

Row = dict[str, Any]
Note = Callable[[str], None]


class Measure(Protocol):
    """``measure(quick, note)``: rows of results; ``note`` is told what is being done."""

    def __call__(self, quick: bool = False, note: Note = ...) -> list[Row]: ...


@dataclass(frozen=True)
class Experiment:
    """What to measure, and how to draw it into a PNG."""

    measure: Measure
    draw: Callable[[Sequence[Row], Path], None]


def select(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows; columns in the order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
