"""Settings of the backend, from the environment.

===================  ===============================================================
``TQ_PRESET``        ``tq4`` (default) or another name of `tq_kernels.presets`
``TQ_K_BITS``        bits of a key coordinate: 2, 3, 4 or 8 (also ``TQ4_K_BITS``)
``TQ_V_BITS``        bits of a value coordinate (also ``TQ4_V_BITS``)
``TQ_SKIP_LAYERS``   layers kept at 16 bits, such as ``0,1,-2,-1``, ``0-3``, ``sliding``
                     (all layers with a sliding window) or ``none`` (default)
``TQ_FINE_LAYERS``   layers whose keys get 8 bits and values 4, named likewise; the
                     presets of 3 bits and below do so for the first and last two
``TQ_PREFILL``       ``exact`` (default): new tokens see each other at 16 bits;
                     ``stored``: as they are stored, so that chunking the prompt and
                     cached prefixes change no result
``TQ_KEY_CENTER``    file of ``tq calibrate``: a constant to subtract from the keys of each
                     layer and head, for models with large key biases
``TQ_SEED``          seed of the rotation
``TQ_ROTATION``      ``hadamard`` (default) or ``haar``
``TQ_SCALE``         ``mse``, ``norm``, ``unbiased`` or ``none``; by default that of
                     `tq_kernels.KVFormat`
``TQ_CPU``           1 (default): on vLLM's CPU platform, take the place of its
                     attention; 0: leave it alone
===================  ===============================================================

Without any of them the backend works with the defaults, if ``--attention-backend CUSTOM`` asks
for it. Variables that start with ``TQ_`` and are none of these are errors.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field, FilePath, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from tq_core import TQError

if TYPE_CHECKING:
    from tq_kernels.presets import Preset

__all__ = [
    "EDGES",
    "FINE_BITS",
    "Settings",
    "asked_for",
    "load_settings",
    "named_layers",
    "settings_of",
]

Bits = Literal[2, 3, 4, 8]
Scale = Literal["mse", "norm", "unbiased", "none"]

#: Bits of keys and values in layers that get more.
FINE_BITS = (8, 4)

#: Layers that get more where a preset's keys have 3 bits or less: they lose most.
EDGES = "0,1,-2,-1"

_PREFIXES = ("TQ_", "TQ4_")
#: Variables of the packages below.
_OTHERS = ("TQ_KERNELS_", "TQ_HF_", "TQ_CORE_")
_LAYERS = re.compile(r"(-?\d+)(?:-(\d+))?")


def _find_preset(name: str) -> Preset:
    from tq_kernels.presets import find_preset  # loads torch, which an import must not

    return find_preset(name)


class Settings(BaseSettings):
    """Settings of the backend; see the module for the variables."""

    model_config = SettingsConfigDict(env_prefix="TQ_", env_ignore_empty=True, frozen=True)

    preset: str = "tq4"
    k_bits: Bits | None = Field(
        default=None, validation_alias=AliasChoices("TQ_K_BITS", "TQ4_K_BITS")
    )
    v_bits: Bits | None = Field(
        default=None, validation_alias=AliasChoices("TQ_V_BITS", "TQ4_V_BITS")
    )
    skip_layers: str = "none"
    fine_layers: str | None = None
    prefill: Literal["exact", "stored"] = "exact"
    key_center: FilePath | None = None
    seed: int = Field(default=0, ge=0, lt=2**64)
    rotation: Literal["hadamard", "haar"] = "hadamard"
    scale: Scale | None = None
    cpu: bool = True

    @field_validator("k_bits", "v_bits", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdecimal() else value

    @field_validator("preset")
    @classmethod
    def _preset(cls, value: str) -> str:
        return _find_preset(value).name

    @field_validator("skip_layers", "fine_layers")
    @classmethod
    def _layers(cls, value: str | None) -> str | None:
        if value is not None:
            _parse_layers(value)
        return value

    @property
    def key_bits(self) -> int:
        """Bits of a key coordinate."""
        return _find_preset(self.preset).k_bits if self.k_bits is None else self.k_bits

    @property
    def value_bits(self) -> int:
        """Bits of a value coordinate."""
        return _find_preset(self.preset).v_bits if self.v_bits is None else self.v_bits

    @property
    def tokens_at_16_bits(self) -> tuple[int, int]:
        """First and last tokens that the preset keeps at 16 bits where a cache can do so."""
        preset = _find_preset(self.preset)
        return preset.sink_tokens, preset.window_tokens

    @property
    def scale_name(self) -> Scale:
        """What stored scales are matched to."""
        if self.scale is not None:
            return self.scale
        from tq_kernels import KVFormat  # loads torch, which an import must not

        return KVFormat.scale

    @property
    def fine_layer_names(self) -> str:
        """Layers that get more bits, as ``TQ_FINE_LAYERS`` names them or else the preset.

        Those of a preset of few bits are for the preset's own bits only.
        """
        if self.fine_layers is not None:
            return self.fine_layers
        preset = _find_preset(self.preset)
        same = (self.key_bits, self.value_bits) == (preset.k_bits, preset.v_bits)
        return EDGES if same and preset.k_bits <= 3 else "none"

    @property
    def singles_out_layers(self) -> bool:
        """Whether some layers are kept at 16 bits or get more bits."""
        return any(
            _parse_layers(t) != ([], False) for t in (self.skip_layers, self.fine_layer_names)
        )


def _names() -> list[str]:
    names = [f"TQ_{name.upper()}" for name in Settings.model_fields]
    return [*names, "TQ4_K_BITS", "TQ4_V_BITS"]


def _given(environ: Mapping[str, str]) -> list[str]:
    """Variables of this package that are set, known or not."""
    return [
        name
        for name, value in environ.items()
        if name.startswith(_PREFIXES) and not name.startswith(_OTHERS) and value
    ]


def asked_for(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable of this package is set."""
    return bool(_given(environ))


