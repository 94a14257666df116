"""The look of the figures; needs matplotlib (extra ``plots``)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["figure", "save"]


def figure(panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Figure with panels side by side."""
    fig = Figure(figsize=(4.6 * panels + 0.6, 4.0), layout="constrained")
    FigureCanvasAgg(fig)
    axes = [fig.add_subplot(1, panels, n + 1) for n in range(panels)]
    for one in axes:
        one.grid(alpha=0.3)
    return fig, axes


def save(fig: Figure, path: Path) -> None:
    """Write a PNG without the version of matplotlib in it."""
    fig.savefig(path, dpi=110, metadata={"Software": None})
