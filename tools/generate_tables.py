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
DOCUMENTS = (
    "README.md",
    "docs/performance.md",
    "docs/research.md",
    "docs/quality.md",
    "docs/presets.md",
    "docs/comparison.md",
    "docs/vllm.md",
    "docs/development.md",
)
MARKER = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table:\1 -->", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {}
MODELS = ("tiny", "tiny-large-bias")


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


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, text_last: bool = False
) -> str:
    """Return a table whose first column is text, as is the last with ``text_last``."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    if text_last:
        rule[-1] = "---"
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


@table("models")
def models() -> str:
    """Quality of the trained models, and what rounding their keys does to it."""
    header = ("model", "bits per byte", "xz -9e", "recall at 1,536 tokens")
    keys = ("perplexity, 16-bit keys", "4-bit keys", "4-bit, mean subtracted")
    rows = []
    for name in MODELS:
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


GPU_RESULT = "benchmarks/results/gpu-h100.json"
#: From before several changes; see docs/performance.md.
H200_RESULT = "benchmarks/results/gpu-h200.json"
VARIANTS = "benchmarks/results/variants-h100.json"
OURS, FA3 = "TurboQuant", "FlashAttention 3 bf16"
#: Larger errors of our kernels against the reference are no result.
MOST_ERROR = 0.02


def gpu(section: str, source: str = GPU_RESULT) -> list[dict[str, Any]]:
    """Entries of a section of the GPU benchmark whose outputs were right."""
    entries = load(source)["sections"][section]
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


def size(shape: dict[str, Any]) -> str:
    """Batch × context."""
    return f"{shape['batch']} × {thousands(shape['context'])}"


def decode_label(shape: dict[str, Any]) -> str:
    """Batch × context, and what differs from one query of 4 heads on each of 8 KV heads."""
    group = f", group {shape['heads'] // 8}" if shape["heads"] != 32 else ""
    several = f", {shape['query_len']} tokens" if shape["query_len"] > 1 else ""
    return size(shape) + group + several


def microseconds(entry: dict[str, Any], name: str) -> str:
    """Median of a kernel, and how many times ours that is."""
    kernel = entry["kernels"].get(name)
    if kernel is None:
        return "–"
    text = f"{kernel['ms']['p50'] * 1e3:.1f}"
    return text if name == OURS else f"{text} ({entry['speedup'][name]:.2f}x)"


def rate(entry: dict[str, Any]) -> str:
    """Share of the measured copy that our kernel reaches."""
    share = entry["kernels"][OURS].get("share_of_copy")
    return "–" if share is None else f"{share:.2f}"


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
    return markdown(header, rows)


def gpu_machine(source: str) -> str:
    """What the GPU benchmark ran on."""
    result = load(source)
    machine = result["machine"]
    rows = [
        ("device", f"{machine['device']}, driver {machine['driver']}"),
        ("PyTorch, Triton", f"{machine['packages']['torch']}, {machine['packages']['triton']}"),
        ("date, commit", f"{result['date'][:10]}, {(result['commit'] or 'unknown')[:12]}"),
        ("copy (read + written)", f"{result['copy']['tbps']:.2f} TB/s"),
        ("read alone", f"{result['read']['tbps']:.2f} TB/s"),
    ]
    return markdown(("", ""), rows)


@table("gpu-machine")
def gpu_machine_here() -> str:
    """That of the other tables."""
    return gpu_machine(GPU_RESULT)


@table("h200-machine")
def gpu_machine_h200() -> str:
    """That of `h200`."""
    return gpu_machine(H200_RESULT)


@table("h200")
def h200() -> str:
    """Main shapes on an H200."""
    rows = [
        (f"decode, {decode_label(e['shape'])}", e, FA3)
        for section in ("decode", "queries")
        for e in gpu(section, H200_RESULT)
    ]
    rows += [
        (f"store, {e['shape']['tokens']:,} tokens", e, "copy of the same bytes")
        for e in gpu("store", H200_RESULT)
    ]
    cells = [(label, microseconds(e, OURS), rate(e), microseconds(e, n)) for label, e, n in rows]
    return markdown(("", "TurboQuant µs", "of copy", f"{FA3} or copy, µs"), cells)


@table("gpu-decode")
def gpu_decode() -> str:
    """Decode of the headline shapes beside every peer."""
    peers = (FA3, "FlashAttention 3 fp8", "vLLM turboquant_4bit_nc", "vLLM int4_per_token_head")
    return gpu_rows("decode", size, peers)


@table("gpu-bits")
def gpu_bits() -> str:
    """Decode with other bits."""

    def label(shape: dict[str, Any]) -> str:
        return f"K{shape['k_bits']}V{shape['v_bits']}, {size(shape)}"

    return gpu_rows("bits", label, (FA3,))


@table("gpu-queries")
def gpu_queries() -> str:
    """Decode of several query tokens a sequence, against one."""
    ones = {size(e["shape"]): e["kernels"][OURS]["ms"]["p50"] for e in gpu("decode")}
    rows = []
    for entry in gpu("queries"):
        shape = entry["shape"]
        one, time = ones.get(size(shape)), entry["kernels"][OURS]["ms"]["p50"]
        rows.append(
            (
                f"{shape['query_len']} tokens, {size(shape)}",
                microseconds(entry, OURS),
                "–" if one is None else f"{time / one:.2f}x",
                microseconds(entry, FA3),
            )
        )
    return markdown(("", "TurboQuant µs", "of one token", f"{FA3} µs"), rows)


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
    return markdown(("batch", *(thousands(c) for c in contexts)), rows)


@table("cpu-decode")
def cpu_decode() -> str:
    """Decode on the CPU: PyTorch's attention, then ours."""
    result = load("benchmarks/results/cpu-decode.json")
    where = result["where"]
    rows = [
        (
            name.replace("sdpa-", "PyTorch, ") if name.startswith("sdpa") else name.upper(),
            f"{taken['wall_ms']:.1f}",
            f"{taken['wall_ratio']:.2f}x",
        )
        for name, taken in result["times"].items()
    ]
    header = (f"{where['processor']}, {where['threads']} threads", "ms", "of bfloat16")
    return markdown(header, rows)


