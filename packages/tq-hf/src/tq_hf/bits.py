"""Bits of keys and values by layer, as an argument, as text and in files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tq_core import TQError

__all__ = ["EXACT", "WIDTHS", "layer_bits_checked", "parse_layer_bits", "read_layer_bits"]

#: Bits that codes can have.
WIDTHS = (2, 3, 4, 8)
#: The pair that leaves a layer as it is.
EXACT = (16, 16)
_HINT = "needs a pair of 2, 3, 4 or 8 (bits of keys and of values), or (16, 16)"


def layer_bits_checked(
    layer_bits: Mapping[int, Sequence[int]], count: int, able: Collection[int]
) -> dict[int, tuple[int, int]]:
    """Pairs of bits by layer, with layers counted from the start.

    Parameters
    ----------
    layer_bits : mapping of int to pair of int
    count : int
        Layers of the model.
    able : collection of int
        Layers that can be compressed and are not skipped.

    Raises
    ------
    TQError
        For a layer that the model does not have or cannot compress, one that is named twice, or
        bits that no format has.
    """
    if not isinstance(layer_bits, Mapping):
        raise TQError(
            f"layer_bits={layer_bits!r}: needs a mapping of layers to pairs, such as {{3: (8, 4)}}"
        )
    found: dict[int, tuple[int, int]] = {}
    for layer, pair in layer_bits.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise TQError(
                f"layer_bits has layer {layer!r}: the model has layers 0 to {count - 1}; negative "
                "numbers count from the end"
            )
        index = layer % count
        if index in found:
            raise TQError(f"layer_bits has layer {index} twice, as {layer} too; leave one out")
        if index not in able:
            raise TQError(
                f"layer_bits has layer {layer}, which is not compressed (it is in skip_layers, or "
                "no full attention); leave it out"
            )
        found[index] = _pair(pair, f"layer_bits[{layer}]")
    return found


def _pair(pair: object, name: str) -> tuple[int, int]:
    numbers = tuple(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else ()
    if len(numbers) != 2 or any(type(n) is not int for n in numbers):
        raise TQError(f"{name}={pair!r}: {_HINT}")
    if numbers != EXACT and not set(numbers) <= set(WIDTHS):
        more = "; 16 bits are for keys and values together" if 16 in numbers else ""
        raise TQError(f"{name}={numbers}: {_HINT}{more}")
    return numbers[0], numbers[1]


def read_layer_bits(data: object, source: str) -> dict[int, tuple[int, int]]:
    """Pairs of bits by layer of a JSON object such as ``{"3": [8, 4]}``.

    Raises
    ------
    TQError
        If it is no such object.
    """
    if not isinstance(data, dict):
        raise TQError(f'{source} has layer_bits={data!r}: needs an object such as {{"3": [8, 4]}}')
    found = {}
    for name, pair in data.items():
        if not isinstance(name, str) or not name.removeprefix("-").isdecimal():
            raise TQError(f"{source} has layer_bits for {name!r}: needs the number of a layer")
        found[int(name)] = _pair(pair, f"{source}: layer_bits[{name}]")
    return found


def parse_layer_bits(text: str) -> dict[int, tuple[int, int]]:
    """Pairs of bits by layer of ``LAYER=K/V`` items, or of a JSON file.

    ``0=3/4,4=8/4,-1=16``: one number stands for both. A file holds an object of layers and
    pairs, or is a report of ``tq verify`` that has one.

    Raises
    ------
    TQError
        If it is neither.

    Examples
    --------
    >>> parse_layer_bits("0=3/4,-1=16")
    {0: (3, 4), -1: (16, 16)}
    """
    if "=" not in text:
        return _read_file(text)
    found: dict[int, tuple[int, int]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        layer, _, bits = item.partition("=")
        try:
            index, numbers = int(layer), [int(n) for n in bits.split("/")]
        except ValueError:
            raise TQError(f"--layer-bits {item!r}: needs LAYER=K/V, such as 3=8/4") from None
        if index in found:
            raise TQError(f"--layer-bits {text!r} has layer {index} twice; leave one out")
        found[index] = _pair(numbers * 2 if len(numbers) == 1 else numbers, f"layer {index}")
    return found


def _read_file(path: str) -> dict[int, tuple[int, int]]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TQError(
            f"--layer-bits {path!r} is neither LAYER=K/V items nor a JSON file ({error})"
        ) from None
    if isinstance(data, dict) and "layer_bits" in data:
        data = data["layer_bits"]
    return read_layer_bits(data, path)
