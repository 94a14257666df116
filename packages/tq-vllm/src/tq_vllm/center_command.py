"""``tq center``: measure the constants that ``TQ_KEY_CENTER`` subtracts from keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["center"]


def center(
    model: Annotated[str, typer.Argument(help="Folder or hub id, as for vllm serve.")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Typical text.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens a prompt.")] = 2048,
    dtype: Annotated[str, typer.Option(help="As for vllm serve.")] = "auto",
    gpu_memory_utilization: Annotated[float, typer.Option(help="As for vllm serve.")] = 0.9,
) -> None:
    """Measure the mean keys of a model on a text with vLLM, on one device."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the layers are to be in this process
    from vllm import LLM

    from tq_vllm.center import measure_centers, save_centers

    llm = LLM(
        model,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=length + 1,
    )
    ids = llm.get_tokenizer().encode(text.read_text(encoding="utf-8"))[:tokens]
    prompts = [ids[i : i + length] for i in range(0, len(ids), length)]
    centers = measure_centers(llm, prompts)
    save_centers(centers, out)
    typer.echo(f"{out}: mean keys of {len(centers)} layers over {len(ids)} tokens")
