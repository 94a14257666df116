"""The chart of ``tq demo``: size and quality of each cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tq_hf.demo_measure import CacheResult

__all__ = ["draw"]

_BASELINE, _COMPRESSED = "#9aa5b1", "#1f6f8b"


def _bars(
    axes: Axes, results: Sequence[CacheResult], values: list[float], labels: list[str]
) -> None:
    colours = [_BASELINE] + [_COMPRESSED] * (len(results) - 1)
    bars = axes.bar([r.name for r in results], values, color=colours, width=0.62)
    axes.bar_label(bars, labels=labels, padding=3, fontsize=9)
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)


def draw(results: Sequence[CacheResult], path: Path) -> None:
    """Write a PNG of three panels: projected size, perplexity and agreement.

    Parameters
    ----------
    results : sequence of CacheResult
        The 16-bit cache's first.
    path : Path
        File to write; its folder must exist.
    """
    figure = Figure(figsize=(12, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    size, quality, agreement = figure.subplots(1, 3)
    gib = [r.projection_bytes / 2**30 for r in results]
    _bars(
        size,
        results,
        gib,
        [f"{g:.1f}\n{r.ratio:.2f}x" for g, r in zip(gib, results, strict=True)],
    )
    size.set_title("Cache of a Llama-3.1-8B shape at 128k", fontsize=10)
    size.set_ylabel("GiB")
    perplexities = [r.perplexity for r in results]
    _bars(quality, results, perplexities, [f"{p:.3f}" for p in perplexities])
    quality.set_title(f"Perplexity, {results[0].predicted:,} held-out tokens", fontsize=10)
    quality.set_ylabel("perplexity a token (lower is better)")
    shares = [100 * r.agreement for r in results]
    _bars(agreement, results, shares, [f"{s:.1f}%" for s in shares])
    agreement.set_title("Same most probable token as 16-bit", fontsize=10)
    agreement.set_ylabel("% of held-out positions")
    figure.savefig(path)