@table("gpu-store")
def gpu_store() -> str:
    """Store beside a copy of the same bytes and the peers."""
    peers = ("copy of the same bytes", "vLLM turboquant_4bit_nc", "vLLM int4_per_token_head")
    return gpu_rows("store", lambda s: f"{s['tokens']:,} tokens", peers)


@table("gpu-prefill")
def gpu_prefill() -> str:
    """Prefill, by two kinds of 16-bit attention, beside FlashAttention 3 on a 16-bit prefix."""

    def label(shape: dict[str, Any]) -> str:
        return f"{thousands(shape['tokens'])} new after {thousands(shape['context'])}"

    def taken(entry: dict[str, Any], name: str) -> str:
        kernels = entry["kernels"]
        if name not in kernels:
            return "–"
        ours, peer = (kernels[n]["ms"]["p50"] for n in (name, FA3))
        return f"{ours * 1e3:.1f} ({ours / peer:.2f}x)"

    rows = [
        (
            label(entry["shape"]),
            f"{entry['kernels'][FA3]['ms']['p50'] * 1e3:.1f}",
            taken(entry, "TurboQuant on FlashAttention 3"),
            taken(entry, OURS),
        )
        for entry in gpu("prefill")
    ]
    return markdown(
        ("", f"{FA3} µs", "TurboQuant on FlashAttention 3 µs", "TurboQuant on PyTorch µs"), rows
    )


def steps(section: str, kinds: Sequence[str]) -> str:
    """Decode before and after changes, in one run on an H100."""
    rows = []
    for entry in load(VARIANTS)[section]["rows"]:
        us, before = entry["us"], entry["us"]["before"]
        cells = (f"{us[kind]:.1f} ({us[kind] / before:.2f}x)" for kind in kinds)
        rows.append((decode_label(entry["shape"]), f"{before:.1f}", *cells))
    return markdown(("", "before µs", *(f"{kind} µs" for kind in kinds)), rows)


@table("decode-lines")
def decode_lines() -> str:
    """Partial results in whole lines."""
    return steps("decode_lines", ("whole lines",))


@table("decode-pages")
def decode_pages() -> str:
    """Pages looked up ahead, and combining let in early."""
    return steps("decode_pages", ("pages ahead", "combining early"))


