"""Runs sections of measurements and keeps the results written as they come."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tq_kernels.bench import shapes
from tq_kernels.bench.candidates import LAUNCHED, Candidate, TurboQuant
from tq_kernels.bench.timing import copy_rate, quantiles, read_rate, rotation, times

__all__ = ["SECTIONS", "Suite", "commit", "machine", "warm"]

#: Shapes of each section, the most wanted first.
SECTIONS: dict[str, tuple[Any, ...]] = {
    "copy": (),
    "decode": shapes.DECODE,
    "store": shapes.STORE,
    "prefill": shapes.PREFILL,
    "queries": shapes.QUERIES,
    "bits": shapes.BITS,
    "heads": shapes.HEADS,
    "sweep": shapes.SWEEP,
}
#: Sections in which every candidate runs; in the others only the first two.
FULL = ("decode", "store", "prefill")


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurements ran on."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "triton", "tq-kernels"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    found: dict[str, Any] = {
        "device": str(device),
        "python": platform.python_version(),
        "packages": packages,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, or the variable TQ_COMMIT where there is no checkout."""
    if "TQ_COMMIT" in os.environ:
        return os.environ["TQ_COMMIT"]
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return next((word for word in text.split() if word[:1].isdigit() and "." in word), None)
    except OSError:
        return None


def warm(kinds: Sequence[type[Candidate]], shape: Any, name: str) -> None:
    """Compile what a shape needs into Triton's cache on disk; runs in a process of its own."""
    device = torch.device("cuda")
    for kind in kinds:
        if kind.name == name:
            prepared = kind(device).prepare(shape, 1)
            for calls in prepared.ways.values():
                calls[0]()
    torch.cuda.synchronize()


