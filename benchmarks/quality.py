"""Ablate the techniques and compare with competitors, on the trained models.

Usage: ``python benchmarks/quality.py [--model tiny] [--windows 6] [--only GROUP]``

Writes ``results/quality-MODEL.json``. Every configuration is a `RoundedHistory`: predictions of
1,024 tokens of held-out text in one pass, each query seeing old tokens rounded and the first 4 and
the last 32 to 47 as they came, with the unbiased scale (unless the configuration says otherwise).
One text of each package in turn; the first 64 predictions of a window are not scored. Calibrated
centers come from the held-out text of einops, which is not measured; so do metrics of codes, bits by
layer and balanced weights. Runs on one CPU core in about 25 minutes a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor
from tq_hf import TurboQuantCache
from tq_hf.balance import balance
from tq_hf.models import held_out_text, load_model
from tq_hf.verify.calibration import bias_centers, key_centers, key_value_states
from tq_hf.verify.feedback import error_metrics
from tq_hf.verify.layers import measure_layers
from tq_hf.verify.roundings import (
    fp8,
    integers,
    kivi,
    outliers,
    turboquant,
    vllm_turboquant,
)
from tq_hf.verify.scores import compare_logits, summarize
from tq_hf.verify.simulate import RoundedHistory, rounded
from tq_hf.verify.sweep import SWEPT_BITS, LayerSensitivity, propose_bits
from tq_hf.verify.texts import CALIBRATION, builtin_texts, token_windows
from tq_kernels import KVFormat

RESULTS = Path(__file__).resolve().parent / "results"
WINDOW = 1024
UNSCORED = 64
BATCH = 2
ROTATIONS = {
    "haar": {"rotation": "haar"},
    "hadamard 1": {"rounds": 1},
    "hadamard 2": {"rounds": 2},
    "hadamard 3": {},
}
ENDS = ((0, 0), (4, 0), (0, 32), (4, 32), (4, 128))
BOUNDARIES = ((), (0,), (0, -1), (0, 1, -2, -1))
#: Weights of the group "balance", and what is balanced in them.
BALANCED = {
    "nothing": None,
    "keys": {"values": False},
    "values": {"keys": False},
    "keys and values": {},
}
#: Bytes of a token and KV head that bits by layer are proposed for.
BUDGETS = (136, 132, 116, 100, 84, 76)


@dataclass
class Setting:
    """A configuration, what it does, and the tables it belongs to.

    ``model`` is the one whose keys and values are rounded, if it is not the one itself.
    """

    name: str
    history: RoundedHistory
    model: Any = None
    groups: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


class Settings(dict[str, Setting]):
    """Configurations by name; one that is asked for twice belongs to both tables."""

    def put(
        self, group: str, name: str, history: RoundedHistory, model: Any = None, **options: Any
    ) -> None:
        """Add a configuration to a table."""
        setting = self.setdefault(name, Setting(name, history, model))
        setting.groups.append(group)
        setting.options |= options


def settings(model: Any, tokenizer: Any) -> Settings:
    """All configurations. A model with key biases has its keys centred unless noted."""
    dim, layers = model.config.head_dim, model.config.num_hidden_layers
    windows = token_windows(tokenizer, [held_out_text(CALIBRATION)], WINDOW, 4)
    centers = key_centers(model, windows)
    states = key_value_states(model, torch.cat(windows))
    calibration = {
        i: tuple(x.transpose(0, 1).flatten(1, 2) for x in pair) for i, pair in states.items()
    }
    biased = model.config.model_type == "qwen2"
    usual = centers if biased else None
    out = Settings()
    metrics = error_metrics(model, windows)
    everywhere = [(16, 16)] * layers

    def one_layer(layer: int, k: int, v: int) -> RoundedHistory:
        bits = [*everywhere[:layer], (k, v), *everywhere[layer + 1 :]]
        return turboquant(KVFormat(dim), centers=usual, layer_bits=bits)

    def put(group: str, k: int, v: int, label: str = "", **options: Any) -> None:
        given = {"scale": "unbiased"} | options
        v_scale = given.pop("v_scale", None)
        shown = given.pop("show", {})
        center = given.pop("centers", usual)
        ends = {n: given.pop(n) for n in ("sink_tokens", "window_tokens") if n in given}
        if "skip_layers" in given:
            ends["skip_layers"] = frozenset(i % layers for i in given.pop("skip_layers"))
        seeds = given.pop("own_seeds", False)
        history = turboquant(KVFormat(dim, k, v, **given), centers=center, own_seeds=seeds, **ends)
        if v_scale is not None:
            other = turboquant(KVFormat(dim, k, v, **given | {"scale": v_scale}))
            history = replace(history, values=other.values)
        name = f"K{k}V{v}" + (f", {label}" if label else "")
        out.put(group, name, history, k_bits=k, v_bits=v, **shown)

    for bits in (4, 3, 2):
        for scale in ("none", "norm", "mse", "unbiased"):
            label = "" if scale == "unbiased" else f"scale {scale}"
            put("scale", bits, bits, label, scale=scale, show={"scale": scale})
        for one, two in (("unbiased", "mse"), ("mse", "unbiased")):
            shown = f"keys {one}, values {two}"
            put("scale", bits, bits, shown, scale=one, v_scale=two, show={"scale": shown})
        for name, choice in ROTATIONS.items():
            label = "" if name == "hadamard 3" else name
            put("rotation", bits, bits, label, show={"rotation": name}, **choice)
        show = {"rotation": "hadamard 3, one a layer, K and V"}
        put("rotation", bits, bits, "own rotations", own_seeds=True, show=show)
        sources: dict[str, Any] = {"none": None, "first 64 tokens": 64, "calibration": centers}
        if biased:
            sources["key bias"] = bias_centers(model)
        for name, source in sources.items():
            label = "" if source is usual else f"centre {name}"
            put("centring", bits, bits, label, centers=source, show={"centring": name})
        for sinks, window in ENDS:
            label = "" if (sinks, window) == (4, 32) else f"{sinks} sinks, window {window}"
            ends = {"sink_tokens": sinks, "window_tokens": window}
            put("ends", bits, bits, label, show=ends, **ends)
    for bits in (4, 3, 2):
        for skipped in BOUNDARIES:
            label = f"layers {', '.join(map(str, skipped))} at 16 bits" if skipped else ""
            show = {"kept": list(skipped)}
            put("boundaries", bits, bits, label, skip_layers=skipped, show=show)
    if biased:
        for name, label in (("none", "centre none"), ("calibration", "")):
            source = None if name == "none" else centers
            put("centring", 8, 4, label, centers=source, show={"centring": name})
    for layer in range(layers):
        for half in ("keys", "values"):
            for bits in (4, 3, 2):
                pair = (bits, 16) if half == "keys" else (16, bits)
                name = f"layer {layer}, {half} at {bits} bits"
                show = {"layer": layer, "half": half, "bits": bits}
                out.put("decomposition", name, one_layer(layer, *pair), **show)
    found = sensitivities(model, windows, one_layer)
    shapes = dict.fromkeys(range(layers), (1, dim))
    for budget in BUDGETS:
        pairs = [*propose_bits(found, shapes, budget * layers).values()]
        show = {"budget": budget, "layer_bits": [list(pair) for pair in pairs]}
        for given in (None, metrics):
            label = ", error feedback" if given else ""
            history = turboquant(KVFormat(dim), centers=usual, layer_bits=pairs, metrics=given)
            name = f"bits by layer, {budget} bytes{label}"
            out.put("feedback" if given else "schedule", name, history, **show)
    for bits in (4, 3, 2):
        put("schedule", bits, bits)
        put("feedback", bits, bits)
        history = turboquant(KVFormat(dim, bits, bits), centers=usual, metrics=metrics)
        name = f"K{bits}V{bits}, error feedback"
        out.put("feedback", name, history, budget=None)
        both = {"k_bits": bits, "v_bits": bits}
        out.put("codes", name, history, codes="error feedback", **both)
        fmt = KVFormat(dim, bits, bits)
        put("codes", bits, bits, show={"codes": "nearest"})
        history = turboquant(fmt, centers=usual, search=True)
        out.put("codes", f"K{bits}V{bits}, scale search", history, codes="scale search", **both)
        history = turboquant(fmt, centers=usual, metrics=metrics, carry=False)
        name, label = f"K{bits}V{bits}, scale in the metric", "nearest, scale in the metric"
        out.put("codes", name, history, codes=label, **both)
    put("schedule", 4, 3)
    put("schedule", 3, 2)
    pairs = ((8, 8), (8, 4), (4, 4), (4, 3), (3, 4), (3, 3), (4, 2), (2, 4), (3, 2), (2, 3), (2, 2))
    for k, v in pairs:
        put("bits", k, v)
    for k, v in ((8, 8), (8, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2)):
        put("rivals", k, v)
    rivals = {
        "INT8 + Hadamard": integers(dim, 8),
        "INT4 + Hadamard": integers(dim, 4),
        "FP8 e4m3": fp8(dim),
        "KIVI 4": kivi(dim, 4),
        "KIVI 2": kivi(dim, 2),
        "outlier channels, 3.5 bits": outliers(calibration, 3.5),
        "outlier channels, 2.5 bits": outliers(calibration, 2.5),
        "outlier channels, 3.5 bits, as the paper": outliers(calibration, 3.5, scale="none"),
        "outlier channels, 2.5 bits, as the paper": outliers(calibration, 2.5, scale="none"),
    }
    rivals |= {
        f"vLLM turboquant_{name}": vllm_turboquant(dim, name)
        for name in ("k8v4", "4bit_nc", "k3v4_nc", "3bit_nc")
    }
    if biased:
        rivals["INT4 + Hadamard, centred as ours"] = integers(dim, 4, centers=centers)
        rivals["FP8 e4m3, centred as ours"] = fp8(dim, centers=centers)
        centred = {i: (k - centers[i][:, None], v) for i, (k, v) in calibration.items()}
        for rate in (3.5, 2.5):
            for scale, label in (("unbiased", ""), ("none", " as the paper,")):
                history = outliers(centred, rate, scale=scale, centers=centers)
                rivals[f"outlier channels, {rate} bits,{label} centred as ours"] = history
    for name, history in rivals.items():
        out.put("rivals", name, history)
    for sinks, window in ((4, 32), (0, 0)):
        ends = {"sink_tokens": sinks, "window_tokens": window}
        label = "" if sinks else ", 0 sinks, window 0"
        center = ", centred as ours" if biased else ""
        history = integers(dim, 4, centers=usual, **ends)
        out.put("ends", f"INT4 + Hadamard{center}{label}", history, **ends)
    put_balanced(out, model, windows)
    return out


def put_balanced(out: Settings, model: Any, windows: list[Tensor]) -> None:
    """Balanced weights and searched codes; keys are centred in all of them, on either model."""
    dim = model.config.head_dim
    for weights, halves in BALANCED.items():
        changed = model
        if halves is not None:
            changed = copy.deepcopy(model)
            balance(changed, windows, **halves)
        centers = key_centers(changed, windows)
        ways: dict[str, dict[str, Any]] = {"nearest": {}}
        whole = weights in ("nothing", "keys and values")
        if whole:
            metrics = error_metrics(changed, windows)
            ways["search"] = {"search": True}
            ways["search in the metric"] = {"search": True, "metrics": metrics}
            ways["error feedback"] = {"metrics": metrics}
        for bits in (4, 3, 2) if whole else (4,):
            for codes, options in ways.items():
                show = {"k_bits": bits, "v_bits": bits, "balanced": weights, "codes": codes}
                history = turboquant(KVFormat(dim, bits, bits), centers=centers, **options)
                name = f"K{bits}V{bits}, centred, balanced {weights}, {codes}"
                out.put("balance", name, history, changed, **show)
        history = integers(dim, 4, centers=centers)
        name = f"INT4 + Hadamard, centred, balanced {weights}"
        out.put("balance", name, history, changed, balanced=weights, codes="nearest")


def sensitivities(
    model: Any, windows: list[Tensor], one_layer: Callable[[int, int, int], RoundedHistory]
) -> list[LayerSensitivity]:
    """What `tq_hf.verify.sweep.sweep_layers` finds, on calibration text."""
    base = [logits(model, ids[:, :-1], None)[0] for ids in windows]

    def divergence(layer: int, k_bits: int, v_bits: int) -> float:
        history = one_layer(layer, k_bits, v_bits)
        others = (logits(model, ids[:, :-1], history)[0] for ids in windows)
        parts = [
            compare_logits(a[UNSCORED:], b[UNSCORED:], ids[0, UNSCORED + 1 :])
            for a, b, ids in zip(base, others, windows, strict=True)
        ]
        return summarize(parts).kl_mean

    return [
        LayerSensitivity(
            layer,
            {bits: divergence(layer, bits, 8) for bits in SWEPT_BITS},
            {bits: divergence(layer, 8, bits) for bits in SWEPT_BITS},
        )
        for layer in range(model.config.num_hidden_layers)
    ]


def layer_cosines(model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Cosines of each layer's keys and values with what they were, every token as a code."""
    windows = token_windows(tokenizer, [held_out_text(CALIBRATION)], WINDOW, 4)
    centers = key_centers(model, windows) if model.config.model_type == "qwen2" else None
    texts = [ids[:, :-1] for ids in token_windows(tokenizer, builtin_texts(), WINDOW, 2)]
    for k, v in ((4, 4), (4, 3)):
        options = {"sink_tokens": 0, "window_tokens": 0, "key_center": centers}
        cache = partial(TurboQuantCache, model.config, k, v, **options)
        yield {
            "name": f"K{k}V{v}",
            "layers": [asdict(x) for x in measure_layers(model, texts, cache)],
        }