@table("decode-rows")
def decode_rows() -> str:
    """Ways to attend 16 query rows."""
    entries = load(VARIANTS)["decode_rows"]["rows"]
    kinds = [kind for kind in entries[0]["us"] if kind != "int8"]
    rows = []
    for entry in entries:
        us = entry["us"]
        cells = (f"{us[k]:.1f} ({us[k] / us['int8']:.2f}x)" if k in us else "–" for k in kinds)
        rows.append((decode_label(entry["shape"]), f"{us['int8']:.1f}", *cells))
    return markdown(("", "int8 µs", *(f"{kind} µs" for kind in kinds)), rows)


@table("store-operands")
def store_operands() -> str:
    """Ways to store many tokens, over a copy of the same bytes."""
    entries = load(VARIANTS)["store_operands"]["rows"]
    kinds = [kind for kind in entries[0]["us"] if kind not in ("copy", "kept")]
    counts = [entry for entry in entries if kinds[-1] in entry["us"]]
    rows = [
        (kind, *(f"{e['us'][kind]:.1f} ({e['us'][kind] / e['us']['copy']:.2f}x)" for e in counts))
        for kind in kinds
    ]
    return markdown(("", *(f"{e['tokens']:,} tokens, µs" for e in counts)), rows)


@table("gpu-counters")
def gpu_counters() -> str:
    """Hardware counters of the kernels."""
    kernels = load(VARIANTS)["counters"]["kernels"]
    reasons = [k for k in kernels[0]["stalls"] if max(e["stalls"][k] for e in kernels) >= 5]
    reasons.sort(key=lambda k: -max(e["stalls"][k] for e in kernels))
    lines = [
        ("memory busy %", "dram_percent", 0),
        ("L1 and shared memory busy %", "l1_percent", 0),
        ("issue slots busy %", "issue_percent", 0),
        ("warps of a scheduler", "warps_per_scheduler", 1),
    ]
    rows = [(title, *(f"{e[key]:.{n}f}" for e in kernels)) for title, key, n in lines]
    rows += [(f"waits: {k} %", *(f"{e['stalls'][k]:.0f}" for e in kernels)) for k in reasons]
    return markdown(("", *(e["kernel"] for e in kernels)), rows)


