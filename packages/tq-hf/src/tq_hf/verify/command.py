"""``tq verify`` measures a compressed cache; ``tq calibrate`` and ``tq balance`` prepare for it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["balance", "calibrate", "verify"]

ModelArgument = Annotated[
    str, typer.Argument(help="tiny, tiny-large-bias, or the folder of a transformers model.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run, such as cuda.")]
PiecesOption = Annotated[int, typer.Option(min=1, help="Pieces of text.")]


def _fail(notes: Console, command: str, error: Exception) -> typer.Exit:
    notes.print(f"tq {command}: {error}", style="red", highlight=False, markup=False)
    return typer.Exit(2)


def _numbers(text: str) -> list[int]:
    from tq_core import TQError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise TQError(f"--skip-layers {text!r}: needs numbers such as 0,1,-1") from None


def _cache_options(
    preset: str | None, k_bits: int | None, v_bits: int | None, given: dict[str, Any]
) -> dict[str, Any]:
    from tq_core import TQError
    from tq_kernels.presets import find_preset

    if preset is not None and (k_bits is not None or v_bits is not None):
        raise TQError("give --preset or --k-bits and --v-bits, not both")
    found = find_preset(preset or "tq4")
    options: dict[str, Any] = {
        "k_bits": found.k_bits if k_bits is None else k_bits,
        "v_bits": found.v_bits if v_bits is None else v_bits,
        "sink_tokens": found.sink_tokens,
        "window_tokens": found.window_tokens,
        "skip_layers": list(found.skip_layers),
        "scale": found.scale,
    }
    return options | {name: value for name, value in given.items() if value is not None}


def verify(
    model: ModelArgument = "tiny",
    preset: Annotated[str | None, typer.Option(help="Named format; default tq4.")] = None,
    k_bits: Annotated[int | None, typer.Option(help="Bits of keys: 2, 3, 4 or 8.")] = None,
    v_bits: Annotated[int | None, typer.Option(help="Bits of values.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens kept at 16 bits.")] = None,
    window: Annotated[int | None, typer.Option(help="Last tokens kept at 16 bits.")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers kept at 16 bits, such as 0,-1.")
    ] = None,
    layer_bits: Annotated[
        str | None,
        typer.Option(
            help="Bits of single layers, such as 0=3/4,4=8/4,5=16 (keys/values), or a JSON file "
            "of them, such as the report of a sweep."
        ),
    ] = None,
    key_center: Annotated[
        Path | None, typer.Option(help="Key centers that `tq calibrate` wrote.")
    ] = None,
    search: Annotated[bool, typer.Option(help="Search codes of less error.")] = False,
    metrics: Annotated[
        Path | None, typer.Option(help="For --search: what `tq calibrate --metrics` wrote.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="builtin, or a UTF-8 text file.")] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Pieces of text to predict.")] = 4,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of a piece.")] = 1024,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")] = 32,
    baseline: Annotated[str, typer.Option(help="fp16, bf16, or model: its own type.")] = "fp16",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, such as piqa,arc_easy; tq-hf[tasks]."),
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="Folder of YAML files with tasks of your own.")
    ] = None,
    tasks_limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of a task; default all.")
    ] = None,
    no_tasks: Annotated[
        bool, typer.Option("--no-tasks", help="Leave out retrieval and copying.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a length and depth.")] = 3,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate a prompt.")] = 48,
    sweep: Annotated[bool, typer.Option(help="Compress one layer at a time, too.")] = False,
    budget: Annotated[
        float | None, typer.Option(help="Bytes a token, to propose --layer-bits for.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks.")] = 0,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=NUMBER, again and again: kl, kl_p99, top1, perplexity, retrieval, copy, "
            "k_cosine, v_cosine, out_cosine. Default: kl=0.02 top1=0.95 perplexity=0.01 "
            "retrieval=0.05; none drops these."
        ),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File of the numbers.")] = None,
    png: Annotated[Path | None, typer.Option(help="File of the chart.")] = None,
) -> None:
    """Run a model with a compressed cache and compare it with a 16-bit one.

    Exits with 1 if a threshold is missed and with 2 if nothing could be measured.
    """
    notes = Console(stderr=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bars:
        bar = bars.add_task("loading PyTorch and the model", total=1.0)

        def progress(what: str, share: float) -> None:
            bars.update(bar, description=what, completed=share)

        try:
            from tq_core import TQError

            from tq_hf.bits import parse_layer_bits
            from tq_hf.verify.calibration import read_centers, read_metrics
            from tq_hf.verify.measure import measure
            from tq_hf.verify.report import parse_thresholds
            from tq_hf.verify.texts import load_any_model, read_texts, token_windows

            if budget is not None and not sweep:
                raise TQError(f"--budget {budget:g} is for the sweep: add --sweep")
            if tasks is None and (tasks_folder is not None or tasks_limit is not None):
                raise TQError("--tasks-folder and --tasks-limit are for --tasks: name some tasks")
            limits = parse_thresholds(threshold or [])
            given = {
                "sink_tokens": sinks,
                "window_tokens": window,
                "skip_layers": None if skip_layers is None else _numbers(skip_layers),
                "layer_bits": None if layer_bits is None else parse_layer_bits(layer_bits),
                "key_center": None if key_center is None else read_centers(key_center),
                "search": search or None,
                "metrics": None if metrics is None else read_metrics(metrics),
            }
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                options = _cache_options(preset, k_bits, v_bits, given)
            for warning in caught:
                notes.print(f"tq verify: {warning.message}", style="yellow", markup=False)
            net, tokenizer = load_any_model(model, dtype, device)
            pieces = token_windows(tokenizer, read_texts(dataset), tokens, windows, device)
            report = measure(
                net,
                tokenizer,
                pieces,
                options,
                name=model,
                dataset=dataset,
                baseline=baseline,
                limits=limits,
                chunk=chunk,
                prompts=prompts,
                new_tokens=generate,
                tasks=not no_tasks,
                harness=[name.strip() for name in (tasks or "").split(",") if name.strip()],
                harness_folder=tasks_folder,
                harness_limit=tasks_limit,
                sweep=sweep,
                budget=budget,
                seed=seed,
                progress=progress,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise _fail(notes, "verify", error) from None
    if json_out is not None:
        text = json.dumps(report.as_dict(), indent=1) + "\n"
        json_out.write_text(text, encoding="utf-8")
    if png is not None:
        from tq_hf.verify.chart import draw

        draw(report, png)
    from tq_hf.verify.table import tables

    console = Console()
    for table in tables(report):
        console.print(table)
    if report.layer_bits is not None:
        items = ",".join(f"{i}={k}/{v}" for i, (k, v) in report.layer_bits.items())
        console.print(f"within {budget:g} bytes a token: --layer-bits {items}", highlight=False)
    failures = report.failures()
    for line in failures:
        console.print(f"missed: {line}", style="red", highlight=False)
    if failures:
        raise typer.Exit(1)
    met = [f"{k} {v:g}" for k, v in limits.items() if k in report.values()]
    if met:
        console.print("all thresholds met: " + ", ".join(met), highlight=False)


def calibrate(
    model: ModelArgument = "tiny",
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("key-center.safetensors"),
    dataset: Annotated[
        str, typer.Option(help="builtin, a UTF-8 text file, or bias: from the weights alone.")
    ] = "builtin",
    metrics: Annotated[
        Path | None, typer.Option(help="File to write what errors count for, for a search.")
    ] = None,
    windows: PiecesOption = 4,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a piece.")] = 1024,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
) -> None:
    """Write the mean key of each layer and head, for the cache's ``key_center``."""
    notes = Console(stderr=True)
    with notes.status("loading PyTorch and the model") as status:
        try:
            from tq_core import TQError

            from tq_hf.verify.calibration import (
                bias_centers,
                key_centers,
                write_centers,
                write_metrics,
            )
            from tq_hf.verify.feedback import error_metrics
            from tq_hf.verify.texts import calibration_windows, load_any_model

            if dataset == "bias" and metrics is not None:
                raise TQError("--metrics needs text: give another --dataset than bias")
            net, tokenizer = load_any_model(model, dtype, device)
            status.update("reading keys")
            if dataset == "bias":
                centers = bias_centers(net, tokens)
            else:
                pieces = calibration_windows(tokenizer, dataset, tokens, windows, device)
                centers = key_centers(net, pieces)
                if metrics is not None:
                    write_metrics(error_metrics(net, pieces), metrics, f"{model}, {dataset}")
            write_centers(centers, out, f"{model}, {dataset}")
        except (ValueError, RuntimeError, OSError) as error:
            raise _fail(notes, "calibrate", error) from None
    size = max(float(c.norm(dim=-1).max()) for c in centers.values())
    Console().print(f"{out}: {len(centers)} layers, largest norm {size:.1f}")


def balance(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the balanced model.")],
    keys: Annotated[bool, typer.Option(help="Balance keys, too.")] = True,
    dataset: Annotated[str, typer.Option(help="builtin, or a UTF-8 text file.")] = "builtin",
    windows: PiecesOption = 4,
    tokens: Annotated[int, typer.Option(min=65, help="Tokens of a piece.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Gradients of a piece.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the gradients.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
) -> None:
    """Write a model that computes the same and whose keys and values lose less by rounding."""
    notes = Console(stderr=True)
    with notes.status("loading PyTorch and the model") as status:
        try:
            from tq_core import TQError

            from tq_hf.balance import balance as balance_model
            from tq_hf.verify.texts import calibration_windows, load_any_model

            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise TQError(f"{out} is not an empty folder; name a new one")
            net, tokenizer = load_any_model(model, dtype, device)
            status.update("balancing")
            pieces = calibration_windows(tokenizer, dataset, tokens, windows, device)
            balance_model(net, pieces, keys=keys, samples=samples, seed=seed)
            net.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except (ValueError, RuntimeError, OSError) as error:
            raise _fail(notes, "balance", error) from None
    Console().print(f"{out}: the balanced model; calibrate it anew", highlight=False)
