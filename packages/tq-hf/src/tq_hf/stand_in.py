"""Tensors that stand for the keys or values of a layer without holding them.

A `StandIn` has the shape, dtype and device of the full tensor and no memory of its own.
``scaled_dot_product_attention`` on a pair of them reads the codes in chunks. Any other operation
first decodes the whole history, for that operation only, so that every model gets right numbers.
Writing into one raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tq_core import TQError

from tq_hf.snapshot import Snapshot

__all__ = ["StandIn", "decoded", "snapshot_of", "stand_ins"]


_WRITTEN = (
    "{} would write into the keys or values that TurboQuantCache returned; write into a copy of "
    "them: x.clone()"
)


@dataclass(frozen=True, eq=False)
class _Source:
    """What a stand-in shows.

    ``stage`` follows the three steps by which models repeat key-value heads: a new axis, its
    expansion, and its merge with the heads.
    """

    snapshot: Snapshot
    kind: Literal["k", "v"]
    stage: Literal["heads", "axis", "expanded", "repeated"] = "heads"
    repeats: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        batch, kv_heads, tokens, dim = self.snapshot.shape
        if self.stage in ("heads", "repeated"):
            return batch, kv_heads * self.repeats, tokens, dim
        return batch, kv_heads, self.repeats, tokens, dim

    def dense(self) -> Tensor:
        x = self.snapshot.dense(self.kind)
        if self.stage == "heads":
            return x
        batch, kv_heads, tokens, dim = x.shape
        x = x[:, :, None].expand(batch, kv_heads, self.repeats, tokens, dim)
        return x.reshape(self.shape).contiguous()


class StandIn(Tensor):
    """Keys or values of a layer, decoded only where they are needed."""

    source: _Source

    @staticmethod
    def __new__(cls, source: _Source) -> StandIn:
        like = source.snapshot.tail[0]
        make: Any = Tensor._make_wrapper_subclass
        self: StandIn = make(cls, source.shape, dtype=like.dtype, device=like.device)
        self.source = source
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not None:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ] + [v for k, v in (kwargs or {}).items() if k == "out"]
            if any(isinstance(value, StandIn) for value in written):
                raise TQError(_WRITTEN.format(func))
        made: dict[int, Tensor] = {}

        def plain(x: Any) -> Any:
            if not isinstance(x, StandIn):
                return x
            if id(x) not in made:
                made[id(x)] = decoded(x)
            return made[id(x)]

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def decoded(x: Tensor) -> Tensor:
    """The tensor that a stand-in stands for; any other tensor as it is."""
    return x.source.dense() if isinstance(x, StandIn) else x


def stand_ins(snapshot: Snapshot) -> tuple[StandIn, StandIn]:
    """Stand-ins of the keys and the values of a snapshot."""
    return StandIn(_Source(snapshot, "k")), StandIn(_Source(snapshot, "v"))


def snapshot_of(key: Tensor, value: Tensor) -> Snapshot:
    """The snapshot that a pair of stand-ins shows, or one of plain tensors.

    Raises
    ------
    TQError
        If the two do not belong together.
    """
    if isinstance(key, StandIn) and isinstance(value, StandIn):
        a, b = key.source, value.source
        same = a.snapshot is b.snapshot and (a.kind, b.kind) == ("k", "v")
        if same and a.stage == b.stage == "heads":
            return a.snapshot
        raise TQError(
            "keys and values come from different updates of the cache; pass the pair that one "
            "update returned"
        )
    keys, values = (decoded(x) for x in (key, value))
    return Snapshot.of_dense(keys, values)


def _with(x: StandIn, stage: Any, repeats: int) -> StandIn:
    return StandIn(replace(x.source, stage=stage, repeats=repeats))


def _getitem(x: Any, index: Any) -> StandIn | None:
    """``x[:, :, None, :, :]``, the first step of repeating heads."""
    everything = slice(None)
    if not isinstance(x, StandIn) or x.source.stage != "heads":
        return None
    if not isinstance(index, tuple) or len(index) not in (3, 4, 5) or index[2] is not None:
        return None
    if any(part != everything for i, part in enumerate(index) if i != 2):
        return None
    return _with(x, "axis", 1)


def _setitem(x: Any, *_: Any) -> None:
    if isinstance(x, StandIn):
        raise TQError(_WRITTEN.format("x[...] = y"))


def _expand(x: Any, *sizes: Any) -> StandIn | None:
    """``x.expand(batch, kv_heads, repeats, tokens, head_dim)``, the second step."""
    if not isinstance(x, StandIn) or x.source.stage != "axis":
        return None
    if len(sizes) == 1:
        sizes = tuple(sizes[0])
    batch, kv_heads, tokens, dim = x.source.snapshot.shape
    if len(sizes) != 5 or not all(isinstance(n, int) for n in sizes):
        return None
    if (*sizes[:2], *sizes[3:]) != (batch, kv_heads, tokens, dim) or sizes[2] < 1:
        return None
    return _with(x, "expanded", sizes[2])


def _reshape(x: Any, *sizes: Any) -> StandIn | None:
    """``x.reshape(batch, heads, tokens, head_dim)``, the third step."""
    if not isinstance(x, StandIn) or x.source.stage != "expanded":
        return None
    if len(sizes) == 1:
        sizes = tuple(sizes[0])
    repeated = _with(x, "repeated", x.source.repeats)
    return repeated if tuple(sizes) == tuple(repeated.shape) else None


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``scaled_dot_product_attention`` on codes; None where it has to decode."""
    from tq_hf.attention import attend

    if not isinstance(key, StandIn) or not isinstance(value, StandIn) or dropout_p:
        return None
    a, b = key.source, value.source
    snapshot = a.snapshot
    whole = a.stage in ("heads", "repeated") and (a.stage, a.repeats) == (b.stage, b.repeats)
    if snapshot is not b.snapshot or (a.kind, b.kind) != ("k", "v") or not whole:
        return None
    if isinstance(query, StandIn) or query.dim() != 4 or query.shape[0] != key.shape[0]:
        return None
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and not (enable_gqa and heads % kv_heads == 0):
        return None
    positions = torch.arange(query.shape[2], device=query.device) if is_causal else None
    return attend(query, snapshot, softmax_scale=scale, mask=attn_mask, positions=positions)


_HANDLERS: dict[Any, Any] = {
    torch.nn.functional.scaled_dot_product_attention: _sdpa,
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    Tensor.expand: _expand,
    Tensor.reshape: _reshape,
}
