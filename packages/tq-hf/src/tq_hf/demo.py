"""``tq demo``: a trained model generates with a 16-bit cache and with compressed ones."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tq_hf.demo_measure import CacheResult

__all__ = ["demo"]

_PROMPT = ("humanize", "humanize/time.py")  # a held-out file


def demo(
    prompt: Annotated[
        Path | None, typer.Argument(help="Source file to continue; default: a held-out file.")
    ] = None,
    model: Annotated[str, typer.Option(help="tiny or tiny-large-bias.")] = "tiny",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 96,
    held_out_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens to predict.")] = 1536,
    out: Annotated[Path, typer.Option(help="Folder of the chart and the JSON result.")] = Path(
        "demo-output"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate with a 16-bit cache and with compressed ones, and compare them."""
    notes = Console(stderr=True)
    with notes.status("loading PyTorch and the model") as status:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            result = _run(prompt, model, tokens, held_out_tokens, status.update)
        except (ValueError, RuntimeError, OSError) as error:
            notes.print(f"tq demo: {error}", style="red", highlight=False, markup=False)
            raise typer.Exit(1) from None
        results: list[CacheResult] = result.pop("results")
        result["caches"] = [r.as_dict() for r in results]
        status.update("drawing the chart")
        from tq_hf.demo_chart import draw

        out.mkdir(parents=True, exist_ok=True)
        draw(results, out / "demo.png")
        text = json.dumps(result, indent=1) + "\n"
        (out / "demo.json").write_text(text, encoding="utf-8")
    if as_json:
        typer.echo(text, nl=False)
    else:
        _show(Console(), result, results)
        Console().print(f"chart: {out / 'demo.png'}   numbers: {out / 'demo.json'}")


def _run(
    path: Path | None, name: str, tokens: int, held_out_tokens: int, progress: Any
) -> dict[str, Any]:
    import torch
    import transformers

    from tq_hf.demo_measure import measure
    from tq_hf.models import held_out_documents, held_out_text, load_model

    if path is None:
        documents = {(d.package, d.path): d.text for d in held_out_documents()}
        source, text = _PROMPT[1], documents[_PROMPT]
    else:
        source, text = path.name, path.read_text(encoding="utf-8")
    model, tokenizer = load_model(name, dtype=torch.bfloat16)
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    start = time.perf_counter()
    results = measure(
        model,
        tokenizer,
        text,
        held_out_text("werkzeug"),
        new_tokens=tokens,
        held_out_tokens=held_out_tokens,
        progress=progress,
    )
    return {
        "model": name,
        "prompt": source,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }


def _show(console: Console, result: dict[str, Any], results: list[CacheResult]) -> None:
    console.print(f"[bold]{result['model']}[/bold] continues {result['prompt']}, greedily:")
    width = max(30, (console.width - 1) // 2)
    panels = [
        Panel(
            Text(r.text, overflow="fold"),
            title=r.name
            if r is results[0]
            else f"{r.name}: first {r.same_prefix} of {r.generated} tokens the same",
            width=width,
        )
        for r in results
    ]
    console.print(Columns(panels, padding=(0, 0)))
    table = Table(title=f"{results[0].predicted:,} held-out tokens through each cache")
    for column in ("cache", "perplexity", "same best token", "bytes a token", "ratio"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    table.add_column("held, all tensors", justify="right")
    table.add_column("Llama-3.1-8B shape, 128k", justify="right")
    for r in results:
        table.add_row(
            r.name,
            f"{r.perplexity:.4f}",
            f"{r.agreement:.2%}",
            f"{r.bytes_per_token:,}",
            f"{r.ratio:.2f}x",
            f"{r.held_bytes / 2**10:,.0f} KiB",
            f"{r.projection_bytes / 2**30:.2f} GiB",
        )
    console.print(table)