@cache
def _load(values: tuple[tuple[str, str], ...]) -> Settings:
    known = _names()
    for name, _ in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise TQError(f"environment variable {name} is no setting of tq-vllm: {hint}")
    given = dict(values)
    for kind in ("K", "V"):
        new, old = given.get(f"TQ_{kind}_BITS"), given.get(f"TQ4_{kind}_BITS")
        if new is not None and old is not None and new != old:
            raise TQError(
                f"TQ_{kind}_BITS={new} and TQ4_{kind}_BITS={old} differ: unset the second"
            )
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        variable = name if name.startswith("TQ") else f"TQ_{name.upper()}"
        if variable not in given:
            variable = variable.replace("TQ_", "TQ4_")
        message = first["msg"].removeprefix("Value error, ")
        raise TQError(f"{variable}={first['input']!r}: {message}") from None


def load_settings() -> Settings:
    """Return the settings of the environment.

    Raises
    ------
    TQError
        For an unknown ``TQ_`` variable or an invalid value; names the variable.
    """
    return _load(tuple(sorted((name, os.environ[name]) for name in _given(os.environ))))


def settings_of(cache_config: Any) -> Settings:
    """Settings of an engine: those of the environment, or the preset of its ``--kv-cache-dtype``.

    ``--kv-cache-dtype-skip-layers`` adds to ``TQ_SKIP_LAYERS`` then.

    Raises
    ------
    TQError
        As `load_settings`, and if both name a preset and they differ.
    """
    from tq_kernels.presets import PRESETS

    settings, name = load_settings(), cache_config.cache_dtype
    if name not in PRESETS:
        return settings
    if "preset" in settings.model_fields_set and settings.preset != name:
        raise TQError(f"--kv-cache-dtype {name} and TQ_PRESET={settings.preset} differ: drop one")
    skipped = ",".join([settings.skip_layers, *cache_config.kv_cache_dtype_skip_layers])
    try:
        _parse_layers(skipped)
    except ValueError as error:
        raise TQError(f"--kv-cache-dtype-skip-layers: {error}") from None
    return settings.model_copy(update={"preset": name, "skip_layers": skipped})


def _parse_layers(text: str) -> tuple[list[tuple[int, int]], bool]:
    """Ranges of layers, both ends included, and whether sliding-window layers are meant."""
    ranges, sliding = [], False
    for part in (p.strip() for p in text.split(",")):
        if part in ("", "none"):
            continue
        if part in ("sliding", "sliding_window"):
            sliding = True
            continue
        match = _LAYERS.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{part!r} names no layers: use numbers (0, -1), ranges (0-3), 'sliding' or "
                "'none', separated by commas"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if match[2] is not None and not 0 <= first <= last:
            raise ValueError(f"{part!r} is no range of layers: use first-last, such as 0-3")
        ranges.append((first, last))
    return ranges, sliding


def named_layers(text: str, num_layers: int) -> tuple[frozenset[int], bool]:
    """Layers that ``TQ_SKIP_LAYERS`` or ``TQ_FINE_LAYERS`` names.

    Parameters
    ----------
    text : str
        The value of the variable.
    num_layers : int
        Layers of the model.

    Returns
    -------
    layers : frozenset of int
        Numbers from 0.
    sliding : bool
        Whether all layers with a sliding window are meant too.

    Raises
    ------
    TQError
        For a layer that the model does not have.
    """
    ranges, sliding = _parse_layers(text)
    layers: set[int] = set()
    for first, last in ranges:
        if not (-num_layers <= first and last < num_layers):
            raise TQError(
                f"{text!r} names layers that are not there: the model has layers 0 to "
                f"{num_layers - 1}; correct TQ_SKIP_LAYERS or TQ_FINE_LAYERS"
            )
        layers.update(n % num_layers for n in range(first, last + 1))
    return frozenset(layers), sliding
