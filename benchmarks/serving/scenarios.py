"""What is served and how it is loaded: variants of the cache, servers, and scenarios."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

__all__ = ["FULL", "SMOKE", "Scenario", "Server", "Setting", "Variant"]


@dataclass(frozen=True)
class Variant:
    """A kind of cache: options of ``vllm serve`` and environment variables."""

    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether its log has to name the backend of tq-vllm."""
        return "CUSTOM" in self.options


@dataclass(frozen=True)
class Server:
    """What the servers of all variants share.

    Attributes
    ----------
    about : str
    model : str
        ``llama-8b`` (random weights) or ``tiny`` (trained).
    options : tuple of str
    memory : int
        Bytes of the cache.
    warm_up : tuple of int
        Requests at once, and tokens of each: more than a step takes, so that prompts are cut.
    blocks : int
        Blocks of the cache instead of bytes, so that all variants hold the same tokens.
    """

    about: str
    model: str
    options: tuple[str, ...]
    memory: int
    warm_up: tuple[int, int]
    blocks: int = 0

    @property
    def arguments(self) -> tuple[str, ...]:
        """All of it as options of ``vllm serve``."""
        limit = ("--num-gpu-blocks-override", str(self.blocks)) if self.blocks else ()
        return (*self.options, "--kv-cache-memory-bytes", str(self.memory), *limit)


@dataclass(frozen=True)
class Scenario:
    """A load of a server: tokens of a request, requests at once, and requests in all.

    ``fill`` instead of ``requests``: as many as fill a 16-bit cache of the server's bytes so
    often. ``texts``: greedy continuations of held-out text, for comparing what variants write.
    """

    about: str
    server: str
    input: int
    output: int
    concurrent: int
    requests: int = 0
    fill: float = 0.0
    seed: int = 0
    texts: bool = False

    def count(self, capacity: int) -> int:
        """Requests, where a 16-bit cache holds ``capacity`` tokens."""
        return self.requests or math.ceil(self.fill * capacity / (self.input + self.output))


@dataclass(frozen=True)
class Setting:
    """What runs; the first variant is the one that others are compared with."""

    variants: dict[str, Variant]
    servers: dict[str, Server]
    scenarios: dict[str, Scenario]
    variables: dict[str, str] = field(default_factory=dict)


def _graphs(*sizes: int) -> tuple[str, ...]:
    """Sizes of CUDA graphs: few, so that servers start fast, and those that scenarios need."""
    return ("--compilation-config", json.dumps({"cudagraph_capture_sizes": sizes}))


OURS = ("--attention-backend", "CUSTOM")
#: No network, no usage statistics, the size of the cache in the log, and no sampling by FlashInfer,
#: which a host may lack; the loads are greedy.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
#: Cache sizes are given, so the share of free memory that vLLM asks for is a formality.
COMMON = ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.1", "--disable-uvicorn-access-log")
LLAMA = (*COMMON, "--load-format", "dummy", "--max-num-batched-tokens", "8192")
FULL = Setting(
    variants={
        "bf16": Variant(),
        "fp8": Variant(("--kv-cache-dtype", "fp8")),
        "turboquant_4bit_nc": Variant(("--kv-cache-dtype", "turboquant_4bit_nc")),
        "tq4": Variant(OURS, {"TQ_PRESET": "tq4"}),
    },
    servers={
        "tiny": Server(
            "The trained model of the project.",
            "tiny",
            (*COMMON, "--max-model-len", "1024", "--max-num-seqs", "16", *_graphs(1, 2, 4, 8, 16)),
            memory=1 << 30,
            warm_up=(12, 900),
        ),
        "fixed": Server(
            "A cache of 557,056 tokens whatever their bytes: 64 requests of 8k tokens fit in all "
            "variants, and none waits for another. Prefixes are cached.",
            "llama-8b",
            (
                *LLAMA, "--max-model-len", "33792", "--max-num-seqs", "64",
                "--enable-prefix-caching", *_graphs(1, 2, 4, 8, 16, 32, 48, 64),
            ),
            memory=80_000_000_000,
            warm_up=(3, 6000),
            blocks=34_816,
        ),
        "card": Server(
            "48 GB of cache for all variants: about what 90% of a card of 80 GB leaves beside 16 "
            "GB of weights and what a step needs. Prefixes are not cached. Tokens are sent to "
            "clients by 8, so that the HTTP server is no limit.",
            "llama-8b",
            (
                *LLAMA, "--max-model-len", "4096", "--max-num-seqs", "512",
                "--no-enable-prefix-caching", "--stream-interval", "8",
                *_graphs(1, 4, 16, 32, 64, 96, *range(128, 512, 32), 512),
            ),
            memory=48_000_000_000,
            warm_up=(13, 1000),
        ),
    },
    scenarios={
        "outputs": Scenario(
            "Greedy continuations of held-out text by the trained model.",
            "tiny", 0, 48, concurrent=8, requests=8, texts=True,
        ),
        "batch-64": Scenario(
            "64 prompts of 8k tokens at once: TTFT. TPOT is that of steps that prefill too.",
            "fixed", 8192, 16, concurrent=64, requests=64,
        ),
        "batch-64-cached": Scenario(
            "The same prompts again, now found in the prefix cache, so that every step decodes "
            "all 64: TPOT at 64 x 8k tokens.",
            "fixed", 8192, 256, concurrent=64, requests=64,
        ),
        "batch-1": Scenario(
            "One request of 32k tokens at a time: TTFT and TPOT.",
            "fixed", 32768, 256, concurrent=1, requests=4, seed=1,
        ),
        "kv-bound": Scenario(
            "Requests that fill a 16-bit cache three times over, all sent at once: throughput. "
            "Outputs are longer than inputs, so that decoding takes most of the time; with 8k "
            "tokens in and 256 out prefill would, and no cache makes that faster.",
            "card", 1024, 2048, concurrent=1024, fill=3.0,
        ),
    },
    variables=QUIET,
)  # fmt: skip
CPU = (
    "--dtype", "bfloat16", "--max-model-len", "256", "--block-size", "32", "--enforce-eager",
    "--max-num-seqs", "8",
)  # fmt: skip
SMOKE = Setting(
    variants={
        "16-bit": Variant(variables={"TQ_CPU": "0"}),
        "tq4": Variant(OURS, {"TQ_PRESET": "tq4"}),
    },
    servers={
        "fixed": Server(
            "As the full one.",
            "tiny",
            (*CPU, "--enable-prefix-caching"),
            4 << 20,
            warm_up=(1, 50),
            blocks=24,
        ),
        "card": Server(
            "As the full one.",
            "tiny",
            (*CPU, "--no-enable-prefix-caching"),
            2 << 20,
            warm_up=(2, 50),
        ),
    },
    scenarios={
        "outputs": Scenario("Texts.", "card", 0, 8, 4, requests=3, texts=True),
        "batch-64": Scenario("Cold.", "fixed", 96, 2, concurrent=2, requests=2),
        "batch-64-cached": Scenario("Cached.", "fixed", 96, 4, concurrent=2, requests=2),
        "batch-1": Scenario("One.", "fixed", 128, 4, concurrent=1, requests=1, seed=1),
        "kv-bound": Scenario("Full.", "card", 48, 4, concurrent=8, fill=3.0),
    },
    variables={
        **QUIET,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
    },
)
