"""What ``tq verify`` found, and whether it is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tq_core import TQError

from tq_hf.verify.harness import HarnessScore
from tq_hf.verify.layers import LayerScores
from tq_hf.verify.scores import Scores
from tq_hf.verify.sweep import LayerSensitivity
from tq_hf.verify.tasks import TaskCell

__all__ = ["DEFAULT_THRESHOLDS", "THRESHOLDS", "Report", "parse_thresholds"]

#: Name -> whether more is better, and what it limits.
THRESHOLDS: Mapping[str, tuple[bool, str]] = {
    "kl": (False, "mean divergence, nats a token"),
    "kl_p99": (False, "99th percentile of the divergence"),
    "top1": (True, "share of tokens with the same best prediction"),
    "perplexity": (False, "relative change of the perplexity"),
    "retrieval": (False, "retrieval accuracy lost"),
    "copy": (False, "copy accuracy lost"),
    "k_cosine": (True, "least of the layers' mean cosine of keys"),
    "v_cosine": (True, "least of the layers' mean cosine of values"),
    "out_cosine": (True, "least of the layers' mean cosine of attention outputs"),
}
DEFAULT_THRESHOLDS: Mapping[str, float] = {
    "kl": 0.02,
    "top1": 0.95,
    "perplexity": 0.01,
    "retrieval": 0.05,
}


def parse_thresholds(items: Iterable[str]) -> dict[str, float]:
    """Thresholds of ``NAME=NUMBER`` items over the default ones; ``none`` drops the defaults.

    Raises
    ------
    TQError
        For an unknown name or no number.
    """
    limits = dict(DEFAULT_THRESHOLDS)
    for item in items:
        if item == "none":
            limits = {}
            continue
        name, _, text = item.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in THRESHOLDS or math.isnan(value):
            raise TQError(
                f"threshold {item!r}: needs NAME=NUMBER with a name of {', '.join(THRESHOLDS)}, "
                "or none"
            )
        limits[name] = value
    return limits


@dataclass(frozen=True)
class Report:
    """Quality of a cache on a model.

    Attributes
    ----------
    model, baseline, dataset, dtype : str
    cache : dict
        Options of the compressed cache.
    base_bytes_per_token, bytes_per_token : float
        Bytes that one more token of history takes in all layers, counted on the tensors.
    layers : list of LayerScores
    scores : Scores
    tasks : list of TaskCell
    divergence : list of int
        Greedily generated tokens before the first that differs, a prompt each.
    generated : int
        Tokens generated a prompt.
    sweep : list of LayerSensitivity
    layer_bits : dict of int to pair of int, or None
        Bits of keys and values of each layer that the sweep proposes for the budget.
    harness : list of HarnessScore
        Of lm-evaluation-harness.
    limits : dict
        Thresholds by name.
    versions : dict
    seconds : float
    """

    model: str
    baseline: str
    dataset: str
    dtype: str
    cache: dict[str, Any]
    base_bytes_per_token: float
    bytes_per_token: float
    layers: list[LayerScores]
    scores: Scores
    tasks: list[TaskCell]
    divergence: list[int]
    generated: int
    limits: dict[str, float]
    versions: dict[str, str]
    seconds: float
    sweep: list[LayerSensitivity] = field(default_factory=list)
    layer_bits: dict[int, tuple[int, int]] | None = None
    harness: list[HarnessScore] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The 16-bit cache's bytes a token over this one's."""
        return self.base_bytes_per_token / self.bytes_per_token

    def values(self) -> dict[str, float]:
        """Every number that a threshold can limit; tasks only if they ran."""
        found = {
            "kl": self.scores.kl_mean,
            "kl_p99": self.scores.kl_p99,
            "top1": self.scores.top1,
            "perplexity": self.scores.change,
            "k_cosine": min(x.k_cosine for x in self.layers),
            "v_cosine": min(x.v_cosine for x in self.layers),
            "out_cosine": min(x.out_cosine for x in self.layers),
        }
        for name in ("retrieval", "copy"):
            cells = [c for c in self.tasks if c.task == name]
            if cells:
                count = sum(c.count for c in cells)
                lost = sum((c.base_accuracy - c.accuracy) * c.count for c in cells)
                found[name] = lost / count
        return found

    def failures(self) -> list[str]:
        """A line for each threshold that is missed."""
        found = self.values()
        lines = []
        for name, limit in self.limits.items():
            if name not in found:
                continue
            more_is_better, what = THRESHOLDS[name]
            missed = found[name] < limit if more_is_better else found[name] > limit
            if missed or math.isnan(found[name]):
                sign = "at least" if more_is_better else "at most"
                lines.append(f"{name} ({what}) is {found[name]:.4g}: should be {sign} {limit:g}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ratio": self.ratio, "failures": self.failures()}
