"""vLLM's model runner for GPUs, which its CPU workers can run with Triton's interpreter.

Elsewhere in these tests vLLM takes the older runner, as it does on CPUs without Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import vllm
from packaging.version import Version
from tq_kernels import KVFormat

pytestmark = pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.30"), reason="its build for CPUs takes no Triton"
)
SCRIPT = """
import json, sys
from types import SimpleNamespace
from triton.backends import backends

# vLLM wants a Triton that compiles for CPUs; the interpreter will do.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

import tq_vllm
tq_vllm.register()
import tq_vllm.impl as impl
from vllm import LLM, SamplingParams

if sys.argv[1] == "fused":
    impl.EagerOps = impl.FusedOps
model, prompts, tokens = json.load(sys.stdin)
llm = LLM(
    model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=8 << 20, max_model_len=256,
    max_num_seqs=3, max_num_batched_tokens=64, block_size=16,
)
sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
found = []
for _ in range(2):  # the second time with cached prefixes
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = llm.generate(inputs, sampling, use_tqdm=False)
    found.append([list(a.outputs[0].token_ids) for a in answers])
    cached = [a.num_cached_tokens for a in answers]
config = llm.llm_engine.vllm_config
print("FOUND", json.dumps([config.use_v2_model_runner, found, cached]))
"""


@pytest.mark.parametrize(
    ("ops", "lengths", "tokens"),
    [("eager", (20, 70, 100, 33), 6), ("fused", (20, 70), 3)],  # the interpreter is slow
)
def test_the_runner_of_gpus_gives_the_tokens_of_transformers(
    reference, decide, tiny, ops, lengths, tokens
) -> None:
    """Batches of decodes and cut prompts, and cached prefixes."""
    prompts, answers = decide(reference(tiny, KVFormat(128)), lengths, tokens)
    env = {n: v for n, v in os.environ.items() if not n.startswith(("TQ_", "TQ4_"))}
    env |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TQ_PRESET": "tq4", "TQ_PREFILL": "stored"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, ops],
        env=env,
        input=json.dumps([str(tiny), prompts, tokens]),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("FOUND "))
    newer, found, cached = json.loads(line.removeprefix("FOUND "))
    assert newer
    assert found == [[answer.tokens for answer in answers]] * 2
    assert cached == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]