@dataclass
class Suite:
    """Measurements of candidates; ``result`` is what is written to ``path``."""

    kinds: Sequence[type[Candidate]] = (TurboQuant,)
    path: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    commit: str | None = None
    deadline: float = float("inf")
    repeats: int = 30
    quiet: bool = False
    result: dict[str, Any] = field(default_factory=dict)

    def run(self, sections: Sequence[str], workers: int = 0) -> dict[str, Any]:
        """Measure the sections in order; what fails is recorded and does not stop the rest."""
        start = time.monotonic()
        self.result |= {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "machine": machine(self.device),
            "repeats": self.repeats,
            "sections": {},
            "errors": [],
        }
        candidates = [self._make(kind) for kind in self.kinds]
        live = [c for c in candidates if c is not None]
        if workers and self.device.type == "cuda":
            self._warm_all(sections, live, workers)
        for section in sections:
            if section == "copy":
                self._guard("copy", self._copy)
            for shape in SECTIONS[section]:
                if time.monotonic() - start > self.deadline:
                    self._fail(f"{section} {shape}", "left out: the time was up")
                    continue
                taking = self._taking(section, live)
                self._guard(f"{section} {shape}", self._measure, section, shape, taking)
            self.result["seconds"] = round(time.monotonic() - start, 1)
            self._write()
        return self.result

    def _taking(self, section: str, live: Sequence[Candidate]) -> list[Candidate]:
        return [c for c in live if section in FULL or type(c) in self.kinds[:2]]

    def _make(self, kind: type[Candidate]) -> Candidate | None:
        try:
            return kind(self.device)
        except Exception as error:
            self._fail(kind.name, repr(error))
            return None

    def _warm_all(self, sections: Sequence[str], live: Sequence[Candidate], workers: int) -> None:
        start = time.monotonic()
        tasks: dict[str, tuple[str, Any]] = {}
        for section in sections:
            for shape in SECTIONS[section]:
                for candidate in self._taking(section, live):
                    if candidate.compiles and candidate.covers(shape):
                        key = f"{candidate.name} {type(shape).__name__} {candidate.variant(shape)}"
                        tasks.setdefault(key, (candidate.name, shape))
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        try:
            futures = {
                pool.submit(warm, self.kinds, shape, name): f"compiling {name} {shape}"
                for name, shape in tasks.values()
            }
            done, late = wait(futures, timeout=120)
            for future in done:
                error = future.exception()
                if error is not None:
                    self._fail(futures[future], repr(error)[:400])
            for future in late:
                self._fail(futures[future], "not compiled ahead within 120 s")
        finally:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
        self.result["seconds_compiling_ahead"] = round(time.monotonic() - start, 1)
        self._say(f"compiled {len(tasks)} variants in {time.monotonic() - start:.0f} s")

    def _copy(self) -> None:
        size = 1 << 31 if self.device.type == "cuda" else 1 << 22
        self.result["copy"] = copy_rate(self.device, size)
        self.result["read"] = read_rate(self.device, size)
        rates = [self.result[name]["tbps"] for name in ("copy", "read")]
        self._say(f"copy {rates[0]:.2f} TB/s, read {rates[1]:.2f} TB/s")

    def _measure(self, section: str, shape: Any, candidates: Sequence[Candidate]) -> None:
        entry: dict[str, Any] = {"shape": asdict(shape), "kernels": {}}
        self.result["sections"].setdefault(section, []).append(entry)
        for candidate in candidates:
            if not candidate.covers(shape):
                continue
            try:
                entry["kernels"][candidate.name] = self._time(shape, candidate)
            except Exception:
                self._fail(f"{candidate.name} {shape}", traceback.format_exc(limit=-3)[-800:])
        if isinstance(shape, shapes.Store):
            self._guard(f"copy of {shape}", self._copy_of_store, shape, entry)
        base = entry["kernels"].get(TurboQuant.name)
        if base:
            entry["speedup"] = {
                name: kernel["ms"]["p50"] / base["ms"]["p50"]
                for name, kernel in entry["kernels"].items()
                if name != TurboQuant.name
            }
        self._say(line(section, entry))

    def _time(self, shape: Any, candidate: Candidate) -> dict[str, Any]:
        count = candidate.bytes(shape)
        copies = rotation(count, self.device)
        prepared = candidate.prepare(shape, copies)
        found, checks, errors = {}, {}, {}
        for way, calls in prepared.ways.items():
            try:
                samples = times(calls, self.device, self.repeats, captured=way != LAUNCHED)
                checks[way] = prepared.check(calls[-1])
                found[way] = quantiles(samples)
            except Exception as error:
                errors[way] = repr(error)[:300]
        if not found:
            raise RuntimeError(f"no way of calling ran: {errors}")
        best = min(found, key=lambda way: found[way]["p50"])
        result: dict[str, Any] = {"ms": found[best], "bytes": count, "copies": copies}
        result["checks"] = checks[best]
        result["tbps"] = count / found[best]["p50"] / 1e9
        if "copy" in self.result:
            result["share_of_copy"] = result["tbps"] / self.result["copy"]["tbps"]
        if best:
            result["way"] = best
        if len(found) > 1:
            result["ways_ms"] = {way: value["p50"] for way, value in found.items()}
        if errors:
            result["ways_failed"] = errors
        if isinstance(shape, shapes.Prefill):
            result["tflops"] = shape.flops / found[best]["p50"] / 1e9
        return result

    def _copy_of_store(self, shape: shapes.Store, entry: dict[str, Any]) -> None:
        count = shape.bytes(shape.fmt.slot_bytes)
        copies = rotation(count, self.device)
        source = torch.randn(copies, count // 8, device=self.device)
        target = torch.empty_like(source)

        def call(n: int) -> Any:
            return lambda: torch.add(source[n], 1, out=target[n])

        found = quantiles(times([call(n) for n in range(copies)], self.device, self.repeats))
        entry["kernels"]["copy of the same bytes"] = {"ms": found, "bytes": count, "copies": copies}

    def _guard(self, what: str, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            self._fail(what, traceback.format_exc(limit=-3)[-800:])
        self._write()

    def _fail(self, what: str, error: str) -> None:
        self.result.setdefault("errors", []).append({"what": what, "error": error})
        self._say(f"FAILED {what}: {error}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.path)


def line(section: str, entry: dict[str, Any]) -> str:
    """One line of a result for the terminal."""
    shape = entry["shape"]
    words = [f"{name}={value}" for name, value in shape.items() if name != "page_size"]
    parts = []
    for name, kernel in entry["kernels"].items():
        text = f"{name} {kernel['ms']['p50'] * 1e3:.1f} us"
        if "share_of_copy" in kernel:
            text += f" {kernel['share_of_copy']:.2f} of copy"
        for key, value in kernel.get("checks", {}).items():
            text += f" {key}={value:.1e}"
        if "way" in kernel:
            text += f" ({kernel['way']})"
        if name in entry.get("speedup", {}):
            text += f" ({entry['speedup'][name]:.2f}x)"
        parts.append(text)
    return f"{section} {' '.join(words)}: " + " | ".join(parts)
