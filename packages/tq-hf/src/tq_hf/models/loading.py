"""Load the models and the held-out text from the package's own files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_ROOT = Path(__file__).resolve().parent
_NAMES = ("tiny", "tiny-large-bias")


@dataclass(frozen=True)
class HeldOutDocument:
    """A source file of a package that no model was trained on.

    Attributes
    ----------
    package, version, licence, path : str
        Where the text comes from; its licence text is in ``held_out.json``.
    text : str
        The file.
    """

    package: str
    version: str
    licence: str
    path: str
    text: str


def available_models() -> tuple[str, ...]:
    """Return the names that `load_model` takes."""
    return _NAMES


def model_path(name: str = "tiny") -> Path:
    """Return the folder of a model (config, weights, tokenizer, model card).

    Raises
    ------
    ValueError
        If there is no model of that name.
    """
    if name not in _NAMES:
        raise ValueError(f"name={name!r} is no model of this package; choose one of {_NAMES}")
    return _ROOT / name


def load_model(
    name: str = "tiny",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model of the package and its tokenizer; never uses the network.

    Parameters
    ----------
    name : {"tiny", "tiny-large-bias"}
        The model.
    dtype : torch.dtype
        Type of the weights; they are stored in bfloat16.
    device : str or torch.device
        Where to put the model.
    attn_implementation : str
        Attention of transformers to use.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerFast
        Byte-level BPE; ``<|endoftext|>`` (token 0) separates documents and pads.

    Raises
    ------
    ValueError
        If there is no model of that name.
    """
    folder = model_path(name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    return model.to(device).eval(), tokenizer


@lru_cache(maxsize=1)
def held_out_documents() -> tuple[HeldOutDocument, ...]:
    """Return the held-out files, whole, in a fixed order."""
    data = json.loads((_ROOT / "held_out.json").read_text(encoding="utf-8"))
    return tuple(
        HeldOutDocument(
            package=row["package"],
            version=data["packages"][row["package"]]["version"],
            licence=data["packages"][row["package"]]["licence"],
            path=row["path"],
            text=row["text"],
        )
        for row in data["documents"]
    )


def held_out_text(package: str | None = None) -> str:
    """Return the held-out files joined by blank lines, of one package or of all.

    Raises
    ------
    ValueError
        If no held-out file belongs to ``package``.
    """
    documents = held_out_documents()
    chosen = [d.text for d in documents if package is None or d.package == package]
    if not chosen:
        names = sorted({d.package for d in documents})
        raise ValueError(f"package={package!r} is not held out; choose one of {names}")
    return "\n\n".join(chosen)
