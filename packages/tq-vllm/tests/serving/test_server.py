"""The OpenAI server on compressed pages, over HTTP, with the official client."""

from __future__ import annotations

import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from tq_kernels import KVFormat

NEW = 20
LENGTHS = (150, 37, 16, 90)


@pytest.fixture(scope="module")
def case(reference, decide, tiny):
    return decide(reference(tiny, KVFormat(128, 4, 4)), LENGTHS, NEW)


class Server:
    def __init__(self, url: str, log) -> None:
        self.url, self.log = url, log

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory, port, serve):
    here, log = port(), tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny),
        "--host", "127.0.0.1", "--port", str(here), "--served-model-name", "tiny",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "16",
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(8 << 20),
    ]  # fmt: skip
    settings = {"TQ_PRESET": "tq4", "TQ_PREFILL": "stored"}
    with serve(command, settings, here, log) as url:
        yield Server(url, log)


@pytest.fixture
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def texts(case, tiny):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    return [tokenizer.decode(answer.tokens) for answer in case[1]]


ASK = {
    "model": "tiny",
    "max_tokens": NEW,
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
}


def test_concurrent_requests_get_the_tokens_of_transformers(server, client, case, texts):
    def ask(n: int) -> str:
        return client.completions.create(prompt=case[0][n % 4], **ASK).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(16)))
    assert found == texts * 4
    assert server.metric("vllm:prefix_cache_hits_total") > 0


def test_streams(client, case, texts):
    def ask(n: int) -> list[str]:
        stream = client.completions.create(prompt=case[0][n], stream=True, **ASK)
        return [part.choices[0].text for part in stream]

    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(ask, range(4)))
    assert ["".join(parts) for parts in streams] == texts
    assert all(len(parts) > NEW // 2 for parts in streams)


def test_aborted_streams_free_their_pages(server, client, case, texts):
    for n in range(6):
        options = ASK | {"max_tokens": 300}
        stream = client.completions.create(prompt=case[0][n % 4], stream=True, **options)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    answer = client.completions.create(prompt=case[0][0], **ASK)
    assert answer.choices[0].text == texts[0]


def test_the_log_says_that_the_cache_is_compressed(server):
    log = server.log.read_text()
    assert "TurboQuant KV cache: keys 4 bits, values 4 bits, prefill stored" in log
    assert "132 bytes a token and KV head; 1584 bytes a token against 6144 at 16 bits" in log
    assert f"KV cache size: {(8 << 20) // (16 * 1584) * 16:,} tokens" in log
