"""``tq plan``: what fits into a GPU, by preset, beside bf16 and fp8."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tq_core import TQError

from tq_vllm.capacity import Capacity, ModelShape, capacity, formats, read_config

__all__ = ["parse_bytes", "plan"]

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``80GiB`` or ``24GB``.

    Raises
    ------
    TQError
        If it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise TQError(f"{text!r} is no size: use a number and a unit, such as 80GiB or 24GB")
    return int(float(match[1]) * _UNITS[match[2]])


def plan(
    model: Annotated[str, typer.Argument(help="config.json, its folder, or a hub id.")],
    gpu_memory: Annotated[str, typer.Option(help="Memory of all GPUs together.")] = "80GiB",
    weights: Annotated[str, typer.Option(help="Memory of the weights.")] = "0GiB",
    utilization: Annotated[float, typer.Option(help="As --gpu-memory-utilization.")] = 0.9,
    tokens: Annotated[int, typer.Option(help="Length of a request.")] = 8192,
    k_bits: Annotated[int | None, typer.Option(help="Bits of keys instead of presets.")] = None,
    v_bits: Annotated[int | None, typer.Option(help="Bits of values.")] = None,
    skip_layers: Annotated[str, typer.Option(help="As TQ_SKIP_LAYERS.")] = "none",
    fine_layers: Annotated[str | None, typer.Option(help="As TQ_FINE_LAYERS.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how long a context and how many requests fit into the memory of a GPU."""
    try:
        shape = ModelShape.from_config(read_config(model))
        room = int(parse_bytes(gpu_memory) * utilization) - parse_bytes(weights)
        if room <= 0 or tokens < 1 or not 0 < utilization <= 1:
            raise TQError(
                f"gpu_memory={gpu_memory}, weights={weights}, utilization={utilization}, "
                f"tokens={tokens}: nothing is left for a cache, or no token is asked for"
            )
        rows = [
            capacity(shape, fmt, room, tokens)
            for fmt in formats(k_bits, v_bits, skip_layers, fine_layers)
        ]
    except (TQError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        head = {"model": asdict(shape), "cache_bytes": room, "tokens": tokens}
        typer.echo(json.dumps(head | {"formats": [asdict(row) for row in rows]}))
        return
    console = Console()
    console.print(_table(model, shape, rows, tokens))
    console.print(
        f"{room / 2**30:.1f} GiB for the cache: {gpu_memory} at {utilization:.0%}, less {weights} "
        "of weights. Activations and CUDA graphs need some of it too; vLLM's log has the last word."
    )


def _table(model: str, shape: ModelShape, rows: list[Capacity], tokens: int) -> Table:
    windows = sum(window is not None for window in shape.layers)
    title = (
        f"{model}: {len(shape.layers)} attention layers"
        + (f", {windows} with a window" if windows else "")
        + f", {shape.kv_heads} KV heads of {shape.head_dim}"
    )
    table = Table(title=title)
    table.add_column("cache")
    table.add_column("layers at 16 bits, with more bits")
    for column in ("bytes/token/head", "bytes/token", "smaller", "longest context"):
        table.add_column(column, justify="right")
    table.add_column(f"requests of {tokens:,}", justify="right")
    for row in rows:
        capped = "model's " if row.longest == shape.longest else ""
        table.add_row(
            row.format.name,
            f"{row.format.skip_layers}; {row.format.fine_layers}" if row.format.codes else "",
            str(row.slot_bytes),
            f"{row.token_bytes:,}" + (f" + {row.window_bytes:,}/seq" if windows else ""),
            f"{row.ratio:.2f}x",
            f"{capped}{row.longest:,}",
            f"{row.requests:,}",
        )
    return table
