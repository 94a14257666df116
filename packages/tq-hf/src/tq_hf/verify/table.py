"""The report of ``tq verify`` for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from tq_hf.verify.report import Report
from tq_hf.verify.sweep import SWEPT_BITS

__all__ = ["tables"]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _layers(report: Report) -> Table:
    pairs = [f"{what} {of}" for what in ("keys", "values", "output") for of in ("cos", "least")]
    table = _table("Each layer, every token as a code", "layer", *pairs, "error K / V / output")
    for x in report.layers:
        table.add_row(
            str(x.layer),
            f"{x.k_cosine:.5f}",
            f"{x.k_cosine_min:.4f}",
            f"{x.v_cosine:.5f}",
            f"{x.v_cosine_min:.4f}",
            f"{x.out_cosine:.5f}",
            f"{x.out_cosine_min:.4f}",
            f"{x.k_error:.3f} / {x.v_error:.3f} / {x.out_error:.3f}",
        )
    return table


def _whole(report: Report) -> Table:
    s = report.scores
    low, high = s.change_interval
    table = _table(f"The whole model, {s.tokens:,} predicted tokens", "measure", "value", "95%")
    table.add_row("divergence, mean", f"{s.kl_mean:.5f} nats", "")
    table.add_row("divergence, 99th percentile", f"{s.kl_p99:.4f} nats", "")
    table.add_row("divergence, largest", f"{s.kl_max:.3f} nats", "")
    table.add_row("same best token", f"{s.top1:.2%}", "")
    pairs = (
        (f"perplexity, {report.baseline}", s.base_perplexity, s.base_interval),
        ("perplexity, compressed", s.perplexity, s.interval),
    )
    for name, value, (a, b) in pairs:
        table.add_row(name, f"{value:.4f}", f"{a:.3f} to {b:.3f}")
    table.add_row("change of perplexity", f"{s.change:+.2%}", f"{low:+.2%} to {high:+.2%}")
    table.add_row("bytes a token", f"{report.bytes_per_token:,.0f}", f"{report.ratio:.2f}x smaller")
    if report.divergence:
        shown = ", ".join(str(n) for n in report.divergence)
        table.add_row(f"greedy tokens before a difference, of {report.generated}", shown, "")
    return table


def tables(report: Report) -> Iterator[Table]:
    """Every table of the report."""
    yield _layers(report)
    if report.tasks:
        columns = ("task", "length", "depth", "count", report.baseline, "compressed")
        table = _table("Tasks: share that is right", *columns)
        for c in report.tasks:
            depth = "" if c.depth is None else f"{c.depth:.0%}"
            shares = (f"{c.base_accuracy:.3f}", f"{c.accuracy:.3f}")
            table.add_row(c.task, f"{c.length:,}", depth, str(c.count), *shares)
        yield table
    if report.harness:
        table = _table("lm-evaluation-harness", "task", "metric", report.baseline, "compressed")
        for h in report.harness:
            table.add_row(h.task, h.metric, f"{h.base:.4f}", f"{h.value:.4f}")
        yield table
    if report.sweep:
        proposed = report.layer_bits or {}
        halves = ("keys", "values")
        names = ["layer", *(f"{bits}-bit {half}" for half in halves for bits in SWEPT_BITS)]
        names += ["proposed bits"] if proposed else []
        table = _table("Divergence in nats with codes in one layer only", *names)
        for x in report.sweep:
            pair = proposed.get(x.layer)
            bits = () if pair is None else (f"{pair[0]} / {pair[1]}",)
            found = (f"{half[n]:.6f}" for half in (x.k_kl, x.v_kl) for n in SWEPT_BITS)
            table.add_row(str(x.layer), *found, *bits)
        yield table
    yield _whole(report)
