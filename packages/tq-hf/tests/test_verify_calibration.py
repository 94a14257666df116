"""Key centers: their values, files, and the attention that does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.models import load_model
from tq_hf.verify.calibration import (
    bias_centers,
    key_centers,
    key_value_states,
    read_centers,
    read_metrics,
    write_centers,
    write_metrics,
)


def test_centers_are_the_mean_of_the_keys(single: Any) -> None:
    model, _ = single
    model.set_attn_implementation("sdpa")
    one, two = torch.randint(0, 4096, (2, 1, 40), generator=torch.Generator().manual_seed(0))
    centers = key_centers(model, [one, two[:, :20], two[:, :4]], skip_tokens=4)
    keys = [key_value_states(model, ids)[1][0][0, :, 4:] for ids in (one, two[:, :20])]
    want = torch.cat(keys, dim=1).mean(dim=1)
    assert set(centers) == {0, 1}
    torch.testing.assert_close(centers[1], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(TQError, match="more than 4"):
        key_centers(model, [one[:, :4]])


def test_centers_of_the_bias_are_those_of_the_keys() -> None:
    model, tokenizer = load_model("tiny-large-bias")
    ids = torch.tensor([tokenizer.encode("import numpy as np\n" * 90)[:256]])
    from_text, from_bias = key_centers(model, [ids]), bias_centers(model, 256)
    for layer, center in from_bias.items():
        assert float((center - from_text[layer]).norm()) < 0.15 * float(from_text[layer].norm())
    plain, _ = load_model("tiny")
    with pytest.raises(TQError, match="no key bias"):
        bias_centers(plain)
    with pytest.raises(TQError, match="Llama"):
        bias_centers(torch.nn.Linear(2, 2))


def test_a_file_gives_back_what_was_written(tmp_path: Path, single: Any) -> None:
    model, _ = single
    path = tmp_path / "centers.safetensors"
    centers = {0: torch.randn(2, 128), 1: torch.randn(2, 128)}
    write_centers(centers, path, "a test")
    found = read_centers(path)
    assert found.keys() == centers.keys()
    assert all(torch.equal(found[i], centers[i]) for i in centers)
    cache = TurboQuantCache(model.config, key_center=found)
    assert torch.equal(cache.layers[1].key_center, centers[1])


def test_metrics_come_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.safetensors"
    metrics = {i: (torch.randn(2, 8, 8), torch.randn(2, 8, 8).double()) for i in (0, 11)}
    write_metrics(metrics, path, "a test")
    found = read_metrics(path)
    assert found.keys() == metrics.keys()
    for i, pair in metrics.items():
        assert all(torch.equal(a.float(), b) for a, b in zip(pair, found[i], strict=True))


def test_other_files_are_no_metrics(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = torch.zeros(1, 2, 2)
    for tensors in ({"key_center.0": one}, {"metric.0.k": one}, {"metric.k": one}, {"metric": one}):
        save_file(tensors, path)
        with pytest.raises(TQError, match="calibrate --metrics"):
            read_metrics(path)
    save_file({"metric.0.k": one / 0, "metric.0.v": one}, path)
    with pytest.raises(TQError, match="not finite"):
        read_metrics(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for tensors in ({"weight": torch.zeros(2, 2)}, {"key_center.0": torch.zeros(2)}, {}):
        save_file(tensors, path)
        with pytest.raises(TQError, match="tq calibrate"):
            read_centers(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(TQError, match="tq calibrate"):
        read_centers(path)