@torch.no_grad()
def logits(model: Any, ids: Tensor, history: RoundedHistory | None) -> Tensor:
    """Logits of a batch in one pass."""
    if history is None:
        out: Tensor = model(input_ids=ids, use_cache=False).logits
        return out
    with rounded(model, history):
        out = model(input_ids=ids, use_cache=False).logits
    return out


def significant(value: Any) -> Any:
    """Five significant digits, so that result files stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, (list, tuple)):
        return [significant(v) for v in value]
    return {k: significant(v) for k, v in value.items()} if isinstance(value, dict) else value


def stored_size(history: RoundedHistory, config: Any) -> dict[str, float]:
    """Bytes of a token in all layers, and how many times smaller than at 16 bits that is."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    kept = len(history.skip_layers)
    full = 4 * config.head_dim
    size = heads * (kept * full + (layers - kept) * history.slot_bytes)
    return {"bytes_per_token": size, "ratio": layers * heads * full / size}


def measure(
    model: Any, tokenizer: Any, windows: int, only: str | None, known: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Scores of every configuration; those in ``known`` are taken from there."""
    ids = torch.cat(token_windows(tokenizer, builtin_texts(), WINDOW, windows))
    batches = ids.split(BATCH)
    base = [logits(model, part[:, :-1], None) for part in batches]
    chosen = [s for s in settings(model, tokenizer).values() if only in (None, *s.groups)]
    for setting in track(chosen, model.config.model_type):
        about = {
            "name": setting.name,
            "groups": sorted(set(setting.groups)),
            **setting.options,
            "slot_bytes": setting.history.slot_bytes,
            **stored_size(setting.history, model.config),
        }
        if setting.name in known:
            yield known[setting.name] | about
            continue
        start = time.perf_counter()
        parts = []
        for part, reference in zip(batches, base, strict=True):
            other = logits(setting.model or model, part[:, :-1], setting.history)
            parts += [
                compare_logits(r[UNSCORED:], o[UNSCORED:], row[UNSCORED + 1 :])
                for r, o, row in zip(reference, other, part, strict=True)
            ]
        seconds = time.perf_counter() - start
        yield about | asdict(summarize(parts)) | {"seconds": seconds}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--only", help="one group of configurations")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_model(given.model)
    known: dict[str, dict[str, Any]] = {}
    out = given.out or RESULTS / f"quality-{given.model}.json"
    if given.resume and out.exists():
        rows_before = json.loads(out.read_text(encoding="utf-8"))["configurations"]
        known = {row["name"]: row for row in rows_before}
    report = {
        "model": given.model,
        "command": f"python benchmarks/quality.py --model {given.model}",
        "window": WINDOW,
        "unscored": UNSCORED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "configurations": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in measure(model, tokenizer, given.windows, given.only, known):
        report["configurations"].append(significant(row))
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report["layers"] = significant(list(layer_cosines(model, tokenizer)))
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
