"""The model to verify and the text to verify it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tq_core import TQError

from tq_hf.models import available_models, held_out_documents, held_out_text, load_model

__all__ = [
    "CALIBRATION",
    "builtin_texts",
    "calibration_windows",
    "load_any_model",
    "read_texts",
    "start_token",
    "token_windows",
]

#: Held-out package whose text is kept for calibration and never measured on.
CALIBRATION = "einops"


def load_any_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A model of this package by name, or any causal language model from a folder.

    Parameters
    ----------
    name : str
        ``tiny``, ``tiny-large-bias``, a folder, or whatever ``from_pretrained`` takes.
    dtype : str
        ``auto`` (float32 for the package's models on a CPU), ``float32``, ``bfloat16``, ``float16``.
    device : str

    Raises
    ------
    TQError
        If it cannot be loaded.
    """
    known = {"float32", "bfloat16", "float16"}
    if dtype not in known | {"auto"}:
        raise TQError(f"dtype={dtype!r}: choose auto, {', '.join(sorted(known))}")
    if name in available_models():
        chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return load_model(name, dtype=chosen, device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TQError(
            f"model {name!r} cannot be loaded ({str(error).splitlines()[0]}); give a folder with "
            f"config, weights and tokenizer, or one of {', '.join(available_models())}"
        ) from None
    return model.to(device).eval(), tokenizer


def builtin_texts() -> list[str]:
    """The held-out text of each package, but for that kept for calibration."""
    names = dict.fromkeys(d.package for d in held_out_documents())
    return [held_out_text(name) for name in names if name != CALIBRATION]


def read_texts(dataset: str) -> list[str]:
    """Texts of ``builtin`` or of a UTF-8 file (one text).

    Raises
    ------
    TQError
        If the file cannot be read or is empty.
    """
    if dataset == "builtin":
        return builtin_texts()
    try:
        text = Path(dataset).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TQError(f"dataset {dataset!r} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise TQError(f"dataset {dataset!r} is empty; give some thousand words")
    return [text]


def start_token(tokenizer: Any) -> list[int]:
    """The token that a text starts with, if the tokenizer has one."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return [int(token)]
    return []


def token_windows(
    tokenizer: Any, texts: list[str], window: int, count: int, device: Any = "cpu"
) -> list[Tensor]:
    """Up to ``count`` windows of ``window + 1`` tokens, taken from the texts in turn.

    Returns
    -------
    list of int64 tensors [1, window + 1]
        Shorter only where all texts together are shorter than one window.

    Raises
    ------
    TQError
        If the texts hold fewer than two tokens.
    """
    start = start_token(tokenizer)
    size = window + 1 - len(start)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    pieces = []
    longest = max((len(ids) for ids in encoded), default=0)
    for offset in range(0, longest, size):
        for ids in encoded:
            piece = ids[offset : offset + size]
            if len(piece) == size:
                pieces.append(piece)
    if not pieces:
        pieces = [max(encoded, key=len)] if encoded else []
    if not pieces or len(pieces[0]) + len(start) < 2:
        raise TQError("the text holds fewer than 2 tokens; give a longer one")
    return [torch.tensor([start + piece], device=device) for piece in pieces[:count]]


def calibration_windows(
    tokenizer: Any, dataset: str, window: int, count: int, device: Any = "cpu"
) -> list[Tensor]:
    """Windows of text to calibrate on: a UTF-8 file, or ``builtin``, which is not measured on."""
    texts = [held_out_text(CALIBRATION)] if dataset == "builtin" else read_texts(dataset)
    return token_windows(tokenizer, texts, window, count, device)
