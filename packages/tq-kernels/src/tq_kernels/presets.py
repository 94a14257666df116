"""Named formats: bits of keys and values, and what is kept at 16 bits beside them.

Measured quality of each stands in ``docs/presets.md``. Names of other TurboQuant implementations
are taken too: they stand for the nearest preset, and a warning says which.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tq_core import TQError

from tq_kernels.format import KVFormat, ScaleName

__all__ = ["PRESETS", "Preset", "PresetWarning", "find_preset", "nearest_preset"]


class PresetWarning(UserWarning):
    """A name or bits of another implementation were taken for a preset that is not the same."""


@dataclass(frozen=True)
class Preset:
    """A named format.

    Attributes
    ----------
    name : str
    k_bits, v_bits : int
        Bits of a coordinate of keys and values.
    sink_tokens, window_tokens : int
        First and last tokens of a sequence kept at 16 bits, where the cache can do so.
    skip_layers : tuple of int
        Layers kept at 16 bits; negative numbers count from the end.
    use : str
        When to choose it.
    scale : {"unbiased", "mse", "norm", "none"}
        As `KVFormat`'s. ``unbiased`` by default: ``mse`` shortens keys and values, and shorter
        keys flatten the softmax (``docs/quality.md``).
    """

    name: str
    k_bits: int
    v_bits: int
    use: str
    sink_tokens: int = 4
    window_tokens: int = 32
    skip_layers: tuple[int, ...] = ()
    scale: ScaleName = "unbiased"

    def format(self, head_dim: int, page_size: int = 16) -> KVFormat:
        """The format for a ``head_dim``; raises `TQError` where there is none."""
        return KVFormat(head_dim, self.k_bits, self.v_bits, page_size, scale=self.scale)

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of a token and KV head, both scales included, in a compressed layer."""
        return self.format(head_dim).slot_bytes

    def bits_per_number(self, head_dim: int) -> float:
        """Stored bits of a coordinate in a compressed layer, scales included."""
        return 8 * self.slot_bytes(head_dim) / (2 * head_dim)

    def skipped(self, layers: int) -> frozenset[int]:
        """Which of a model's layers stay at 16 bits.

        Raises
        ------
        TQError
            If none would be left.
        """
        found = frozenset(i % layers for i in self.skip_layers if -layers <= i < layers)
        if len(found) >= layers:
            raise TQError(
                f"preset {self.name!r} keeps layers {self.skip_layers} at 16 bits: of {layers} "
                "layers none is left to compress; choose another preset"
            )
        return found

    def bytes_per_token(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Bytes that a token of history takes in a model of ``layers`` full-attention layers."""
        kept = len(self.skipped(layers))
        return kv_heads * (kept * 4 * head_dim + (layers - kept) * self.slot_bytes(head_dim))

    def ratio(self, layers: int, head_dim: int) -> float:
        """How many times larger a 16-bit cache of the same tokens is."""
        return layers * 4 * head_dim / self.bytes_per_token(layers, 1, head_dim)


_ALL = (
    Preset("tq8", 8, 8, "The reference of the formats: half the bytes, no visible loss."),
    Preset("tq8v4", 8, 4, "Models whose keys are hard to round and cannot be centred."),
    Preset("tq4", 4, 4, "The default."),
    Preset("tq4v3", 4, 3, "A tenth smaller than tq4; values bear rounding better than keys."),
    Preset("tq3", 3, 3, "Long contexts that would not fit otherwise; check with `tq verify`."),
    Preset("tq3v2", 3, 2, "2.5 bits on average; check with `tq verify`."),
    Preset("tq2", 2, 2, "The smallest; a visible loss. Check with `tq verify`."),
)

#: All presets by name, from most to fewest bytes.
PRESETS: Mapping[str, Preset] = MappingProxyType({p.name: p for p in _ALL})

#: Names of others -> nearest preset and what differs.
_ALIASES: Mapping[str, tuple[str, str]] = {
    "turboquant": ("tq4", "K4V4"),
    "turboquant_k8v4": ("tq8v4", "rotated 8-bit keys and Lloyd-Max values, for FP8 and min/max"),
    "turboquant_4bit_nc": ("tq4", "values are rotated and take Lloyd-Max codes, for min/max"),
    "turboquant_k3v4_nc": ("tq4v3", "116 bytes for 118 at head_dim 128, the fourth bit on keys"),
    "turboquant_3bit_nc": ("tq3", "values are rotated and take Lloyd-Max codes, for min/max"),
    "tq2.5": ("tq3v2", "3-bit keys and 2-bit values, for outlier channels of one more bit"),
    "tq3.5": ("tq4v3", "4-bit keys and 3-bit values, for outlier channels of one more bit"),
}
#: Names by bits -> preset.
_SAME = {"k8v8": "tq8", "k8v4": "tq8v4", "k4v4": "tq4", "k4v3": "tq4v3", "k3v3": "tq3"}
_SAME |= {"k3v2": "tq3v2", "k2v2": "tq2"}


def find_preset(name: str) -> Preset:
    """Preset of a name, in either case; also ``k4v3``-like names and those of others.

    Warns
    -----
    PresetWarning
        If the name is another implementation's and stands for the nearest preset.

    Raises
    ------
    TQError
        For an unknown name.

    Examples
    --------
    >>> find_preset("tq4").slot_bytes(128)
    132
    """
    key = name.strip().lower() if isinstance(name, str) else name
    if key in PRESETS:
        return PRESETS[key]
    if key in _SAME:
        return PRESETS[_SAME[key]]
    if key in _ALIASES:
        target, difference = _ALIASES[key]
        warnings.warn(
            f"preset {name!r} is taken as {target!r}: {difference}", PresetWarning, stacklevel=2
        )
        return PRESETS[target]
    close = difflib.get_close_matches(str(key), [*PRESETS, *_SAME, *_ALIASES], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise TQError(f"preset {name!r} is not known: {hint}choose one of {', '.join(PRESETS)}")


def nearest_preset(k_bits: int, v_bits: int) -> Preset:
    """The smallest preset that has at least these bits.

    For settings of others, such as ``TQ4_K_BITS`` and ``TQ4_V_BITS`` (2 to 5).

    Warns
    -----
    PresetWarning
        If the preset has other bits.

    Raises
    ------
    TQError
        For bits below 1 or above 8.

    Examples
    --------
    >>> nearest_preset(4, 3).name
    'tq4v3'
    """
    for kind, bits in (("k_bits", k_bits), ("v_bits", v_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise TQError(f"{kind}={bits!r}: needs an int from 1 to 8")
    enough = [p for p in _ALL if p.k_bits >= k_bits and p.v_bits >= v_bits]
    best = min(enough, key=lambda p: p.k_bits + p.v_bits)
    if (best.k_bits, best.v_bits) != (k_bits, v_bits):
        warnings.warn(
            f"K{k_bits}V{v_bits} is taken as {best.name!r} (K{best.k_bits}V{best.v_bits})",
            PresetWarning,
            stacklevel=2,
        )
    return best
