"""lm-evaluation-harness with our cache, on tasks that are written here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tq_core import TQError
from tq_hf import TurboQuantCache
from tq_hf.models import held_out_text
from tq_hf.verify.harness import harness_model, harness_scores
from transformers import DynamicCache


def write_tasks(folder: Path) -> None:
    """Perplexity of held-out text, a choice between its real and a false next line, and copying."""
    lines = held_out_text("humanize").splitlines()
    rows = []
    for start in (40, 90, 140):
        prompt, right = "\n".join(lines[start : start + 30]) + "\n", lines[start + 31]
        rows.append({"prompt": prompt, "choices": [right or "x", "zebra 77 $$"], "label": 0})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
    (folder / "text.yaml").write_text(
        common.replace('doc_to_text: "{{prompt}}"', 'doc_to_text: ""')
        + "task: held_out\noutput_type: loglikelihood_rolling\n"
        + 'doc_to_target: "{{prompt}}"\n'
        + "metric_list:\n  - metric: byte_perplexity\n",
        encoding="utf-8",
    )
    (folder / "next.yaml").write_text(
        common
        + "task: next_line\noutput_type: multiple_choice\n"
        + 'doc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        + "metric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    (folder / "write.yaml").write_text(
        common
        + "task: write\noutput_type: generate_until\n"
        + 'doc_to_target: "{{choices[0]}}"\n'
        + 'generation_kwargs:\n  until: ["@@"]\n  max_gen_toks: 6\n  do_sample: false\n'
        + "metric_list:\n  - metric: exact_match\n",
        encoding="utf-8",
    )


def test_the_harness_runs_with_the_cache(
    single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra tasks")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    model, tokenizer = single
    model.set_attn_implementation("sdpa")
    write_tasks(tmp_path)
    made = []

    def compressed() -> TurboQuantCache:
        made.append(TurboQuantCache(model.config, 2, 2, sink_tokens=0, window_tokens=0))
        return made[-1]

    found = harness_scores(
        model,
        tokenizer,
        ["held_out", "next_line", "write"],
        lambda: DynamicCache(config=model.config),
        compressed,
        folder=tmp_path,
        limit=2,
    )
    by_name = {(s.task, s.metric): s for s in found}
    assert set(by_name) == {
        ("held_out", "byte_perplexity"),
        ("next_line", "acc"),
        ("write", "exact_match"),
    }
    text = by_name["held_out", "byte_perplexity"]
    assert 1 < text.base < 20
    assert 1e-4 < abs(text.value / text.base - 1) < 0.5  # the codes were read
    assert by_name["next_line", "acc"].base == 1.0
    assert made and all(c.get_seq_length() > 100 for c in made[:2])
    with pytest.raises(TQError, match="no task nothing"):
        harness_scores(model, tokenizer, ["nothing"], compressed, compressed, folder=tmp_path)


def test_pieces_give_what_one_pass_gives(single: Any) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra tasks")
    model, tokenizer = single
    model.set_attn_implementation("sdpa")
    fed = harness_model(model, tokenizer, lambda: DynamicCache(config=model.config), chunk=7)
    ids = torch.randint(1, 500, (2, 40))
    torch.testing.assert_close(fed._model_call(ids), model(ids).logits, atol=1e-3, rtol=1e-3)


def test_a_missing_harness_names_the_extra(single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TQError, match=r"tq-hf\[tasks\]"):
        harness_scores(*single, ["piqa"], lambda: None, lambda: None)
