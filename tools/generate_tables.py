"""Write the tables of the documents from the committed result files.

A document holds ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; what is between them is
written by the function registered under that name.

Usage: ``python tools/generate_tables.py [--check]``; ``--check`` writes nothing and exits with 1 if
a document is not in step with the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/performance.md", "docs/research.md")
MARKER = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table:\1 -->", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}


def table(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that returns the text of a table."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        if name in TABLES:
            raise ValueError(f"table {name!r} is registered twice; choose another name")
        TABLES[name] = function
        return function

    return register


def load(path: str) -> Any:
    """Read a result file, by its path from the repository's root."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


@table("models")
def models() -> str:
    """Quality of the trained models, and what rounding their keys does to it."""
    header = ("model", "bits per byte", "xz -9e", "recall at 1,536 tokens")
    keys = ("perplexity, 16-bit keys", "4-bit keys", "4-bit, mean subtracted")
    rows = []
    for name in ("tiny", "tiny-large-bias"):
        result = load(f"tools/train_tiny_lm/results/{name}-quality.json")
        rounded = result["key_quantization"]
        rows.append(
            (
                f"`{name}`",
                f"{result['held_out']['bits_per_byte']:.3f}",
                f"{result['compressors_bits_per_byte']['xz -9e']:.3f}",
                f"{result['retrieval']['accuracy']['1536']:.3f}",
                *(f"{rounded[k]['perplexity']:.2f}" for k in ("exact", "plain_4", "centred_4")),
            )
        )
    return markdown((*header, *keys), rows)


@table("demo")
def demo() -> str:
    """Size and quality of each cache, as `tq demo` measured them."""
    rows = [
        (
            row["name"],
            f"{row['perplexity']:.3f}",
            f"{row['agreement']:.1%}",
            f"{row['bytes_per_token']:,}",
            f"{row['ratio']:.2f}x",
            f"{row['projection_bytes'] / 2**30:.2f} GiB",
        )
        for row in load("benchmarks/results/demo.json")["caches"]
    ]
    header = ("cache", "perplexity", "same best token", "bytes a token", "ratio")
    return markdown((*header, "Llama-3.1-8B shape, 128k"), rows)


GPU_RESULT = "benchmarks/results/gpu-h200.json"
OURS, FA3 = "TurboQuant", "FlashAttention 3 bf16"
#: Larger errors of our kernels against the reference are no result.
MOST_ERROR = 0.02


def gpu(section: str) -> list[dict[str, Any]]:
    """Entries of a section of the GPU benchmark whose outputs were right; none without the file."""
    if not (ROOT / GPU_RESULT).exists():
        return []
    entries = load(GPU_RESULT)["sections"].get(section, [])
    return [entry for entry in entries if sound(entry["kernels"].get(OURS))]


def sound(kernel: dict[str, Any] | None) -> bool:
    """Whether a kernel ran and agreed with the reference."""
    if kernel is None:
        return False
    checks = kernel["checks"]
    return bool(checks.get("error", 0.0) <= MOST_ERROR and checks.get("finite", 1.0) == 1.0)


def thousands(number: int) -> str:
    """``32k`` for 32768."""
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def microseconds(entry: dict[str, Any], name: str, *, ratio: bool = True) -> str:
    """Median of a kernel, and how many times ours that is."""
    kernel = entry["kernels"].get(name)
    if kernel is None:
        return "–"
    text = f"{kernel['ms']['p50'] * 1e3:.1f}"
    return f"{text} ({entry['speedup'][name]:.2f}x)" if ratio and name != OURS else text


def rate(entry: dict[str, Any]) -> str:
    """Share of the measured copy that our kernel reaches."""
    share = entry["kernels"][OURS].get("share_of_copy")
    return "–" if share is None else f"{share:.2f}"


