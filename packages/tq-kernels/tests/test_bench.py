"""The benchmark measures what it says: cold buffers, checked outputs, nothing lost by a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tq_kernels.bench import suite, timing
from tq_kernels.bench.candidates import Candidate, Prepared, TurboQuant, store_inputs
from tq_kernels.bench.inputs import Pool, tables
from tq_kernels.bench.shapes import Decode, Prefill, Store
from tq_kernels.bench.suite import Suite

CPU = torch.device("cpu")
SMALL = Decode(2, 32, heads=4, kv_heads=2, head_dim=64)


@pytest.mark.parametrize("call_bytes", [1, 10_000, 10**6, 10**8, 10**10])
def test_other_calls_touch_three_caches_in_between(
    monkeypatch: pytest.MonkeyPatch, call_bytes: int
) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 60 << 20)
    copies = timing.rotation(call_bytes, CPU)
    assert copies == 512 or (copies - 1) * call_bytes >= 3 * (60 << 20)
    assert copies == 2 or (copies - 2) * call_bytes < 3 * (60 << 20)


def test_every_call_is_timed_the_same_number_of_times() -> None:
    seen: list[int] = []
    calls: list[Callable[[], object]] = [lambda n=n: seen.append(n) for n in range(5)]
    found = timing.times(calls, CPU, repeats=4)
    assert len(found) == 4
    assert [seen.count(n) for n in range(5)] == [5, 5, 5, 4, 4]


def test_copies_use_all_pages_once() -> None:
    shape = Decode(3, 100)
    found = torch.stack(tables(shape, 4, CPU))
    assert found.dtype == torch.int32
    assert found.flatten().sort().values.tolist() == list(range(4 * 3 * 7))
    assert found[0].flatten().tolist() != list(range(3 * 7))


@pytest.mark.parametrize("tokens", [64, 2048])
def test_stores_never_share_a_slot(tokens: int) -> None:
    inputs, slots = store_inputs(Store(tokens, kv_heads=1, head_dim=16), 3, CPU)
    assert len(torch.cat(slots).unique()) == 3 * tokens
    assert not torch.equal(inputs[0], inputs[1])


def test_a_pool_repeats_what_was_drawn() -> None:
    pool, drawn = Pool(), torch.arange(6).view(3, 2)
    grown = pool.get("a", drawn, 7)
    assert torch.equal(grown, drawn.repeat(3, 1))
    assert pool.get("a", drawn, 5) is grown


def test_bytes_of_a_shape() -> None:
    count = TurboQuant(CPU).bytes(Decode(8, 1024))
    assert count == 8 * 1024 * 8 * 132 + 4 * 8 * 32 * 128
    assert TurboQuant(CPU).bytes(Store(10)) == 10 * 8 * (512 + 132)
    assert Prefill(3, 5, heads=1, kv_heads=1).flops == 4 * 128 * (15 + 6)


class Right(Candidate):
    name = "TurboQuant"

    def bytes(self, shape: Any) -> int:
        return 1 << 20

    def decode(self, shape: Decode, copies: int) -> Prepared:
        def broken() -> None:
            raise RuntimeError("no such way")

        return Prepared({"works": [lambda: None], "does not": [broken]}, lambda _: {"error": 0.0})


class Wrong(Right):
    name = "wrong"

    def decode(self, shape: Decode, copies: int) -> Prepared:
        if shape.batch == 2:
            raise RuntimeError("out of luck")
        return super().decode(shape, copies)


def test_a_failure_is_recorded_and_the_rest_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(suite, "SECTIONS", {"decode": (SMALL, replace(SMALL, batch=3))})
    path = tmp_path / "new" / "result.json"
    Suite((Right, Wrong), path, CPU, quiet=True, repeats=3).run(["decode"])
    result = json.loads(path.read_text())
    first, second = result["sections"]["decode"]
    assert set(first["kernels"]) == {"TurboQuant"}
    assert set(second["kernels"]) == {"TurboQuant", "wrong"}
    assert second["speedup"]["wrong"] > 0
    kernel = second["kernels"]["TurboQuant"]
    assert kernel["way"] == "works"
    assert "no such way" in kernel["ways_failed"]["does not"]
    (error,) = result["errors"]
    assert "wrong" in error["what"]
    assert "out of luck" in error["error"]


def test_what_no_time_is_left_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "SECTIONS", {"decode": (SMALL,)})
    result = Suite((Right,), None, CPU, quiet=True, deadline=-1.0).run(["decode"])
    assert result["sections"] == {}
    assert "the time was up" in result["errors"][0]["error"]
