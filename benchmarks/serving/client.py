"""Loads of a server: ``vllm bench serve`` in this process, and greedy texts to compare."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from scenarios import Scenario, Server
from server import Failure

__all__ = ["bench", "bench_arguments", "compare", "load", "texts", "warm_up"]

#: What is kept of the results of ``vllm bench serve``.
KEPT = (
    "completed", "failed", "duration", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput",
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms",
)  # fmt: skip


def load() -> None:
    """Import what loads need, so that it takes no time of theirs."""
    import tq_hf.models  # noqa: F401
    import vllm.benchmarks.serve  # noqa: F401


def bench_arguments(
    url: str, model: Path, tokenizer: Path, scenario: Scenario, requests: int
) -> list[str]:
    """Arguments of ``vllm bench serve``."""
    return [
        "--base-url", url, "--model", str(model), "--tokenizer", str(tokenizer),
        "--dataset-name", "random", "--random-input-len", str(scenario.input),
        "--random-output-len", str(scenario.output), "--num-prompts", str(requests),
        "--max-concurrency", str(scenario.concurrent), "--ignore-eos", "--temperature", "0",
        "--seed", str(scenario.seed), "--ready-check-timeout-sec", "0",
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99", "--disable-tqdm",
    ]  # fmt: skip


def bench(arguments: list[str], requests: int, seconds: float, log: Path) -> dict[str, Any]:
    """Run ``vllm bench serve`` once, in this process, which has vLLM loaded already.

    Raises
    ------
    Failure
        If it fails, or has not finished after ``seconds``.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)

    async def run() -> dict[str, Any]:
        return await asyncio.wait_for(main_async(parser.parse_args(arguments)), seconds)

    with log.open("a") as sink, redirect_stdout(sink):
        try:
            result = asyncio.run(run())
        except TimeoutError:
            raise Failure(f"did not finish in {seconds:.0f} s") from None
        except Exception as error:
            raise Failure(f"vllm bench serve: {type(error).__name__}: {error}") from error
    kept = {name: result[name] for name in KEPT if name in result}
    if result["completed"] != requests:
        raise Failure(f"{result['completed']} of {requests} requests were completed: {kept}")
    return kept


def _complete(url: str, seconds: float, **request: Any) -> dict[str, Any]:
    body = json.dumps(request).encode()
    header = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/completions", body, header), timeout=seconds
    ) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def warm_up(url: str, model: Path, server: Server, seconds: float) -> None:
    """Send a few requests, so that those of a load do not pay for what is done once."""
    count, length = server.warm_up
    draw = random.Random(10**6)

    def ask(_: int) -> None:
        prompt = [draw.randrange(20, 4000) for _ in range(length)]
        _complete(url, seconds, model=str(model), prompt=prompt, max_tokens=4, ignore_eos=True)

    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(ask, range(count)))
    except OSError as error:
        raise Failure(f"the first requests: {error}") from None


def texts(url: str, model: Path, scenario: Scenario, seconds: float) -> dict[str, Any]:
    """Greedy continuations of held-out text and the log-probabilities of their tokens."""
    from tq_hf.models import held_out_documents

    documents = [document.text for document in held_out_documents()]
    prompts = [
        documents[n % len(documents)][: 150 * (1 + n)].strip() for n in range(scenario.requests)
    ]

    def ask(prompt: str) -> dict[str, Any]:
        answer = _complete(
            url, seconds, model=str(model), prompt=prompt, max_tokens=scenario.output,
            temperature=0, logprobs=1, ignore_eos=True,
        )  # fmt: skip
        choice = answer["choices"][0]
        return {
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "tokens": choice["logprobs"]["tokens"],
            "logprobs": choice["logprobs"]["token_logprobs"],
        }

    try:
        with ThreadPoolExecutor(scenario.concurrent) as pool:
            return {"texts": list(pool.map(ask, prompts))}
    except OSError as error:
        raise Failure(f"completions: {error}") from None


def compare(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """How far two variants write the same: tokens up to the first difference.

    Log-probabilities are compared as far as the texts agree, the first difference included: both
    variants have read the same up to there.
    """
    agreeing, total, worst = 0, 0, 0.0
    for a, b in zip(own, other, strict=True):
        pairs = zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True)
        for n, (first, second, p, q) in enumerate(pairs):
            worst = max(worst, abs(p - q))
            if first != second:
                agreeing += n
                break
        else:
            agreeing += len(a["tokens"])
        total += len(a["tokens"])
    return {"tokens_agreeing": agreeing, "of": total, "largest_logprob_difference": worst}
