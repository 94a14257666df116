"""How far predictions moved: divergence, agreement and perplexity with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor
from tq_core import TQError

__all__ = ["Scores", "TokenScores", "compare_logits", "summarize"]

#: Tokens of a block of the bootstrap: neighbours are not independent.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Per predicted token.

    Attributes
    ----------
    kl : float64 array [tokens]
        Kullback-Leibler divergence of the prediction from the baseline's, in nats.
    same : bool array [tokens]
        Whether the most probable token is the baseline's.
    base_nats, nats : float64 arrays [tokens]
        -log p of the true token, of the baseline and of the cache.
    """

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    base_nats: NDArray[np.float64]
    nats: NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Summary of `TokenScores`.

    Attributes
    ----------
    tokens : int
        Predicted tokens.
    kl_mean, kl_p99, kl_max : float
        Of the divergence, in nats a token.
    top1 : float
        Share of tokens whose most probable prediction is the baseline's.
    base_perplexity, perplexity : float
        With the baseline's cache and with this one.
    base_interval, interval : tuple of float
        95% bootstrap intervals of both, over blocks of 64 tokens.
    change : float
        Relative change of the perplexity: 0.003 is +0.3%.
    change_interval : tuple of float
        Its 95% paired bootstrap interval.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    base_perplexity: float
    base_interval: tuple[float, float]
    perplexity: float
    interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]


def compare_logits(base: Tensor, other: Tensor, target: Tensor) -> TokenScores:
    """Compare predictions.

    Parameters
    ----------
    base, other : float tensors [tokens, vocabulary]
    target : int64 tensor [tokens]
        The true tokens.
    """
    p, q = base.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    at = target[:, None].to(p.device)
    return TokenScores(
        kl.double().cpu().numpy(),
        (p.argmax(-1) == q.argmax(-1)).cpu().numpy(),
        -p.gather(-1, at)[:, 0].double().cpu().numpy(),
        -q.gather(-1, at)[:, 0].double().cpu().numpy(),
    )


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of the mean of neighbouring values, by resampling blocks."""
    count = len(values) // BLOCK
    if count < 2:
        return math.nan, math.nan
    means = values[: count * BLOCK].reshape(count, BLOCK).mean(axis=1)
    if float(np.ptp(means)) == 0.0:
        return float(means[0]), float(means[0])
    found = bootstrap(
        (means,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def _exp(pair: tuple[float, float], less: float = 0.0) -> tuple[float, float]:
    return math.exp(pair[0]) - less, math.exp(pair[1]) - less


def summarize(parts: Iterable[TokenScores]) -> Scores:
    """Summarize the scores of a text.

    Raises
    ------
    TQError
        If there are none.
    """
    all_parts = list(parts)
    if not all_parts or not sum(len(p.kl) for p in all_parts):
        raise TQError("no tokens were predicted: give a longer text")
    kl = np.concatenate([p.kl for p in all_parts])
    base = np.concatenate([p.base_nats for p in all_parts])
    nats = np.concatenate([p.nats for p in all_parts])
    difference = nats - base
    return Scores(
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=float(np.concatenate([p.same for p in all_parts]).mean()),
        base_perplexity=math.exp(base.mean()),
        base_interval=_exp(_interval(base)),
        perplexity=math.exp(nats.mean()),
        interval=_exp(_interval(nats)),
        change=math.expm1(difference.mean()),
        change_interval=_exp(_interval(difference), 1.0),
    )
