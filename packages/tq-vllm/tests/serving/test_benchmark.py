"""The script that measures serving, on the CPU with the small model, and how it records failures."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[4] / "benchmarks" / "serving"
SCRIPT = FOLDER / "run.py"


@pytest.fixture
def modules(monkeypatch):
    """The modules of the script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("scenarios", "server", "client", "run")
    yield SimpleNamespace(**{name: import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


def test_the_script_fills_the_cache_of_the_baseline_three_times(tmp_path) -> None:
    out = tmp_path / "serving.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(out), "--together", "2"]
    run = subprocess.run(
        [*command, "--scenarios", "outputs,kv-bound"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["smoke"] and result["versions"]["tq-vllm"]
    assert [(r["variant"], r["scenario"]) for r in result["rows"]] == [
        (variant, scenario) for variant in ("16-bit", "tq4") for scenario in ("outputs", "kv-bound")
    ]
    plain, ours = result["rows"][1::2]
    # Two heads, six layers, pages of 32 tokens; 512 and 132 bytes a token and head.
    assert plain["kv_tokens"] == (2 << 20) // (32 * 12 * 512) * 32
    assert ours["kv_tokens"] == (2 << 20) // (32 * 12 * 132) * 32
    assert any("TurboQuant KV cache" in line for line in ours["log"])
    for row in (plain, ours):
        assert row["completed"] == row["requests"] >= 3 * plain["kv_tokens"] / (48 + 4)
        assert row["total_output_tokens"] == 4 * row["requests"]
        for name in ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms"):
            assert row[name] > 0
        assert "--random-input-len" in row["command"] and "--port" in row["server"]
    compared = result["outputs"]["tq4"]
    assert compared["of"] == 3 * 8
    assert compared["tokens_agreeing"] >= 8
    assert 0 < compared["largest_logprob_difference"] < 0.5


def test_an_unknown_name_is_refused(tmp_path) -> None:
    command = [sys.executable, str(SCRIPT), "--scenarios", "long", "--out", str(tmp_path / "x")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "long not known: choose from outputs, batch-64, batch-64-cached" in run.stderr


def options(**changes):
    return Namespace(**{
        "together": 2, "limit": 100.0, "start_limit": 30.0, "scenario_limit": 30.0, **changes
    })  # fmt: skip


def test_a_server_that_ends_is_recorded_and_stops_no_other(modules, tmp_path, monkeypatch) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such model ' + sys.argv[1])")
    monkeypatch.setattr(modules.server, "SERVE", command)
    monkeypatch.setattr(modules.client, "load", lambda: None)
    models = {"tiny": tmp_path, "tokenizer": tmp_path}
    rows = list(modules.run.rows(modules.scenarios.SMOKE, models, tmp_path, options()))
    assert len(rows) == 2 * 5
    for row in rows:
        assert "the server ended with 1" in row["error"]
        assert f"no such model {tmp_path}" in row["error"]
    assert (tmp_path / "card-tq4.log").read_text().startswith("no such model")


def test_a_server_that_never_answers_is_given_up(modules, tmp_path, monkeypatch) -> None:
    command = (sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(99)")
    monkeypatch.setattr(modules.server, "SERVE", command)
    smoke = modules.scenarios.SMOKE
    running = modules.server.Running(
        tmp_path, smoke.servers["card"], smoke.variants["tq4"], {}, tmp_path / "log"
    )
    with running, pytest.raises(modules.server.Failure, match="did not start in 3 s\nloading"):
        running.wait(3)
    assert running._process.returncode is not None


def test_nothing_starts_when_no_time_is_left(modules, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(modules.client, "load", lambda: None)
    monkeypatch.setattr(modules.server, "SERVE", (sys.executable, "-c", "pass"))
    models = {"tiny": tmp_path, "tokenizer": tmp_path}
    rows = modules.run.rows(modules.scenarios.SMOKE, models, tmp_path, options(limit=0.0))
    assert {row["error"] for row in rows} == {"not run: no time was left"}


def test_a_load_that_takes_too_long_is_recorded(modules, tmp_path, monkeypatch) -> None:
    import asyncio

    import vllm.benchmarks.serve as serve

    async def endless(arguments):
        await asyncio.sleep(99)

    monkeypatch.setattr(serve, "main_async", endless)
    scenario = modules.scenarios.SMOKE.scenarios["kv-bound"]
    arguments = modules.client.bench_arguments("http://x", tmp_path, tmp_path, scenario, 3)
    with pytest.raises(modules.server.Failure, match="did not finish in 1 s"):
        modules.client.bench(arguments, 3, 0.5001, tmp_path / "client.log")


def test_runs_add_to_one_file(modules, tmp_path) -> None:
    path, smoke = tmp_path / "serving.json", modules.scenarios.SMOKE

    def text(tokens, logprobs):
        return {"texts": [{"tokens": tokens, "logprobs": logprobs}]}

    first = modules.run.Results(path, smoke, True)
    first.add({"variant": "tq4", "scenario": "outputs", "error": "did not finish in 3 s"})
    first.add({"variant": "16-bit", "scenario": "outputs", **text(["a", "b"], [-1.0, -2.0])})
    second = modules.run.Results(path, smoke, True)
    second.add({"variant": "tq4", "scenario": "outputs", **text(["a", "c"], [-1.25, -2.5])})
    result = json.loads(path.read_text())
    assert [row["variant"] for row in result["rows"]] == ["16-bit", "tq4"]
    assert "error" not in result["rows"][1]
    assert result["outputs"] == {
        "tq4": {"tokens_agreeing": 1, "of": 2, "largest_logprob_difference": 0.5}
    }
    path.write_text(json.dumps({**result, "gpu": "another"}))
    with pytest.raises(SystemExit, match="its gpu is another, and now it is"):
        modules.run.Results(path, smoke, True)


def test_models_have_text_for_every_token(modules, tmp_path) -> None:
    from tokenizers import Tokenizer

    models = modules.run.prepare_models(tmp_path)
    config = json.loads((models["llama-8b"] / "config.json").read_text())
    own, small = (
        Tokenizer.from_file(str(models[name] / "tokenizer.json"))
        for name in ("llama-8b", "tokenizer")
    )
    assert own.get_vocab_size() == config["vocab_size"]
    assert own.decode([config["vocab_size"] - 1, 100_000]) != ""
    sample = "The quick <5000> brown fox"
    assert own.encode(sample).ids == small.encode(sample).ids
    # 32 layers, 8 heads of 128: 128 KiB a token at 16 bits.
    assert modules.run.tokens_at_16_bits(models["llama-8b"], 48_000_000_000) == 366_210
