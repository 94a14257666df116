"""The report of ``tq verify`` as a PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tq_hf.verify.report import Report

__all__ = ["draw"]

_COLOURS = {"keys": "#1f6f8b", "values": "#d1793f", "output": "#4c956c"}


def draw(report: Report, path: Path) -> None:
    """Write a PNG: cosines by layer, tasks by length and depth, and the main numbers."""
    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    cosines, tasks, text = figure.subplots(1, 3)
    tasks.set_visible(bool(report.tasks))
    numbers = [x.layer for x in report.layers]
    for name, values in (
        ("keys", [x.k_cosine for x in report.layers]),
        ("values", [x.v_cosine for x in report.layers]),
        ("output", [x.out_cosine for x in report.layers]),
    ):
        cosines.plot(numbers, values, marker="o", label=name, color=_COLOURS[name])
    cosines.set(xlabel="layer", ylabel="mean cosine with 16 bits", title="Layers")
    cosines.xaxis.set_major_locator(MaxNLocator(integer=True))
    cosines.legend(frameon=False)
    labels = [
        f"{c.task} {c.length}" + ("" if c.depth is None else f" at {c.depth:.0%}")
        for c in report.tasks
    ]
    places = range(len(labels))
    before, after = ([getattr(c, n) for c in report.tasks] for n in ("base_accuracy", "accuracy"))
    tasks.barh([p - 0.2 for p in places], before, 0.38, color="#9aa5b1")
    tasks.barh([p + 0.2 for p in places], after, 0.38, color="#1f6f8b")
    tasks.set_yticks(list(places), labels, fontsize=8)
    tasks.set(xlim=(0, 1.02), xlabel="share that is right", title="Tasks")
    tasks.legend([report.baseline, "compressed"], fontsize=8, loc="lower left")
    tasks.invert_yaxis()
    s = report.scores
    low, high = s.change_interval
    lines = (
        f"{report.model}, K{report.cache['k_bits']}V{report.cache['v_bits']}"
        + (", bits by layer" if report.cache.get("layer_bits") else ""),
        f"{report.bytes_per_token:,.0f} bytes a token, {report.ratio:.2f}x smaller",
        f"perplexity {s.base_perplexity:.3f} to {s.perplexity:.3f}",
        f"change {s.change:+.2%} ({low:+.2%} to {high:+.2%})",
        f"divergence {s.kl_mean:.5f} nats, 99th percentile {s.kl_p99:.4f}",
        f"same best token {s.top1:.2%} of {s.tokens:,}",
    )
    text.axis("off")
    text.text(0, 0.95, "\n\n".join(lines), va="top", fontsize=11)
    for axes in (cosines, tasks):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
