"""Engines of real vLLM on the CPU, and the same arithmetic done with transformers."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # fused operations on the CPU; read on import
try:
    import vllm  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    print("tests/serving: left out, vllm is not installed (nox -s 'tests(vllm)' installs it)")
else:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM compiles the ranks of logprobs
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

#: Bytes of the cache.
MEMORY = 8 << 20


class Engine:
    """An engine in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, **params: Any) -> list[Any]:
        """Greedy continuation of token ids."""
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **params)
        inputs = [{"prompt_token_ids": list(p)} for p in prompts]
        return self.llm.generate(inputs, asked, use_tqdm=False)

    def tokens(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in self.generate(prompts, tokens)]

    def metric(self, name: str) -> float:
        return sum(
            m.value for m in self.llm.get_metrics() if m.name == name and hasattr(m, "value")
        )

    @property
    def config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    @property
    def layers(self) -> dict[str, Any]:
        return self.config.compilation_config.static_forward_context

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds, as vLLM counts them."""
        cache = self.config.cache_config
        return cache.num_gpu_blocks * cache.block_size


@contextmanager
def _llvmlite_hidden() -> Iterator[None]:
    """vLLM searches all modules for kernels and fails on llvmlite's, which n-grams load."""
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.startswith("llvmlite")}
    try:
        yield
    finally:
        sys.modules.update(hidden)


@contextmanager
def start_engine(model: Path, settings: dict[str, str], **options: Any) -> Iterator[Engine]:
    """Start an engine with settings, in this process."""
    from tq_vllm import register
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": MEMORY,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 16,
        "disable_log_stats": False,
    }
    old = {n: v for n, v in os.environ.items() if n.startswith(("TQ_", "TQ4_"))}
    for name in old:
        del os.environ[name]
    os.environ.update(settings)
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()
    register()
    with _llvmlite_hidden():
        llm = LLM(str(model), **{**defaults, **options})
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        for name in settings:
            os.environ.pop(name, None)
        os.environ.update(old)
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_server(
    command: Sequence[str], settings: dict[str, str], port: int, log: Path
) -> Iterator[str]:
    """The address of a server that a command starts beside its log, once it answers."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(("TQ_", "TQ4_"))}
    env |= {"VLLM_LOGGING_LEVEL": "INFO", **settings}
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=env,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    try:
        while True:
            running = process.poll() is None and time.monotonic() < deadline
            assert running, f"the server did not start:\n{log.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.3)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


class Continuation(NamedTuple):
    """Greedy tokens, the log-probability of each, and the smallest lead over the second choice."""

    tokens: list[int]
    logprobs: list[float]
    margin: float


class Reference:
    """Greedy generation with transformers, keys and values rounded as pages round them.

    Parameters
    ----------
    model : Path
    fmt : KVFormat
    exact : bool
        Whether new tokens of a prompt see each other unrounded, as with ``TQ_PREFILL=exact``.
    kept : sequence of int
        Layers that are not rounded.
    formats : dict of int to KVFormat, optional
        Of layers that have another format than ``fmt``.
    """

    def __init__(
        self,
        model: Path,
        fmt: Any,
        exact: bool = False,
        kept: Sequence[int] = (),
        formats: dict[int, Any] | None = None,
    ) -> None:
        import torch
        from tq_kernels import decode_tokens, encode_tokens
        from transformers import AutoModelForCausalLM, DynamicCache

        class RoundedCache(DynamicCache):
            def update(self, key_states, value_states, layer_idx, *args, **kwargs):
                if layer_idx in kept:
                    return super().update(key_states, value_states, layer_idx, *args, **kwargs)
                own = (formats or {}).get(layer_idx, fmt)
                k = decode_tokens(encode_tokens(key_states, own, "k"), own, "k")
                v = decode_tokens(encode_tokens(value_states, own, "v"), own, "v")
                seen = super().update(k, v, layer_idx, *args, **kwargs)
                return (key_states, value_states) if exact and k.shape[2] > 1 else seen

        self._torch, self._cache = torch, RoundedCache
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, local_files_only=True
        ).eval()

    def __call__(self, prompt: Sequence[int], tokens: int) -> Continuation:
        torch = self._torch
        cache, found, logprobs, margin = self._cache(config=self.model.config), [], [], 100.0
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            for _ in range(tokens):
                logits = self.model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
                first, second = logits.topk(2).values.tolist()
                margin = min(margin, first - second)
                found.append(int(logits.argmax()))
                logprobs.append(float(logits.log_softmax(-1)[found[-1]]))
                ids = torch.tensor([found[-1:]])
        return Continuation(found, logprobs, margin)


def held_out_prompts(lengths: Sequence[int], offset: int = 0) -> list[list[int]]:
    """Prompts of held-out text as token ids."""
    from tq_hf.models import held_out_documents, model_path
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model_path() / "tokenizer.json"))
    documents = held_out_documents()
    prompts = []
    for n, length in enumerate(lengths):
        ids = tokenizer.encode(documents[n % len(documents)].text)
        prompts.append(ids[offset : offset + length])
        assert len(prompts[-1]) == length
    return prompts


def decided(
    generate: Reference, lengths: Sequence[int], tokens: int, margin: float = 0.05
) -> tuple[list[list[int]], list[Continuation]]:
    """Prompts of these lengths whose greedy tokens do not hang on a near tie, and what follows.

    A difference in the last bit of a key may change a code, and that a logit by about 0.01.
    """
    prompts, answers = [], []
    for n, length in enumerate(lengths):
        for offset in range(0, 400, 25):
            prompt = held_out_prompts([length] * (n + 1), offset)[n]
            answer = generate(prompt, tokens)
            if answer.margin >= margin:
                prompts.append(prompt)
                answers.append(answer)
                break
        else:
            raise AssertionError(f"document {n} has no prompt of {length} tokens without near ties")
    return prompts, answers


@pytest.fixture(scope="session")
def tiny() -> Path:
    from tq_hf.models import model_path

    return model_path("tiny")


@pytest.fixture(scope="session")
def start():
    return start_engine


@pytest.fixture(scope="session")
def port() -> Callable[[], int]:
    return free_port


@pytest.fixture(scope="session")
def serve():
    return run_server


@pytest.fixture(scope="session")
def reference():
    return Reference


@pytest.fixture(scope="session")
def held_out():
    return held_out_prompts


@pytest.fixture(scope="session")
def decide():
    return decided


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """The log of the plugin; an engine that starts takes level and handlers off its logger."""
    import logging

    logger = logging.getLogger("vllm.plugins.turboquant")
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: True)
    monkeypatch.setattr(logger, "handle", caplog.handler.handle)
    return caplog