def results(kind: str) -> list[dict[str, Any]]:
    """Every committed result of a kind, ``KIND-NAME.json``; there may be none."""
    found = sorted((ROOT / "benchmarks" / "results").glob(f"{kind}-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def machine_cells(result: dict[str, Any]) -> tuple[str, ...]:
    """Device, versions and commit of a result."""
    machine = result["machine"]
    versions = [f"driver {machine['driver']}"] if machine.get("driver") else []
    versions += [f"{name} {machine['packages'][name]}" for name in ("torch", "triton")]
    return machine["device"], ", ".join(versions), str(result["commit"])[:7]


@table("gpu-tests")
def gpu_tests() -> str:
    """Runs of the tests on GPUs."""
    rows = []
    for result in results("tests"):
        device, versions, commit = machine_cells(result)
        counts = [str(result[name]) for name in ("passed", "failed", "skipped")]
        whole = (
            f"{result['collected']}" if result["complete"] else f"{result['collected']}, stopped"
        )
        rows.append((device, whole, *counts, f"{result['seconds']:.0f}", commit, versions))
    if not rows:
        return ""
    header = ("", "tests", "passed", "failed", "skipped", "seconds", "commit", "versions")
    return markdown(header, rows, text_last=True)


@table("gpu-sanitizer")
def gpu_sanitizer() -> str:
    """Runs of the kernels under compute-sanitizer."""
    rows = []
    for result in results("sanitizer"):
        device, versions, commit = machine_cells(result)
        for tool in ("memcheck", "racecheck"):
            found = result["tools"][tool]
            summary = found["summary"] or f"stopped after {found['seconds']:.0f} seconds"
            rows.append((device, tool, summary, commit, versions))
    return (
        markdown(("", "tool", "found", "commit", "versions"), rows, text_last=True) if rows else ""
    )


@table("serving")
def serving() -> str:
    """vLLM on a GPU with each kind of cache, times over those of the first."""
    result = load("benchmarks/results/serving-h200.json")
    found = {(r["variant"], r["scenario"]): r for r in result["rows"] if "error" not in r}
    columns = (
        ("kv-bound", "kv_tokens", "tokens in 48 GB"),
        ("batch-64", "median_ttft_ms", "64 × 8k: TTFT ms"),
        ("batch-64-cached", "median_tpot_ms", "64 × 8k: TPOT ms"),
        ("batch-1", "median_tpot_ms", "1 × 32k: TPOT ms"),
        ("batch-1", "median_ttft_ms", "1 × 32k: TTFT ms"),
        ("kv-bound", "output_throughput", "3 caches full: tokens/s"),
    )
    variants = list(dict.fromkeys(v for v, s in found if s != "outputs"))

    def cell(variant: str, scenario: str, name: str) -> str:
        if (variant, scenario) not in found:
            return "–"
        value, first = (found[v, scenario][name] for v in (variant, variants[0]))
        text = f"{value:,.2f}" if name.endswith("ms") else f"{value:,.0f}"
        return f"{text} ({value / first:.2f}x)" if variant != variants[0] else text

    rows = [(v, *(cell(v, scenario, name) for scenario, name, _ in columns)) for v in variants]
    return markdown(("", *(title for *_, title in columns)), rows)


def reproduced(name: str, **values: Any) -> list[dict[str, Any]]:
    """Rows of an experiment of `tq reproduce` that have these values."""
    rows = load(f"benchmarks/results/reproduce/{name}.json")["rows"]
    return [r for r in rows if all(r[key] == value for key, value in values.items())]


@table("aot")
def aot() -> str:
    """Registers a lane and KiB of shared memory of kernels, for every GPU."""
    results = load("benchmarks/results/aot.json")
    targets = list(dict.fromkeys(r["target"] for r in results))

    def cell(name: str, target: str) -> str:
        found = [r for r in results if (r["name"], r["target"]) == (name, target)]
        if not found:
            return "–"
        spills = f", {found[0]['spills']} B spilled" if found[0]["spills"] else ""
        return f"{found[0]['registers']}, {found[0]['shared'] / 1024:.0f} KiB{spills}"

    names = dict.fromkeys(r["name"] for r in results)
    rows = [(f"`{name}`", *(cell(name, target) for target in targets)) for name in names]
    return markdown(("kernel", *targets), rows)


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
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["dim"]: row for row in rows if row["method"] == method}
        times = (f"{found[d]['microseconds_per_vector']:,.2f}" if d in found else "" for d in dims)
        printed = [found[d]["printed_seconds"] for d in (200, 1536, 3072)]
        lines.append((method, *times, " / ".join(f"{x:g} s" for x in printed)))
    return markdown(("µs a vector", *(f"d = {d}" for d in dims), "paper, d = 200/1536/3072"), lines)


@table("core-encode")
def core_encode() -> str:
    """Million vectors a second and core that tq-core encodes."""
    rows = load("benchmarks/results/core-speed.json")["encoding"]
    widths = sorted({row["bits"] for row in rows})
    lines = []
    for dtype in ("float64", "float32"):
        for rotation in ("haar", "hadamard"):
            some = [
                row["vectors_per_second"]
                for bits in widths
                for row in rows
                if (row["bits"], row["rotation"], row["compute_dtype"]) == (bits, rotation, dtype)
            ]
            lines.append((f"{dtype}, {rotation}", *(f"{x / 1e6:.2f}" for x in some)))
    header = ("million vectors/s, d = 128", *(f"{bits} bits" for bits in widths))
    return markdown(header, lines)


@table("core-search")
def core_search() -> str:
    """Milliseconds a query among a million codes."""
    rows = load("benchmarks/results/core-speed.json")["search"]
    counts = sorted({row["queries"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["index"] for row in rows):
        some = {row["queries"]: row for row in rows if row["index"] == name}
        times = (f"{some[n]['milliseconds_per_query']:.1f}" for n in counts)
        lines.append((name, *times, str(some[counts[0]]["bytes_per_vector"])))
    header = ("ms a query, queries at once:", *map(str, counts), "bytes a vector")
    return markdown(header, lines)


def quality(model: str, group: str | None = None) -> list[dict[str, Any]]:
    """Configurations that ``benchmarks/quality.py`` measured, of one of its groups."""
    found = load(f"benchmarks/results/quality-{model}.json")["configurations"]
    return [row for row in found if group is None or group in row["groups"]]


def quality_change(row: dict[str, Any]) -> str:
    """Change of the perplexity and its interval."""
    low, high = row["change_interval"]
    return f"{row['change']:+.2%} ({low:+.2%} to {high:+.2%})"


def quality_option(value: Any) -> str:
    """An option of a configuration; a list of layers without brackets."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def quality_ablation(group: str, *shown: str) -> str:
    """Both models side by side: divergence and change of perplexity."""
    header = [*shown, "bytes"]
    for model in MODELS:
        header += [f"`{model}`: KL", "perplexity"]
    other = {row["name"]: row for row in quality(MODELS[1], group)}
    first = {row["name"]: row for row in quality(MODELS[0], group)}
    rows = []
    for name in dict.fromkeys([*first, *other]):
        row = first.get(name) or other[name]
        rounded = (
            f"K{row['k_bits']}V{row['v_bits']}"
            if "k_bits" in row
            else name.partition(", 0 sinks")[0].partition(", centred, balanced")[0]
        )
        keys = [rounded if key == "format" else quality_option(row[key]) for key in shown]
        # Bytes of a token and head, on average over six layers of two heads.
        cells = [*keys, f"{row['bytes_per_token'] / (6 * 2):,.0f}"]
        for found in (first.get(name), other.get(name)):
            missing = found is None
            cells += ["", ""] if missing else [f"{found['kl_mean']:.5f}", quality_change(found)]
        rows.append(cells)
    return markdown(header, rows)


@table("quality-scale")
def quality_scale() -> str:
    """What the stored scale is matched to."""
    return quality_ablation("scale", "format", "scale")


@table("quality-rotation")
def quality_rotation() -> str:
    """The rotation."""
    return quality_ablation("rotation", "format", "rotation")


@table("quality-centring")
def quality_centring() -> str:
    """Where the key center comes from."""
    rows = []
    for model in MODELS:
        for row in quality(model, "centring"):
            source = row["centring"]
            cells = (f"`{model}`", f"K{row['k_bits']}V{row['v_bits']}", source)
            rows.append(
                (*cells, f"{row['kl_mean']:.5f}", f"{row['top1']:.2%}", quality_change(row))
            )
    return markdown(("model", "format", "center", "KL", "same best token", "perplexity"), rows)


@table("quality-ends")
def quality_ends() -> str:
    """Sinks and window."""
    return quality_ablation("ends", "format", "sink_tokens", "window_tokens")


@table("quality-boundaries")
def quality_boundaries() -> str:
    """Layers kept at 16 bits."""
    return quality_ablation("boundaries", "format", "kept")


@table("quality-bits")
def quality_bits() -> str:
    """Bits of keys and values."""
    return quality_ablation("bits", "format")


def quality_rivals(model: str) -> str:
    """All formats of a model by size."""
    rows = [
        (
            f"**{row['name']}**" if "k_bits" in row else row["name"],
            f"{row['slot_bytes']:.0f}",
            f"{row['kl_mean']:.5f}",
            f"{row['kl_p99']:.4f}",
            f"{row['top1']:.2%}",
            quality_change(row),
        )
        for row in sorted(quality(model, "rivals"), key=lambda r: -r["slot_bytes"])
    ]
    header = ("format", "bytes", "KL, mean", "KL, 99th percentile", "same best token", "perplexity")
    return markdown(header, rows)


@table("quality-rivals-tiny")
def quality_rivals_tiny() -> str:
    """Competitors on the plain model."""
    return quality_rivals("tiny")


@table("quality-rivals-large-bias")
def quality_rivals_large_bias() -> str:
    """Competitors on the model with key biases."""
    return quality_rivals("tiny-large-bias")


@table("vector-codes")
def vector_codes() -> str:
    """Errors of lattice and trellis codes over the least possible at their bits."""
    result = load("benchmarks/results/vector-codes.json")
    rows = []
    for row in result["rows"]:
        least = 4.0 ** -row["bits"]
        rows.append(
            (
                f"{row['code']}, {row['bits']} bits",
                f"{row['mse']:.4f}",
                f"{row['mse'] / least:.2f}",
                f"{row['entries']:,}",
                *(f"{result['vectors'] / row[key]:,.0f}" for key in ("encode_s", "decode_s")),
            )
        )
    header = (
        "code", "squared error", "over Shannon's", "entries", "vectors encoded a second", "decoded",
    )  # fmt: skip
    return markdown(header, rows)


@table("quality-retrieval")
def quality_retrieval() -> str:
    """Share of values recalled by depth, and what was lost."""
    rows = []
    depths: list[str] = []
    for model in MODELS:
        result = load(f"benchmarks/results/quality-retrieval-{model}.json")
        for row in result["configurations"]:
            depths = [cell["depth"] for cell in row["cells"]]
            shares = [f"{cell['accuracy']:.3f}" for cell in row["cells"]]
            low, high = row["lost_interval"]
            lost = f"{100 * row['lost']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            whole = (f"{row['accuracy']:.3f}", lost, f"{row['answer_nats']:.3f}")
            rows.append((f"`{model}`", row["name"], f"{row['slot_bytes']:.0f}", *shares, *whole))
    header = ("model", "format", "bytes", *depths, "all", "points lost", "nats of the value")
    return markdown(header, rows)


@table("quality-quantized-caches")
def quality_quantized_caches() -> str:
    """The quantized caches of transformers beside ours."""
    rows = [
        (
            f"`{row['model']}`",
            row["name"],
            f"{row['slot_bytes']:.0f}",
            f"{row['kl_mean']:.5f}",
            f"{row['top1']:.2%}",
            quality_change(row),
        )
        for row in load("benchmarks/results/quality-quantized-caches.json")["rows"]
    ]
    return markdown(("model", "cache", "bytes", "KL", "same best token", "perplexity"), rows)


def layer_pairs(row: dict[str, Any]) -> str:
    """Bits of keys and values of each layer."""
    return " ".join(f"{k}/{v}" for k, v in row["layer_bits"])


@table("quality-decomposition")
def quality_decomposition() -> str:
    """Divergence with codes in one half of one layer."""
    rows = []
    for model in MODELS:
        found = quality(model, "decomposition")
        at = {(r["layer"], r["half"], r["bits"]): r["kl_mean"] for r in found}
        columns = [(half, bits) for half in ("keys", "values") for bits in (4, 3, 2)]
        layers = sorted({layer for layer, _, _ in at})
        for layer in layers:
            cells = [f"{at[layer, *column]:.5f}" for column in columns]
            rows.append((f"`{model}`", str(layer), *cells))
        sums = [f"{sum(at[i, *column] for i in layers):.5f}" for column in columns]
        rows.append((f"`{model}`", "sum", *sums))
    header = [f"{half}, {bits} bits" for half in ("keys", "values") for bits in (4, 3, 2)]
    return markdown(("model", "layer", *header), rows)


@table("quality-schedule")
def quality_schedule() -> str:
    """Bits by layer for a budget beside the same bits everywhere."""
    rows = []
    for model in MODELS:
        for row in sorted(quality(model, "schedule"), key=lambda r: -r["slot_bytes"]):
            own = "layer_bits" in row
            bits = layer_pairs(row) if own else f"{row['k_bits']}/{row['v_bits']} everywhere"
            budget = f"{row['budget']}" if own else ""
            size = f"{row['slot_bytes']:.1f}".removesuffix(".0")
            numbers = (f"{row['kl_mean']:.5f}", f"{row['top1']:.2%}", quality_change(row))
            rows.append((f"`{model}`", budget, bits, size, *numbers))
    header = ("budget", "bits of keys / values", "bytes", "KL", "same best token", "perplexity")
    return markdown(("model", *header), rows)


@table("quality-feedback")
def quality_feedback() -> str:
    """Codes with and without error feedback."""
    ending = ", error feedback"
    found = {model: {r["name"]: r for r in quality(model)} for model in MODELS}
    header = ["format", "bytes"]
    for model in MODELS:
        header += [f"`{model}`: KL", "with feedback", "perplexity with feedback"]
    rows = []
    for row in sorted(quality(MODELS[0], "feedback"), key=lambda r: -r["slot_bytes"]):
        if not row["name"].endswith(ending):
            continue
        name = row["name"].removesuffix(ending)
        cells = [name.partition(",")[0], f"{row['slot_bytes']:.0f}"]
        for model in MODELS:
            plain, better = (found[model][n] for n in (name, row["name"]))
            cells += [f"{plain['kl_mean']:.5f}", f"{better['kl_mean']:.5f}", quality_change(better)]
        rows.append(cells)
    return markdown(header, rows)


@table("quality-codes")
def quality_codes() -> str:
    """How codes of the same bytes are chosen."""
    return quality_ablation("codes", "format", "codes")


@table("quality-balance")
def quality_balance() -> str:
    """Balanced weights, and searched codes with and without them."""
    return quality_ablation("balance", "format", "balanced", "codes")


@table("quality-paper")
def quality_paper() -> str:
    """The paper's fractional rates, and our codes of as many bytes or fewer."""
    rows = []
    for model in MODELS:
        found = {row["name"]: row for row in quality(model)}
        ending = ", centred as ours" if model == "tiny-large-bias" else ""
        for rate, ours in ((3.5, "bits by layer, 100 bytes"), (2.5, "bits by layer, 76 bytes")):
            paper = found[f"outlier channels, {rate} bits, as the paper{ending}"]
            scaled = found[f"outlier channels, {rate} bits{ending}"]
            for name, row in (
                (f"outlier channels, {rate} bits, as the paper", paper),
                (f"outlier channels, {rate} bits, unbiased scale", scaled),
                ("bits by layer", found[ours]),
            ):
                numbers = (f"{row['kl_mean']:.5f}", f"{row['top1']:.2%}", quality_change(row))
                rows.append((f"`{model}`", name, f"{row['slot_bytes']:.0f}", *numbers))
    header = ("model", "format", "bytes", "KL", "same best token", "perplexity")
    return markdown(header, rows)


#: Name of a configuration with all that leaves bytes and decoding as they are.
BALANCED = "{}, centred, balanced keys and values, search in the metric"
#: Targets of the cosine of each layer's keys and values.
LEAST_COSINE = {"K4V4": 0.99, "K4V3": 0.98}


@table("quality-layers")
def quality_layers() -> str:
    """Cosines of each layer's keys and values with what they were."""
    rows = []
    for model in MODELS:
        for row in load(f"benchmarks/results/quality-{model}.json")["layers"]:
            layers, limit = row["layers"], LEAST_COSINE[row["name"]]
            keys, values, out = (min(x[f"{n}_cosine"] for x in layers) for n in ("k", "v", "out"))
            verdict = "met" if min(keys, values) >= limit else "missed"
            cells = (f"{keys:.4f}", f"{values:.4f}", f"{out:.4f}", f"{limit:.2f}: {verdict}")
            rows.append((f"`{model}`", row["name"], *cells))
    header = ("keys", "values", "attention output", "least of keys and values, target")
    return markdown(("model", "format", *header), rows)


@table("quality-targets")
def quality_targets() -> str:
    """The targets that were set before measuring, and what came out."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, model: str, value: str, met: bool) -> None:
        rows.append((what, f"`{model}`", value, "met" if met else "missed"))

    for model in MODELS:
        found = {row["name"]: row for row in quality(model)}
        k4, k3 = found["K4V4"], found["K3V3"]
        for what, row, limit in (
            ("K4V4: perplexity +0.3% at most", k4, 0.003),
            ("K3V3: perplexity +1.5% at most", k3, 0.015),
        ):
            add(what, model, quality_change(row), row["change"] <= limit)
        ending = ", centred as ours" if model == "tiny-large-bias" else ""
        integers = found[f"INT4 + Hadamard{ending}"]
        half = "half the KL of INT4 + Hadamard at most, equal or fewer bytes"
        for label, name in (
            ("4 bits", "K4V4"),
            ("4 bits, by layer", "bits by layer, 136 bytes"),
            ("K4V4, balanced and searched", BALANCED.format("K4V4")),
        ):
            row = found[name]
            share = row["kl_mean"] / integers["kl_mean"]
            value = f"{share:.2f} of it ({row['slot_bytes']:.0f} and {integers['slot_bytes']:.0f})"
            add(f"{label}: {half}", model, value, share <= 0.5)
        recall = load(f"benchmarks/results/quality-retrieval-{model}.json")["configurations"]
        by_name = {row["name"]: row for row in recall}
        for label, name in (("K3V3", "K3V3"), ("3 bits, by layer", "bits by layer, 100 bytes")):
            row = by_name[name]
            low, high = row["lost_interval"]
            value = f"{100 * row['lost']:.1f} lost ({100 * low:+.1f} to {100 * high:+.1f})"
            add(f"{label}: recall within 1 point", model, value, row["lost"] <= 0.01)
        for row in load(f"benchmarks/results/quality-{model}.json")["layers"]:
            limit = LEAST_COSINE[row["name"]]
            least = min(min(x["k_cosine"], x["v_cosine"]) for x in row["layers"])
            what = f"{row['name']}: cosine of each layer's keys and values {limit} at least"
            add(what, model, f"{least:.4f}", least >= limit)
    found = {row["name"]: row for row in quality("tiny-large-bias")}
    for name in ("K4V4", "K3V3"):
        lost, kept = found[f"{name}, centre none"], found[name]
        value = f"{lost['change']:+.0%} without, {kept['change']:+.2%} with"
        met = kept["change"] <= 0.015 < lost["change"]
        add(f"{name}: key centring rescues the model", "tiny-large-bias", value, met)
    return markdown(("target", "model", "measured", "verdict"), rows)


@table("presets")
def presets() -> str:
    """Size and measured quality of every preset."""
    from tq_kernels.presets import PRESETS

    measured = {model: {r["name"]: r for r in quality(model, "bits")} for model in MODELS}
    rows = []
    for preset in PRESETS.values():
        name = f"K{preset.k_bits}V{preset.v_bits}"
        cells = [f"`{preset.name}`", f"{preset.k_bits}, {preset.v_bits}"]
        cells += [str(preset.slot_bytes(dim)) for dim in (64, 128, 256)]
        cells += [f"{preset.ratio(32, 128):.2f}x", f"{preset.bits_per_number(128):.3g}"]
        for model in MODELS:
            row = measured[model][name]
            cells += [f"{row['change']:+.2%}", f"{row['kl_mean']:.5f}"]
        rows.append((*cells, preset.use))
    header = ["preset", "K, V bits", "bytes, head_dim 64", "128", "256", "ratio", "bits a number"]
    for model in MODELS:
        header += [f"`{model}`: perplexity", "KL"]
    return markdown((*header, "when"), rows, text_last=True)


@table("vllm-presets")
def vllm_presets() -> str:
    """Bytes of a page of every preset, for a token and KV head, beside vLLM's own caches."""
    from tq_kernels.presets import PRESETS

    rows = [
        (f"`{p.name}`", f"{p.k_bits}, {p.v_bits}", str(p.slot_bytes(128)), p.use)
        for p in PRESETS.values()
    ]
    rows += [
        ("`--kv-cache-dtype fp8`", "8, 8", str(2 * 128), "vLLM's own 8-bit floats."),
        ("none", "16, 16", str(2 * 2 * 128), "What models compute."),
    ]
    return markdown(("`TQ_PRESET`", "K, V bits", "bytes", "when"), rows, text_last=True)


#: Formats of the comparison: name in the measured results, how it is called, what it is.
COMPARED = (
    ("K4V4", "TurboQuant `tq4`", "rotated keys and values, Lloyd-Max codes, one fp16 scale each"),
    ("K4V3", "TurboQuant `tq4v3`", "the same with 3-bit values"),
    ("K3V3", "TurboQuant `tq3`", "3 bits for both"),
    ("FP8 e4m3", "FP8", "8-bit floats, in every engine and in tensor cores"),
    (
        "INT4 + Hadamard",
        "vLLM `int4_per_token_head`",
        "4-bit integers with scale and zero point, Hadamard rotation",
    ),
    (
        "vLLM turboquant_4bit_nc",
        "vLLM built-in `turboquant_4bit_nc`",
        "Lloyd-Max keys, min/max values that are not rotated",
    ),
    (
        "vLLM turboquant_3bit_nc",
        "vLLM built-in `turboquant_3bit_nc`",
        "the same in 3 bits",
    ),
    (
        "KIVI 2",
        "KIVI, 2 bits",
        "keys by channel, values by token; a scale and a zero point for each group",
    ),
)


@table("comparison")
def comparison() -> str:
    """Bytes of a token and KV head of every format, as measured for its quality."""
    measured = {row["name"]: row["slot_bytes"] for row in quality("tiny", "rivals")}
    bf16 = 2 * 2 * 128
    rows = [
        (label, f"{measured[name]:.0f}", f"{bf16 / measured[name]:.2f}x", what)
        for name, label, what in COMPARED
    ]
    first = ("16 bits", str(bf16), "1.00x", "what models compute")
    header = ("cache", "bytes", "ratio", "what it is")
    return markdown(header, (first, *rows), text_last=True)


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
