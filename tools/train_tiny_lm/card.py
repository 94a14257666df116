"""Write the model cards and the loss plots of ``tq_hf.models`` from the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MODELS = HERE.parents[1] / "packages" / "tq-hf" / "src" / "tq_hf" / "models"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def notes(name: str) -> list[str]:
    """Return what must be known to read the quantization table of ``tiny``."""
    if name != "tiny":
        return []
    control = json.loads((RESULTS / "tiny-controls.json").read_text())
    text = (
        "Read this table with care: quantized rows can lie below the exact one, and the order of "
        "plain and centred rows is not regular. Two controls: exact keys shrunk by "
        f"{control['factor']:.3f}, the mean shrinkage of a 3-bit reconstruction, give "
        f"{control['exact_shrunk']['perplexity']:.3f}, so softer attention alone lowers this "
        "model's perplexity; plain 3-bit keys stretched by the inverse give "
        f"{control['plain_3_stretched']['perplexity']:.3f}, so shrinkage is at most part of the "
        "explanation, which is not established. Differences of a few percent on this model do "
        "not rank quantizers; compare its outputs with the exact model's instead."
    )
    return [text]


def card(name: str) -> str:
    """Return the model card of a model."""
    training = json.loads((RESULTS / f"{name}-training.json").read_text())
    quality = json.loads((RESULTS / f"{name}-quality.json").read_text())
    corpus = json.loads((RESULTS / "corpus.json").read_text())
    config = training["config"]
    held = quality["held_out"]
    used = [row for row in corpus["packages"] if row["files"]]
    curve = training["curve"]
    picks = [curve[round(i * (len(curve) - 1) / 9)] for i in range(10)]
    keys = quality["key_quantization"]
    parts = [
        f"# {name}",
        (
            f"A {config['architectures'][0]} of {training['parameters']:,} parameters, trained by "
            "`tools/train_tiny_lm` on Python source code and documentation, so that the quality of "
            "a compressed cache can be measured offline. It completes Python-like text and recalls "
            "definitions from its context; it is no assistant and knows few facts."
        ),
        (
            "This file is written by `tools/train_tiny_lm/card.py` from the files in "
            "`tools/train_tiny_lm/results`."
        ),
        "## Shape",
        table(
            ["layers", "hidden", "feed-forward", "query heads", "key-value heads", "head dim"]
            + ["context", "RoPE base", "vocabulary"],
            [
                [config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")]
                + [config["num_attention_heads"], config["num_key_value_heads"]]
                + [config["head_dim"], config["max_position_embeddings"]]
                + [config["rope_theta"], config["vocab_size"]]
            ],
        ),
    ]
    bias = training["key_bias"]
    if bias["end"]:
        parts += [
            (
                "Each key head was given eight biases of magnitude 30 to 150 on channels of slow "
                "rotary frequencies before training, and all biases were trained with the rest. A "
                "constant added to all keys changes no attention weight, so training leaves such "
                "biases nearly where they were. They are built in: they imitate a property of "
                "published Qwen2 models and did not arise by themselves."
            ),
            table(
                ["layer", "largest at the start", "largest at the end", "RMS at the end"]
                + ["channels above 10"],
                [
                    [i, bias["start"]["largest"][i], bias["end"]["largest"][i]]
                    + [bias["end"]["rms"][i], bias["end"]["channels_above_10"][i]]
                    for i in range(config["num_hidden_layers"])
                ],
            ),
        ]
    parts += [
        "## Training",
        (
            f"{training['steps']:,} steps of {training['tokens_per_step']:,} tokens "
            f"({training['tokens'] / 1e6:.0f} M tokens) in {training['seconds']:.0f} s on one "
            f"{training['device']} that trained both models at once, PyTorch {training['torch']}, "
            f"bfloat16 autocast. Matrices: {training['optimizer']['matrices']}; the rest: "
            f"{training['optimizer']['others']}; {training['optimizer']['schedule']}; gradient norm "
            f"clipped at {training['optimizer']['clip']}. {training['exercise_share']:.0%} of the "
            "sequences are generated: definitions scattered among real code and used later, and "
            "repeated runs of tokens. The learning rate follows the clock, so a rerun takes "
            "another number of steps."
        ),
        (
            f"The corpus has {corpus['train_characters'] / 1e6:.0f} M characters "
            f"({corpus['train_tokens'] / 1e6:.1f} M tokens), so the code was seen about "
            f"{training['tokens'] * (1 - training['exercise_share']) / corpus['train_tokens']:.1f} "
            "times."
        ),
        "![loss](loss.png)",
        table(
            ["step", "training loss (nats a token)", "held-out loss"],
            [
                [p["step"], f"{p['train_loss']:.3f}", f"{p.get('held_out_loss', float('nan')):.3f}"]
                for p in picks
            ],
        ),
        "## Quality",
        (
            f"On the held-out text of this package ({held['tokens']:,} tokens, {held['bytes']:,} "
            f"bytes): perplexity {held['perplexity']:.3f} a token, {held['bits_per_byte']:.3f} bits "
            "per byte."
        ),
        table(
            ["predictor", "bits per byte"],
            [[name, f"{held['bits_per_byte']:.3f}"]]
            + [[k, f"{v:.3f}"] for k, v in quality["compressors_bits_per_byte"].items()],
        ),
        (
            f"Retrieval: `NAME_ABCD = 1234` asked for again after a distance, among "
            f"{quality['retrieval']['definitions']} definitions "
            f"({quality['retrieval']['prompts']} prompts a distance; guessing one of the values in "
            f"the prompt gives {1 / quality['retrieval']['definitions']:.2f}). Names are disjoint "
            "from those of training; the form of the lines is one of those trained on."
        ),
        table(
            ["distance (tokens)", *quality["retrieval"]["accuracy"]],
            [["accuracy", *(f"{v:.3f}" for v in quality["retrieval"]["accuracy"].values())]],
        ),
        "## Keys under quantization",
        (
            f"Perplexity with keys rotated (Hadamard) and rounded to the Lloyd-Max codebook, values "
            f"exact, over {keys['exact']['tokens']:,} held-out tokens; 'centred' subtracts the mean "
            f"key of each head first, taken from the held-out text of {keys['calibration']}, which "
            "is not in the measurement."
        ),
        table(
            ["key bits", "plain", "centred"],
            [["16", f"{keys['exact']['perplexity']:.3f}", f"{keys['exact']['perplexity']:.3f}"]]
            + [
                [b, f"{keys[f'plain_{b}']['perplexity']:.3f}"]
                + [f"{keys[f'centred_{b}']['perplexity']:.3f}"]
                for b in (4, 3, 2)
            ],
        ),
        *notes(name),
        "## Data",
        (
            f"Files of {len(used)} packages in the training machine's Python "
            f"{corpus['python']} environment, under permissive licences only. Packages marked "
            "held-out were not trained on; "
            f"{len(corpus['left_out_as_similar_to_held_out'])} training files were left out because "
            "over a fifth of their long lines also occur in a held-out package."
        ),
        table(
            ["package", "version", "licence", "split", "files", "characters"],
            [
                [r["package"], r["version"], r["licence"], r["split"], r["files"]]
                + [f"{r['characters']:,}"]
                for r in used
            ],
        ),
        "## Limits",
        (
            "The split is by package, but style and idioms are shared across Python packages, and "
            "a short passage of a held-out package may occur elsewhere. The context is "
            f"{config['max_position_embeddings']} tokens; beyond it nothing was trained."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot(name: str, path: Path) -> None:
    """Draw the loss curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = json.loads((RESULTS / f"{name}-training.json").read_text())["curve"]
    figure, axes = pyplot.subplots(figsize=(5.5, 3.2))
    axes.plot([p["step"] for p in curve], [p["train_loss"] for p in curve], lw=0.7, label="train")
    held = [p for p in curve if "held_out_loss" in p]
    axes.plot([p["step"] for p in held], [p["held_out_loss"] for p in held], label="held out")
    axes.set(xlabel="step", ylabel="nats a token", ylim=(0.9, 4.0), title=name)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> int:
    """Write the cards; with ``--check`` only tell whether they are up to date."""
    stale = 0
    for name in ("tiny", "tiny-large-bias"):
        path = MODELS / name / "MODEL_CARD.md"
        if "--check" in sys.argv[1:]:
            stale += path.read_text(encoding="utf-8") != card(name)
        else:
            path.write_text(card(name), encoding="utf-8")
            plot(name, MODELS / name / "loss.png")
    return int(stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
