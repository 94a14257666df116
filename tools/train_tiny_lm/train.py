"""Train the project's own small language models from the Python environment it runs in.

``python tools/train_tiny_lm/train.py --out DIR`` builds the corpus and the tokenizer, and trains
both models until the time given by ``--seconds`` is over. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import corpus
import exercises
from muon import Muon
from network import CausalLM, Shape, set_large_key_biases

SHAPES = {
    "tiny": Shape(),
    "tiny-large-bias": Shape(bias=True, rope_theta=1_000_000.0),
}


class Batches:
    """Random windows of the corpus mixed with generated exercises, on one device."""

    def __init__(
        self, folder: Path, context: int, device: torch.device, share: float, seed: int
    ) -> None:
        code = np.load(folder / "train.npy")
        held = np.load(folder / "held_out.npy")
        drills = np.load(folder / "exercises.npy")
        self.code = torch.from_numpy(code.astype(np.int16)).to(device)
        self.drills = torch.from_numpy(drills[:, : context + 1].astype(np.int16)).to(device)
        self.held = torch.from_numpy(held.astype(np.int64)).to(device)
        self.context, self.share, self.device = context, share, device
        self.generator = torch.Generator().manual_seed(seed)

    def train(self, size: int) -> Tensor:
        """Return int64 [size, context + 1]."""
        drills = round(size * self.share)
        starts = torch.randint(
            0, self.code.numel() - self.context - 1, (size - drills,), generator=self.generator
        )
        window = torch.arange(self.context + 1)
        rows = self.code[(starts[:, None] + window).to(self.device)]
        picks = torch.randint(0, len(self.drills), (drills,), generator=self.generator)
        return torch.cat((rows, self.drills[picks.to(self.device)])).long()

    def validation(self, size: int) -> Tensor:
        """Return fixed windows, evenly spaced over the held-out packages."""
        starts = torch.linspace(0, self.held.numel() - self.context - 2, size).long()
        window = torch.arange(self.context + 1)
        return self.held[(starts[:, None] + window).to(self.device)]


def train_model(name: str, folder: Path, out: Path, options: argparse.Namespace) -> None:
    """Train one model and write its weights, config and loss curve to ``out``."""
    shape = SHAPES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    batches = Batches(folder, shape.context, device, options.exercise_share, options.seed)
    model = CausalLM(shape, options.seed)
    if shape.bias:
        set_large_key_biases(model, options.seed)
    start_bias = key_biases(model)
    model.to(device)
    inner = model.model.layers
    matrices = [p for p in inner.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = Muon(matrices, lr=options.matrix_lr)
    adam = torch.optim.AdamW(
        others, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    base = [(group, group["lr"]) for o in (muon, adam) for group in o.param_groups]
    step_loss: Any = model
    if options.compile:
        torch._dynamo.config.suppress_errors = True
        step_loss = torch.compile(model)
    validation = batches.validation(options.batch)
    curve: list[dict[str, float]] = []
    began = time.time()
    stop_at = options.stop_at or began + options.seconds
    step, progress, clock = 0, 0.0, began
    while True:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = step_loss(batches.train(options.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = min(1.0, (step + 1) / options.warmup)
        factor = warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group, lr in base:
            group["lr"] = lr * factor
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step == 10:
            float(loss.detach())
            clock = time.time()
        if step % 5 == 0:
            if options.steps:
                progress = step / options.steps
            elif step >= 10:
                progress = (time.time() - clock) / max(1.0, stop_at - clock)
        done = progress >= 1.0
        if step == 1 or step % options.log_every == 0 or done:
            point = {"step": step, "seconds": round(time.time() - began, 2), "lr_factor": factor}
            point["train_loss"] = float(loss.detach())
            if step == 1 or step % (options.log_every * 5) == 0 or done:
                with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
                    point["held_out_loss"] = float(model(validation))
            if not math.isfinite(point["train_loss"]):
                raise RuntimeError(f"loss {point['train_loss']} at step {step}; lower --matrix-lr")
            curve.append(point)
            if step % (options.log_every * 5) == 0 or done:
                print(name, json.dumps(point), flush=True)
        if done:
            break
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    report: dict[str, Any] = {
        "model": name,
        "config": shape.hf_config(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens_per_step": options.batch * shape.context,
        "tokens": step * options.batch * shape.context,
        "seconds": round(time.time() - began, 1),
        "exercise_share": round(options.batch * options.exercise_share) / options.batch,
        "optimizer": {
            "matrices": f"Muon, lr {options.matrix_lr}, momentum 0.95, weight decay 0.05",
            "others": f"AdamW, lr {options.lr}, betas 0.9 and 0.95",
            "schedule": f"{options.warmup} steps of warm-up, then cosine to 1%",
            "clip": 1.0,
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "key_bias": {"start": start_bias, "end": key_biases(model)},
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(report) + "\n", encoding="utf-8")


def key_biases(model: CausalLM) -> dict[str, Any] | None:
    """Return the largest and the root-mean-square key bias of each layer."""
    biases = [p.detach().float().cpu() for n, p in model.named_parameters() if "k_proj.bias" in n]
    if not biases:
        return None
    return {
        "largest": [round(float(b.abs().max()), 3) for b in biases],
        "rms": [round(float(b.pow(2).mean().sqrt()), 3) for b in biases],
        "channels_above_10": [int((b.abs() > 10).sum()) for b in biases],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results")
    add("--work", type=Path, help="folder for the corpus (default: OUT/corpus)")
    add("--model", choices=[*SHAPES, "both"], default="both", help="both train side by side")
    add("--seconds", type=float, default=400, help="wall clock for everything, corpus included")
    add("--steps", type=int, default=0, help="train this many steps instead of by the clock")
    add("--batch", type=int, default=16, help="sequences a step")
    add("--lr", type=float, default=3e-3, help="AdamW: embedding, norms and biases")
    add("--matrix-lr", type=float, default=0.02, help="Muon: weight matrices")
    add("--warmup", type=int, default=60)
    add("--log-every", type=int, default=10)
    add("--exercises", type=int, default=12_000, help="generated sequences")
    add("--exercise-share", type=float, default=0.25, help="part of each batch")
    add("--package-limit", type=int, default=25_000_000, help="characters from one package")
    add("--total-limit", type=int, default=400_000_000, help="characters of training text")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="use torch.compile")
    add("--stop-at", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    options = parse(arguments)
    began = time.time()
    options.stop_at = options.stop_at or began + options.seconds
    work: Path = options.work or options.out / "corpus"
    options.out.mkdir(parents=True, exist_ok=True)
    if not (work / "exercises.npy").exists():
        report = corpus.build(work, options.package_limit, options.total_limit)
        print(f"corpus: {report['train_tokens']} tokens, {time.time() - began:.0f} s", flush=True)
        context = max(shape.context for shape in SHAPES.values())
        np.save(work / "exercises.npy", exercises.build(work, options.exercises, context + 1))
        print(f"exercises: {time.time() - began:.0f} s", flush=True)
    for name in ("tokenizer.json", "held_out.json", "corpus.json"):
        shutil.copyfile(work / name, options.out / name)
    if options.model != "both":
        train_model(options.model, work, options.out / options.model, options)
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    extra = ["--work", str(work), "--stop-at", str(options.stop_at)]
    jobs = [
        subprocess.Popen([sys.executable, __file__, *given, *extra, "--model", name])
        for name in SHAPES
    ]
    return max(job.wait() for job in jobs)


if __name__ == "__main__":
    raise SystemExit(main())