def gpu_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, or a line that says that nothing is measured."""
    return markdown(header, rows) if rows else "No measurement is committed yet.\n"


def gpu_rows(section: str, label: Callable[[dict[str, Any]], str], peers: Sequence[str]) -> str:
    """Table with a line for each shape: ours, its share of the copy, the peers."""
    header = ("", "TurboQuant µs", "of copy", *(f"{name} µs" for name in peers))
    rows = [
        (
            label(entry["shape"]),
            microseconds(entry, OURS),
            rate(entry),
            *(microseconds(entry, name) for name in peers),
        )
        for entry in gpu(section)
    ]
    return gpu_table(header, rows)


@table("gpu-machine")
def gpu_machine() -> str:
    """What the GPU benchmark ran on."""
    if not (ROOT / GPU_RESULT).exists():
        return "No measurement is committed yet.\n"
    result = load(GPU_RESULT)
    machine, copy, read = result["machine"], result.get("copy"), result.get("read")
    rows = [
        ("device", f"{machine['device']}, driver {machine['driver']}"),
        ("PyTorch, Triton", f"{machine['packages']['torch']}, {machine['packages']['triton']}"),
        ("date, commit", f"{result['date'][:10]}, {(result['commit'] or 'unknown')[:12]}"),
        ("copy (read + written)", f"{copy['tbps']:.2f} TB/s" if copy else "–"),
        ("read alone", f"{read['tbps']:.2f} TB/s" if read else "–"),
    ]
    return markdown(("", ""), rows)


@table("gpu-decode")
def gpu_decode() -> str:
    """Decode of the headline shapes beside every peer."""
    peers = (FA3, "FlashAttention 3 fp8", "vLLM turboquant_4bit_nc", "vLLM int4_per_token_head")
    return gpu_rows("decode", lambda s: f"{s['batch']} × {thousands(s['context'])}", peers)


@table("gpu-bits")
def gpu_bits() -> str:
    """Decode with other bits."""

    def label(shape: dict[str, Any]) -> str:
        size = f"{shape['batch']} × {thousands(shape['context'])}"
        return f"K{shape['k_bits']}V{shape['v_bits']}, {size}"

    return gpu_rows("bits", label, (FA3,))


@table("gpu-queries")
def gpu_queries() -> str:
    """Decode of several query tokens a sequence, against one."""
    ones = {
        (e["shape"]["batch"], e["shape"]["context"]): e["kernels"][OURS]["ms"]["p50"]
        for e in gpu("decode")
    }
    rows = []
    for entry in gpu("queries"):
        shape = entry["shape"]
        size = (shape["batch"], shape["context"])
        one, time = ones.get(size), entry["kernels"][OURS]["ms"]["p50"]
        rows.append(
            (
                f"{shape['query_len']} tokens, {size[0]} × {thousands(size[1])}",
                microseconds(entry, OURS),
                "–" if one is None else f"{time / one:.2f}x",
                microseconds(entry, FA3),
            )
        )
    return gpu_table(("", "TurboQuant µs", "of one token", f"{FA3} µs"), rows)


@table("gpu-heads")
def gpu_heads() -> str:
    """Decode with other groups and head dimensions."""

    def label(shape: dict[str, Any]) -> str:
        return f"group {shape['heads'] // shape['kv_heads']}, d={shape['head_dim']}"

    return gpu_rows("heads", label, (FA3,))


@table("gpu-sweep")
def gpu_sweep() -> str:
    """Speed-up over 16-bit attention by batch and context."""
    cells = {
        (e["shape"]["batch"], e["shape"]["context"]): e["speedup"].get(FA3)
        for section in ("sweep", "decode")
        for e in gpu(section)
    }
    batches, contexts = (sorted({key[n] for key in cells}) for n in (0, 1))
    rows = [
        (
            str(batch),
            *(f"{v:.2f}x" if (v := cells.get((batch, c))) else "–" for c in contexts),
        )
        for batch in batches
    ]
    return gpu_table(("batch", *(thousands(c) for c in contexts)), rows)


@table("gpu-store")
def gpu_store() -> str:
    """Store beside a copy of the same bytes and the peers."""
    peers = ("copy of the same bytes", "vLLM turboquant_4bit_nc", "vLLM int4_per_token_head")
    return gpu_rows("store", lambda s: f"{s['tokens']:,} tokens", peers)


@table("gpu-prefill")
def gpu_prefill() -> str:
    """Prefill beside 16-bit attention on a 16-bit prefix."""

    def label(shape: dict[str, Any]) -> str:
        return f"{thousands(shape['tokens'])} new after {thousands(shape['context'])}"

    rows = [
        (
            label(entry["shape"]),
            microseconds(entry, OURS),
            f"{entry['kernels'][OURS]['tflops']:.0f}",
            microseconds(entry, FA3),
        )
        for entry in gpu("prefill")
    ]
    return gpu_table(("", "TurboQuant µs", "TFLOP/s", f"{FA3} µs"), rows)


def reproduced(name: str, **values: Any) -> list[dict[str, Any]]:
    """Rows of an experiment of `tq reproduce` that have these values."""
    rows = load(f"benchmarks/results/reproduce/{name}.json")["rows"]
    return [r for r in rows if all(r[key] == value for key, value in values.items())]


@table("reproduce-mse")
def reproduce_mse() -> str:
    """Squared error by bits, beside what the paper prints and its bounds."""
    header = ("bits", "paper prints", "measured, norm stored", "exact", "Gaussian limit")
    more = ("least-squares scale", "the same, dim 128", "lower bound", "upper bound")
    rows = []
    for row in reproduced("distortion", dim=1536, scale="none"):
        bits = row["bits"]
        best = [reproduced("distortion", dim=d, bits=bits, scale="mse")[0] for d in (1536, 128)]
        numbers = (row["mse"], row["exact"], row["gaussian_limit"], *(r["mse"] for r in best))
        numbers += (row["lower_bound"], row["upper_bound"])
        printed = "" if row["printed"] is None else f"{row['printed']}"
        rows.append((str(bits), printed, *(f"{x:.5f}" for x in numbers)))
    return markdown((*header, *more), rows)


@table("reproduce-inner")
def reproduce_inner() -> str:
    """Inner-product error by bits and method, and the bias of the first quantizer."""
    header = ("bits", "paper prints", "sketch, measured", "sketch, exact", "unbiased scale")
    more = ("lower bound", "bias at 0.9: MSE quantizer", "sketch", "unbiased scale")
    rows = []
    for sketch in reproduced("inner-product", method="prod", product=0.0):
        bits = sketch["bits"]
        scaled = reproduced("inner-product", method="unbiased", product=0.0, bits=bits)[0]
        numbers = (sketch["dim_times_squared_error"], sketch["exact"])
        numbers += (scaled["dim_times_squared_error"], sketch["lower_bound"])
        biases = []
        for method in ("mse", "prod", "unbiased"):
            row = reproduced("inner-product", method=method, product=0.9, bits=bits)[0]
            biases.append(f"{row['bias']:+.4f} ± {row['bias_standard_error']:.4f}")
        rows.append((str(bits), f"{sketch['printed']}", *(f"{x:.4f}" for x in numbers), *biases))
    return markdown((*header, *more), rows)


@table("reproduce-neighbours")
def reproduce_neighbours() -> str:
    """Recall, bytes and CPU time of each method, data set and number of bits."""
    header = ("data, bits", "method", "recall@1", "@2", "@4", "@8", "bytes a vector", "CPU s")
    rows = [
        (
            f"{row['data']} ({row['vectors']:,} vectors), {row['bits']} bits",
            row["method"],
            *(f"{row[f'recall_{k}']:.3f}" for k in (1, 2, 4, 8)),
            f"{row['bytes_per_vector']:.0f}",
            f"{row['seconds']:.2f}",
        )
        for row in reproduced("neighbours")
    ]
    return markdown(header, rows)


@table("reproduce-timing")
def reproduce_timing() -> str:
    """Time to quantize a vector by method and dimension."""
    rows = reproduced("timing")
    dims = sorted({row["dim"] for row in rows})
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["dim"]: row for row in rows if row["method"] == method}
        times = (f"{found[d]['microseconds_per_vector']:,.2f}" if d in found else "" for d in dims)
        printed = [found[d]["printed_seconds"] for d in (200, 1536, 3072)]
        table.append((method, *times, " / ".join(f"{x:g} s" for x in printed)))
    return markdown(("µs a vector", *(f"d = {d}" for d in dims), "paper, d = 200/1536/3072"), table)


@table("core-encode")
def core_encode() -> str:
    """Million vectors a second and core that tq-core encodes."""
    rows = load("benchmarks/results/core-speed.json")["encoding"]
    widths = sorted({row["bits"] for row in rows})
    table = []
    for dtype in ("float64", "float32"):
        for rotation in ("haar", "hadamard"):
            some = [
                row["vectors_per_second"]
                for bits in widths
                for row in rows
                if (row["bits"], row["rotation"], row["compute_dtype"]) == (bits, rotation, dtype)
            ]
            table.append((f"{dtype}, {rotation}", *(f"{x / 1e6:.2f}" for x in some)))
    header = ("million vectors/s, d = 128", *(f"{bits} bits" for bits in widths))
    return markdown(header, table)


@table("core-search")
def core_search() -> str:
    """Milliseconds a query among a million codes."""
    rows = load("benchmarks/results/core-speed.json")["search"]
    counts = sorted({row["queries"] for row in rows})
    table = []
    for name in dict.fromkeys(row["index"] for row in rows):
        some = {row["queries"]: row for row in rows if row["index"] == name}
        times = (f"{some[n]['milliseconds_per_query']:.1f}" for n in counts)
        table.append((name, *times, str(some[counts[0]]["bytes_per_vector"])))
    header = ("ms a query, queries at once:", *map(str, counts), "bytes a vector")
    return markdown(header, table)


def render(text: str) -> str:
    """Return a document with its tables written anew.

    Raises
    ------
    ValueError
        If a marker names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; registered: {sorted(TABLES)}")
        return f"<!-- table:{name} -->\n{TABLES[name]()}<!-- /table:{name} -->"

    return MARKER.sub(replace, text)


def main(arguments: Sequence[str]) -> int:
    """Write or check every document."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(name)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"not in step with the results: {stale}; run tools/generate_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
