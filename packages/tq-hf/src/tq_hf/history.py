"""Codes of many tokens: a list of buffers that grow without copying the history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tq_kernels import TokenCodes

__all__ = ["SEGMENT_TOKENS", "CodeHistory"]

#: Most tokens of a segment: also the most that attention unpacks at once.
SEGMENT_TOKENS = 4096
_LEAST_TOKENS = 64
_BLOCK = 16


def _capacity(tokens: int) -> int:
    """Tokens to allocate for a segment of ``tokens``: an eighth more, at most SEGMENT_TOKENS."""
    wanted = -(-(tokens + tokens // 8) // _BLOCK) * _BLOCK
    return min(SEGMENT_TOKENS, max(_LEAST_TOKENS, wanted))


def _resized(codes: TokenCodes, used: int, capacity: int) -> TokenCodes:
    """Buffers of ``capacity`` tokens that begin with the first ``used`` of ``codes``."""
    planes = []
    for plane in codes.planes:
        buffer = plane.new_zeros((*plane.shape[:-2], capacity, plane.shape[-1]))
        buffer[..., :used, :] = plane[..., :used, :]
        planes.append(buffer)
    scales = codes.scales.new_zeros((*codes.scales.shape[:-1], capacity))
    scales[..., :used] = codes.scales[..., :used]
    return TokenCodes(tuple(planes), scales)


def _write(buffer: TokenCodes, start: int, codes: TokenCodes) -> None:
    stop = start + codes.tokens
    for target, plane in zip(buffer.planes, codes.planes, strict=True):
        target[..., start:stop, :] = plane
    buffer.scales[..., start:stop] = codes.scales


@dataclass
class _Segment:
    """Buffers of keys and values, of which the first ``used`` tokens are filled."""

    keys: TokenCodes
    values: TokenCodes
    used: int

    @property
    def capacity(self) -> int:
        return self.keys.tokens

    def resize(self, capacity: int) -> None:
        self.keys = _resized(self.keys, self.used, capacity)
        self.values = _resized(self.values, self.used, capacity)


class CodeHistory:
    """Codes of keys and values of one layer, [batch, kv_heads, tokens].

    Tokens lie in segments of at most `SEGMENT_TOKENS`. Only the last one grows, by an eighth, so
    appending copies less than one segment however long the history is, and what is allocated
    but unused is at most an eighth of a segment, or 64 tokens.
    """

    def __init__(self) -> None:
        self._segments: list[_Segment] = []

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(s.used for s in self._segments)

    @property
    def spare_tokens(self) -> int:
        """Tokens for which memory is allocated but unused."""
        return sum(s.capacity - s.used for s in self._segments)

    def parts(self) -> tuple[tuple[TokenCodes, TokenCodes], ...]:
        """Views of the keys and values of each segment, in order."""
        return tuple((s.keys.narrow(0, s.used), s.values.narrow(0, s.used)) for s in self._segments)

    def append(self, keys: TokenCodes, values: TokenCodes) -> None:
        """Add tokens at the end; views taken before keep what they show."""
        start = 0
        while start < keys.tokens:
            last = self._segments[-1] if self._segments else None
            left = keys.tokens - start
            if last is None or last.used == SEGMENT_TOKENS:
                count = min(left, SEGMENT_TOKENS)
                last = _Segment(keys.narrow(0, 0), values.narrow(0, 0), 0)
                last.resize(_capacity(count))
                self._segments.append(last)
            else:
                count = min(left, SEGMENT_TOKENS - last.used)
                if last.used + count > last.capacity:
                    last.resize(_capacity(last.used + count))
            _write(last.keys, last.used, keys.narrow(start, start + count))
            _write(last.values, last.used, values.narrow(start, start + count))
            last.used += count
            start += count

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens and give back the memory of the rest."""
        kept: list[_Segment] = []
        for segment in self._segments:
            if tokens <= 0:
                break
            if segment.used > tokens:
                segment.used = tokens
                segment.resize(_capacity(tokens))  # views taken before keep what they show
            tokens -= segment.used
            kept.append(segment)
        self._segments = kept

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by ``function`` of it; for the batch dimension, or for devices."""
        for segment in self._segments:
            segment.keys = segment.keys.map(function)
            segment.values = segment.values.map(function)

    def clear(self) -> None:
        """Drop everything."""
        self._segments = []

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer."""
        for segment in self._segments:
            for codes in (segment.keys, segment.values):
                yield from codes.planes
                yield codes.scales

    @property
    def device(self) -> torch.device | None:
        """Where the codes are; None if there are none."""
        return self._segments[0].keys.scales.device if self._segments else None
