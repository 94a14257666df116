"""``tq bench``: measure the kernels on the GPU at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from tq_kernels.bench.suite import SECTIONS, Suite

__all__ = ["bench"]


def bench(
    sections: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(SECTIONS)}.")
    ] = "copy,decode,store,prefill",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    device: Annotated[str, typer.Option(help="GPU to measure on.")] = "cuda",
    workers: Annotated[int, typer.Option(help="Processes that compile kernels ahead.")] = 4,
) -> None:
    """Measure decode, store and prefill on this GPU against its memory bandwidth."""
    chosen = sections.split(",")
    for name in chosen:
        if name not in SECTIONS:
            raise typer.BadParameter(f"section {name!r}: choose from {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter(
            "no GPU that PyTorch can use was found; install a PyTorch build for your GPU"
        )
    result = Suite(path=out, device=torch.device(device)).run(chosen, workers)
    raise typer.Exit(1 if result["errors"] else 0)
