"""``tq verify``: its numbers against closed forms, its verdict, its command line."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tq_core import TQError
from tq_hf import TurboQuantCache, cache_argument
from tq_hf.models import held_out_text
from tq_hf.verify.layers import LayerScores, measure_layers
from tq_hf.verify.measure import history_bytes, measure
from tq_hf.verify.predictions import baseline_factory, compare_predictions
from tq_hf.verify.recall import recall_prompt
from tq_hf.verify.report import DEFAULT_THRESHOLDS, Report, parse_thresholds
from tq_hf.verify.scores import TokenScores, compare_logits, summarize
from tq_hf.verify.sweep import LayerSensitivity, propose_bits, sweep_layers
from tq_hf.verify.tasks import TaskCell, copy_cells, retrieval_cells, task_sizes
from tq_hf.verify.texts import load_any_model, read_texts, start_token, token_windows
from tq_kernels import KVFormat

pytest.importorskip("typer")
import typer
from tq_hf.verify.command import balance, calibrate, verify
from transformers import DynamicCache
from typer.testing import CliRunner


@pytest.fixture
def plain(single: Any) -> Any:
    model, tokenizer = single
    model.set_attn_implementation("sdpa")
    return model, tokenizer


@pytest.fixture(scope="module")
def windows(single: Any) -> list[torch.Tensor]:
    return token_windows(single[1], [held_out_text("humanize")], 160, 2)


# Scores


def test_divergence_of_two_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    scores = compare_logits(p.log() + 3, q.log() - 2, torch.tensor([1]))
    assert scores.kl[0] == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert not scores.same[0]
    assert scores.base_nats[0] == pytest.approx(math.log(4), rel=1e-5)
    assert scores.nats[0] == pytest.approx(math.log(2), rel=1e-5)


def test_summary_of_known_scores() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(1.5, 0.5, 4096)
    shift = np.where(np.arange(4096) % 2, 0.03, -0.01)
    kl = np.arange(4096) / 4095
    parts = [
        TokenScores(
            kl[i : i + 512], kl[i : i + 512] < 0.75, base[i : i + 512], (base + shift)[i : i + 512]
        )
        for i in range(0, 4096, 512)
    ]
    s = summarize(parts)
    assert s.tokens == 4096
    assert (s.kl_mean, s.kl_max) == (pytest.approx(0.5), 1.0)
    assert s.kl_p99 == pytest.approx(0.99, abs=1e-3)
    assert s.top1 == pytest.approx(0.75, abs=1e-3)
    assert s.base_perplexity == pytest.approx(math.exp(base.mean()))
    assert s.change == pytest.approx(math.expm1(0.01))
    # Every block has the same mean shift, so the paired interval is a point.
    assert s.change_interval == (pytest.approx(s.change), pytest.approx(s.change))
    low, high = s.base_interval
    half = 1.96 * base.std() / 4096**0.5
    assert low < s.base_perplexity < high
    assert math.log(high / low) == pytest.approx(2 * half, rel=0.35)


def test_no_scores_are_an_error() -> None:
    with pytest.raises(TQError, match="longer text"):
        summarize([])


# Layers


def test_layers_are_compared_with_what_they_were_given(plain: Any, windows: Any) -> None:
    model, _ = plain

    def make(k_bits: int, v_bits: int) -> Any:
        return lambda: TurboQuantCache(model.config, k_bits, v_bits, sink_tokens=0, window_tokens=0)

    fine, coarse = (
        measure_layers(model, [w[:, :-1] for w in windows], make(*bits))
        for bits in ((8, 8), (4, 2))
    )
    assert [x.layer for x in fine] == [x.layer for x in coarse] == [0, 1]
    for x in fine:
        assert min(x.k_cosine_min, x.v_cosine_min, x.out_cosine_min) > 0.995
        assert min(x.k_cosine, x.v_cosine, x.out_cosine) > 0.9999
        assert 0 < x.k_error < 0.01
    for x in coarse:
        # Theory: 1 - cos^2 is .0092 at 4 bits and .1154 at 2 bits (docs of the codebooks), and the
        # unbiased scale makes the relative error the tangent.
        assert x.k_cosine == pytest.approx(math.sqrt(1 - 0.0092), abs=1e-3)
        assert x.v_cosine == pytest.approx(math.sqrt(1 - 0.1154), abs=4e-3)
        assert x.k_error == pytest.approx(math.sqrt(0.0092 / (1 - 0.0092)), rel=0.05)
        assert x.v_error == pytest.approx(math.sqrt(0.1154 / (1 - 0.1154)), rel=0.05)
        assert x.v_cosine_min < x.v_cosine
        assert x.out_cosine < 0.999
    assert model.config._attn_implementation == "sdpa"


def test_published_cosines_of_the_seed_are_reached(plain: Any, windows: Any) -> None:
    model, _ = plain
    for bits, least in (((4, 4), 0.99), ((4, 3), 0.98)):
        found = measure_layers(
            model,
            [windows[0][:, :-1]],
            lambda bits=bits: TurboQuantCache(model.config, *bits, sink_tokens=0, window_tokens=0),
        )
        assert min(min(x.k_cosine, x.v_cosine) for x in found) >= least


def test_layers_need_text(plain: Any) -> None:
    model, _ = plain
    with pytest.raises(TQError, match="64 tokens"):
        measure_layers(
            model, [torch.zeros(1, 64, dtype=torch.long)], lambda: TurboQuantCache(model.config)
        )


# Predictions


def test_the_baseline_against_itself_is_exact(plain: Any, windows: Any) -> None:
    model, _ = plain
    make = baseline_factory(model.config, "model")
    s = summarize(x for x, _ in compare_predictions(model, windows, make, make))
    assert (s.kl_max, s.top1, s.change) == (0.0, 1.0, 0.0)
    assert s.tokens == 2 * (160 - 64)


def test_perplexity_is_that_of_the_model(plain: Any, windows: Any) -> None:
    model, _ = plain
    ids = windows[0]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, 64:]
    want = float(torch.nn.functional.cross_entropy(logits, ids[0, 65:]).exp())
    make = baseline_factory(model.config, "model")
    s = summarize(x for x, _ in compare_predictions(model, [ids], make, make, chunk=17))
    assert s.base_perplexity == pytest.approx(want, rel=1e-4)


def test_fewer_bits_diverge_more(plain: Any, windows: Any) -> None:
    model, _ = plain
    make = baseline_factory(model.config, "fp16")
    found = []
    for bits in (8, 4, 2):
        cache = lambda bits=bits: TurboQuantCache(model.config, bits, bits)  # noqa: E731
        found.append(
            summarize(x for x, _ in compare_predictions(model, windows, make, cache)).kl_mean
        )
    assert found[0] < found[1] < found[2]
    assert found[0] < 1e-4 < found[2]


def test_baselines_are_rounded_to_their_type(plain: Any) -> None:
    model, _ = plain
    x = torch.full((1, 2, 3, 128), 1 / 3)
    for name, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("model", torch.float32),
    ):
        cache = baseline_factory(model.config, name)()
        keys, _ = cache.update(x, x, 0)
        assert keys.dtype == torch.float32
        assert torch.equal(keys, x.to(dtype).float())
    with pytest.raises(TQError, match="int4"):
        baseline_factory(model.config, "int4")


# Tasks


def test_tasks_of_the_whole_model(plain: Any) -> None:
    from tq_hf.models import load_model

    model, tokenizer = load_model("tiny")
    make = baseline_factory(model.config, "model")

    class Forgetful(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(key_states, 0 * value_states, *args, **kwargs)

    broken = Forgetful
    (copied,) = copy_cells(model, tokenizer, [64], make, broken)
    assert (copied.task, copied.length, copied.count) == ("copy", 64, 56)
    assert copied.base_accuracy > 0.8
    assert copied.accuracy < 0.2
    cells = list(retrieval_cells(model, tokenizer, [512], make, broken, count=1))
    assert [c.depth for c in cells] == [0.17, 0.5, 0.83]
    assert sum(c.count for c in cells) == 12
    assert sum(c.base_accuracy * c.count for c in cells) > 9
    assert sum(c.accuracy for c in cells) == 0
    with pytest.raises(TQError, match="512"):
        next(retrieval_cells(model, tokenizer, [256], make, make))


def test_recall_prompts_are_as_described(plain: Any) -> None:
    _, tokenizer = plain
    prompt = recall_prompt(tokenizer, 700, definitions=20, questions=9, seed=3)
    assert prompt == recall_prompt(tokenizer, 700, definitions=20, questions=9, seed=3)
    assert prompt != recall_prompt(tokenizer, 700, definitions=20, questions=9, seed=4)
    assert prompt.context == 700 + len(start_token(tokenizer))
    text = tokenizer.decode(prompt.ids[: prompt.context])
    defined = dict(re.findall(r"^NAME_([A-Z]{4}) = (\d{4})$", text, re.MULTILINE))
    assert len(defined) == 20
    asked = tokenizer.decode(prompt.ids[prompt.context :])
    pairs = re.findall(r"^assert NAME_([A-Z]{4}) == (\d{4})$", asked, re.MULTILINE)
    assert len({name for name, _ in pairs}) == 9 == len(prompt.answers)
    for (name, value), answer in zip(pairs, prompt.answers, strict=True):
        assert defined[name] == value
        assert tokenizer.decode(prompt.ids[answer.start : answer.stop]).strip() == value
        line = tokenizer.decode(prompt.ids[answer.place : answer.place + 16])
        assert line.strip().startswith(f"NAME_{name} = ")


@pytest.mark.parametrize(
    ("tokens", "definitions", "questions", "message"),
    [(100, 20, 4, "tokens=100"), (10**7, 20, 4, "tokens=10000000"), (700, 4, 5, "questions=5")],
)
def test_recall_prompts_that_cannot_be_made(
    plain: Any, tokens: int, definitions: int, questions: int, message: str
) -> None:
    with pytest.raises(TQError, match=message):
        recall_prompt(plain[1], tokens, definitions=definitions, questions=questions)


def test_tasks_fit_the_context() -> None:
    assert task_sizes(2048) == ((512, 1536), (64, 256))
    assert task_sizes(131072) == ((512, 1536, 4096), (64, 256))
    assert task_sizes(128) == ((), ())


# Sweep


def test_a_sweep_compresses_one_layer_at_a_time(plain: Any, windows: Any) -> None:
    model, _ = plain
    make = baseline_factory(model.config, "model")

    def only(layer: int, k_bits: int, v_bits: int) -> Any:
        return TurboQuantCache(model.config, k_bits, v_bits, skip_layers=[1 - layer])

    found = sweep_layers(model, windows, [0, 1], make, only)
    assert [x.layer for x in found] == [0, 1]
    both = lambda: TurboQuantCache(model.config, 3, 3)  # noqa: E731
    together = summarize(x for x, _ in compare_predictions(model, windows, make, both)).kl_mean
    parts = [half[3] for x in found for half in (x.k_kl, x.v_kl)]
    assert min(parts) > 0
    assert max(parts) < together < 2 * sum(parts)
    assert all(half[2] > half[3] for x in found for half in (x.k_kl, x.v_kl))


def sensitivity(layer: int, k_kl: float, v_kl: float) -> LayerSensitivity:
    """Two bits lose five times as much as three."""
    return LayerSensitivity(layer, {2: 5 * k_kl, 3: k_kl}, {2: 5 * v_kl, 3: v_kl})


def loss(found: LayerSensitivity, k_bits: int, v_bits: int) -> float:
    """Divergence of a layer, written out."""
    error = {n: KVFormat(128, n, n).k_codebook.mse for n in (3, 4, 8)}
    share = {n: e / error[3] for n, e in error.items()} | {2: 5.0, 16: 0.0}
    return found.k_kl[3] * share[k_bits] + found.v_kl[3] * share[v_bits]


def size(pair: tuple[int, int]) -> int:
    return 512 if pair == (16, 16) else KVFormat(128, *pair).slot_bytes


@pytest.mark.parametrize("budget", [204, 230, 316, 396, 500, 900, 1400, 1e9])
def test_a_budget_buys_the_bits_that_help_most(budget: float) -> None:
    found = [sensitivity(i, k, v) for i, k, v in ((0, 1.0, 9.0), (1, 5.0, 0.1), (4, 0.2, 0.3))]
    bits = propose_bits(found, dict.fromkeys((0, 1, 4), (1, 128)), budget)
    assert list(bits) == [0, 1, 4]
    assert sum(size(pair) for pair in bits.values()) <= budget
    pairs = [*itertools.product((2, 3, 4, 8), repeat=2), (16, 16)]
    least = min(
        sum(loss(s, *pair) for s, pair in zip(found, choice, strict=True))
        for choice in itertools.product(pairs, repeat=3)
        if sum(map(size, choice)) <= budget
    )
    got = sum(loss(s, *bits[s.layer]) for s in found)
    assert got == pytest.approx(least, rel=1e-12, abs=1e-15)


def test_a_budget_below_two_bits_is_refused() -> None:
    found = [sensitivity(0, 1.0, 1.0), sensitivity(1, 1.0, 1.0)]
    for budget in (2 * 68 * 2 - 1, float("nan")):
        with pytest.raises(TQError, match="272"):
            propose_bits(found, {0: (2, 128), 1: (2, 128)}, budget)


# Report


def report(**changes: Any) -> Report:
    layer = LayerScores(0, 0.99, 0.9, 0.1, 0.98, 0.9, 0.2, 0.97, 0.9, 0.3)
    scores = summarize(
        [TokenScores(np.full(128, 0.01), np.ones(128, bool), np.ones(128), np.ones(128))]
    )
    base: dict[str, Any] = {
        "model": "m",
        "baseline": "fp16",
        "dataset": "builtin",
        "dtype": "float32",
        "cache": {"k_bits": 4, "v_bits": 4},
        "base_bytes_per_token": 512.0,
        "bytes_per_token": 132.0,
        "layers": [layer],
        "scores": scores,
        "tasks": [TaskCell("retrieval", 512, 0.5, 10, 1.0, 0.9)],
        "divergence": [3],
        "generated": 8,
        "limits": {},
        "versions": {},
        "seconds": 1.0,
    }
    return Report(**(base | changes))


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ({}, []),
        ({"kl": 0.01, "top1": 1.0, "perplexity": 0.0, "k_cosine": 0.99}, []),
        ({"kl": 0.009}, ["kl"]),
        ({"retrieval": 0.05, "v_cosine": 0.981, "out_cosine": 0.97}, ["retrieval", "v_cosine"]),
        ({"copy": 0.0}, []),
    ],
)
def test_thresholds(limits: dict[str, float], missed: list[str]) -> None:
    found = report(limits=limits)
    assert [line.split()[0] for line in found.failures()] == missed
    assert found.ratio == pytest.approx(512 / 132)
    assert json.loads(json.dumps(found.as_dict()))["failures"] == found.failures()


def test_a_number_that_is_none_misses_its_threshold() -> None:
    found = report(limits={"kl": 1.0})
    found = replace(found, scores=replace(found.scores, kl_mean=math.nan))
    assert len(found.failures()) == 1


def test_thresholds_are_read() -> None:
    assert parse_thresholds([]) == DEFAULT_THRESHOLDS
    assert parse_thresholds(["kl=0.5"]) == {**DEFAULT_THRESHOLDS, "kl": 0.5}
    assert parse_thresholds(["none", "top1=0.9"]) == {"top1": 0.9}
    for bad in ("kl", "kl=x", "speed=3", "kl=nan"):
        with pytest.raises(TQError, match="NAME=NUMBER"):
            parse_thresholds([bad])


# Texts


def test_windows_are_taken_from_the_texts_in_turn(single: Any) -> None:
    _, tokenizer = single
    texts = [held_out_text("humanize"), held_out_text("click")]
    found = token_windows(tokenizer, texts, 100, 4)
    assert [w.shape for w in found] == [(1, 101)] * 4
    one, two = (tokenizer.encode(t, add_special_tokens=False) for t in texts)
    assert start_token(tokenizer) == [0]
    assert found[0][0].tolist() == [0, *one[:100]]
    assert found[1][0].tolist() == [0, *two[:100]]
    assert found[2][0].tolist() == [0, *one[100:200]]
    (short,) = token_windows(tokenizer, ["a = 1\n"], 100, 4)
    assert short.shape[1] < 10
    with pytest.raises(TQError, match="fewer than 2"):
        token_windows(tokenizer, [""], 100, 4)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(TQError, match=r"empty\.txt"):
        read_texts(str(tmp_path / "empty.txt"))
    with pytest.raises(TQError, match=r"none\.txt"):
        read_texts(str(tmp_path / "none.txt"))
    with pytest.raises(TQError, match="folder"):
        load_any_model(str(tmp_path))
    with pytest.raises(TQError, match="int8"):
        load_any_model("tiny", dtype="int8")


def test_bytes_are_those_of_the_tensors(plain: Any) -> None:
    model, _ = plain
    ids = torch.zeros(1, 80, dtype=torch.long)
    cache = TurboQuantCache(model.config, 4, 3, skip_layers=[0])
    model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    assert history_bytes(cache.layers) == (2 * 512 + 2 * 116, 4 * 512)
    assert history_bytes(cache.layers[1:]) == (2 * 116, 2 * 512)


# The whole


def test_measure_on_a_small_model(plain: Any, windows: Any) -> None:
    model, tokenizer = plain
    steps: list[str] = []
    found = measure(
        model,
        tokenizer,
        windows,
        {"k_bits": 4, "v_bits": 3},
        name="small",
        limits={"kl": 10.0},
        tasks=False,
        sweep=True,
        budget=2 * 2 * 116,
        new_tokens=4,
        progress=lambda what, _: steps.append(what),
    )
    assert (found.bytes_per_token, found.base_bytes_per_token) == (2 * 2 * 116, 2 * 2 * 512)
    assert len(found.layers) == 2
    assert found.scores.tokens == 192
    assert len(found.divergence) == 2
    assert all(0 <= n <= 4 for n in found.divergence)
    assert found.layer_bits is not None
    cache = TurboQuantCache(model.config, layer_bits=found.layer_bits)
    cache.update(torch.zeros(1, 2, 80, 128), torch.zeros(1, 2, 80, 128), 0)
    cache.update(torch.zeros(1, 2, 80, 128), torch.zeros(1, 2, 80, 128), 1)
    assert history_bytes(cache.layers)[0] <= 2 * 2 * 116
    assert found.failures() == []
    assert set(steps) == {"layers", "predictions", "generation", "sweep"}


def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command("verify")(verify)
    made.command("calibrate")(calibrate)
    made.command("balance")(balance)
    return made


QUICK = ("--tokens", "128", "--windows", "1", "--no-tasks", "--generate", "0")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app(), list(arguments), env={"COLUMNS": "140"})


def test_a_model_with_large_key_biases_fails_and_is_rescued_by_centring(tmp_path: Path) -> None:
    centers = tmp_path / "centers.safetensors"
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    made = run(
        "calibrate", "tiny-large-bias", "--out", str(centers), "--windows", "1", "--tokens", "256"
    )
    assert made.exit_code == 0, made.output
    model = ("verify", "tiny-large-bias", "--preset", "tq3", *QUICK)
    lost = run(*model)
    assert lost.exit_code == 1, lost.output
    assert "missed: kl" in lost.output
    rescued = run(
        *model,
        "--key-center",
        str(centers),
        "--json",
        str(out),
        "--png",
        str(png),
        "--threshold",
        "none",
        "--threshold",
        "kl=0.1",
    )
    assert rescued.exit_code == 0, rescued.output
    numbers = json.loads(out.read_text())
    assert numbers["scores"]["kl_mean"] < 0.1
    assert numbers["cache"]["key_center"] is True
    assert numbers["bytes_per_token"] == 6 * 2 * 100
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_balanced_model_with_searched_codes(tmp_path: Path) -> None:
    folder, out = tmp_path / "balanced", tmp_path / "out.json"
    centers, metrics = (str(tmp_path / f"{name}.safetensors") for name in ("centers", "metrics"))
    small = ("--windows", "1", "--tokens", "256")
    command = ("balance", "tiny", str(folder), "--samples", "1")
    made = run(*command, *small)
    assert made.exit_code == 2, made.output
    assert "4096 in all" in made.output
    made = run(*command)
    assert made.exit_code == 0, made.output
    again = run(*command)
    assert again.exit_code == 2, again.output
    assert "not an empty folder" in again.output
    made = run("calibrate", str(folder), "--out", centers, "--metrics", metrics)
    assert made.exit_code == 0, made.output
    common = (*QUICK, "--k-bits", "3", "--v-bits", "3", "--json", str(out), "--threshold", "none")
    kl = []
    for arguments in (
        ("tiny",),
        (str(folder), "--key-center", centers, "--search", "--metrics", metrics),
    ):
        made = run("verify", *arguments, *common)
        assert made.exit_code == 0, made.output
        numbers = json.loads(out.read_text())
        kl.append(numbers["scores"]["kl_mean"])
    assert kl[1] < kl[0]
    assert numbers["cache"]["search"] is numbers["cache"]["metrics"] is True
    made = run("calibrate", "tiny-large-bias", "--dataset", "bias", "--metrics", metrics)
    assert made.exit_code == 2, made.output
    assert "--metrics needs text" in made.output


def test_what_a_sweep_proposes_can_be_run(tmp_path: Path) -> None:
    out, again = tmp_path / "sweep.json", tmp_path / "again.json"
    quick = ("--tokens", "128", "--windows", "1", "--no-tasks", "--generate", "0", "--chunk", "64")
    budget = 6 * 2 * 100
    swept = run("verify", "tiny", *quick, "--sweep", "--budget", str(budget), "--json", str(out))
    assert swept.exit_code == 0, swept.output
    bits = {int(i): tuple(pair) for i, pair in json.loads(out.read_text())["layer_bits"].items()}
    assert len(bits) == 6
    assert len(set(bits.values())) > 1
    shown = ",".join(f"{i}={k}/{v}" for i, (k, v) in bits.items())
    assert f"--layer-bits {shown}" in swept.output
    made = run("verify", "tiny", *quick, "--layer-bits", str(out), "--json", str(again))
    assert made.exit_code == 0, made.output
    numbers = json.loads(again.read_text())
    size = sum(2 * KVFormat(128, *pair).slot_bytes for pair in bits.values())
    assert numbers["bytes_per_token"] == size <= budget
    assert {int(i): tuple(pair) for i, pair in numbers["cache"]["layer_bits"].items()} == bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--preset", "tq4", "--k-bits", "4"), "not both"),
        (("tiny", "--preset", "tq9"), "tq9"),
        (("tiny", "--k-bits", "5"), "5"),
        (("tiny", "--budget", "900"), "--sweep"),
        (("tiny", "--threshold", "fast=1"), "NAME=NUMBER"),
        (("tiny", "--skip-layers", "a"), "--skip-layers"),
        (("tiny", "--layer-bits", "missing.json"), "missing.json"),
        (("tiny", "--layer-bits", "0=5"), "2, 3, 4 or 8"),
        (("tiny", "--layer-bits", "9=8/4"), "layer 9"),
        (("tiny", "--dataset", "missing.txt"), "missing.txt"),
        (("tiny", "--key-center", "missing.safetensors"), "tq calibrate"),
        (("tiny", "--search", "--metrics", "missing.safetensors"), "tq calibrate"),
        (("./missing/model",), "./missing/model"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], message: str) -> None:
    result = run("verify", *arguments, *QUICK)
    assert result.exit_code == 2, result.output
    assert message in result.output
