"""Draw quality against size, from the results of ``benchmarks/quality.py``.

Usage: ``python benchmarks/quality_chart.py``; writes ``docs/quality-pareto.png``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"tiny": "tiny", "tiny-large-bias": "tiny-large-bias, our keys centred"}
STYLES = (
    ("outlier", "outlier channels", "s", "#7a5195"),
    ("vLLM", "vLLM turboquant_*", "D", "#d1793f"),
    ("KIVI", "KIVI", "^", "#4c956c"),
    ("INT", "INT4, INT8 + Hadamard", "v", "#9a031e"),
    ("FP8", "FP8 e4m3", "P", "#555555"),
)


def draw_model(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    """One panel: our formats joined by a line, competitors as points."""
    ours = [r for r in rows if "k_bits" in r]
    ours.sort(key=lambda r: (r["slot_bytes"], r["kl_mean"]))
    best, least = [], float("inf")
    for row in ours:
        if row["kl_mean"] < least:
            best.append(row)
            least = row["kl_mean"]
    points = ([r["slot_bytes"] for r in best], [r["kl_mean"] for r in best])
    axes.plot(*points, "o-", color="#1f6f8b", label="this project", zorder=3)
    for row in best:
        axes.annotate(
            row["name"],
            (row["slot_bytes"], row["kl_mean"]),
            xytext=(5, 5),
            fontsize=8,
            textcoords="offset points",
        )
    layered = sorted((r for r in rows if "budget" in r), key=lambda r: r["slot_bytes"])
    points = ([r["slot_bytes"] for r in layered], [r["kl_mean"] for r in layered])
    axes.plot(*points, "o--", color="#4aa3c0", label="this project, bits by layer", zorder=2)
    for prefix, label, marker, colour in STYLES:
        chosen = [r for r in rows if r["name"].startswith(prefix)]
        points = ([r["slot_bytes"] for r in chosen], [r["kl_mean"] for r in chosen])
        axes.plot(*points, marker, color=colour, label=label, linestyle="none", markersize=6)
    axes.set(
        yscale="log", title=title, xlabel="bytes a token and head (head_dim 128; 16 bits: 512)"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write the chart."""
    figure = Figure(figsize=(13, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (model, title) in zip(panels, MODELS.items(), strict=True):
        path = ROOT / "benchmarks" / "results" / f"quality-{model}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        draw_model(axes, [r for r in rows if {"rivals", "schedule"} & {*r["groups"]}], title)
    panels[0].set_ylabel("mean KL divergence, nats a token (lower is better)")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(ROOT / "docs" / "quality-pareto.png")


if __name__ == "__main__":
    main()
