"""Plot the bandwidth that decode reaches against what the GPU's memory gives.

Usage: ``python benchmarks/plot_gpu.py [RESULT.json [PLOT.png]]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/gpu-h100.json"
PLOT = ROOT / "docs/performance-h100.png"
STYLES = {
    "TurboQuant": ("o", "tab:red"),
    "FlashAttention 3 bf16": ("s", "tab:blue"),
    "FlashAttention 3 fp8": ("D", "tab:cyan"),
    "vLLM int4_per_token_head": ("^", "tab:green"),
    "vLLM turboquant_4bit_nc": ("v", "tab:gray"),
}


def main(arguments: list[str]) -> int:
    """Draw the plot."""
    source = Path(arguments[0]) if arguments else RESULT
    target = Path(arguments[1]) if len(arguments) > 1 else PLOT
    result = json.loads(source.read_text(encoding="utf-8"))
    sections = ("decode", "sweep", "heads", "bits", "queries")
    entries = [e for name in sections for e in result["sections"].get(name, [])]
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, (marker, color) in STYLES.items():
        kernels = [e["kernels"][name] for e in entries if name in e["kernels"]]
        axes.scatter(
            [k["bytes"] / 1e6 for k in kernels],
            [k["tbps"] for k in kernels],
            marker=marker, c=color, s=22, label=name, alpha=0.8,
        )  # fmt: skip
    for key, text, style in (("copy", "measured copy", "-"), ("read", "measured read", ":")):
        if key in result:
            axes.axhline(result[key]["tbps"], color="black", ls=style, lw=1, label=text)
    axes.set_xscale("log")
    axes.set_xlabel("bytes that a call has to move (MB)")
    axes.set_ylabel("achieved TB/s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Decode on {result['machine']['device']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
