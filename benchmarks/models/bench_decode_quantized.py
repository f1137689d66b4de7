"""`python -m benchmarks.models.bench_decode_quantized`: int8 and int4 weights decoding beside the model's own fp32, on a CPU.

Batch 1, steps of fastlm.generate.CpuDecoder behind a prompt of 16, at a vocabulary of 8192; every way decodes the same tokens, in
blocks taken in turns within one process, and the ratio is the median of the blocks' ratios. Errors are those of the logits
behind the prompt, relative to the largest; with --run (a folder of `fastlm demo` or `fastlm train`) also the perplexity of the
decoded logits on the validation split of that run's own data.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fastlm
from benchmarks.clock import quartiles, time_calls
from benchmarks.lines import Lines
from benchmarks.machine import machine
from fastlm import nn
from fastlm.data import open_split
from fastlm.generate import CpuDecoder
from fastlm.models import Transformer, preset

MODELS = ("llama-6x384", "gpt2-6x384")
# provider -> options of nn.quantize_
WAYS: dict[str, dict | None] = {
    "fp32": None,
    "int8": {"bits": 8},
    "int8 and head": {"bits": 8, "skip": (), "tied": True},
    "int4 of 32": {"bits": 4, "group_size": 32},
}
PROMPT, BLOCK = 16, 16


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.bench_decode_quantized", description=__doc__)
    parser.add_argument("--model", action="append", help=f"a preset (several allowed); default {', '.join(MODELS)}")
    parser.add_argument("--run", type=Path, help="a finished run, measured in place of presets with fresh weights")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=20.0, help="per model")
    parser.add_argument("--windows", type=int, default=16, help="validation windows to score")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to decode_quantized.jsonl there")
    options = parser.parse_args(argv)
    header = machine("cpu")
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))
    lines = Lines(options.out and options.out / "decode_quantized.jsonl", header)
    for name in [str(options.run)] if options.run else options.model or MODELS:
        for row in measure(name, options):
            loss = "" if row["perplexity"] is None else f"  perplexity {row['perplexity']:.3f}"
            print(
                f"{row['model']:14} {row['provider']:14} {row['us']:7,.0f} us/token ({row['q1']:.0f} - {row['q3']:.0f})  "
                f"{row['ratio']:5.2f}x  logits off by {row['error']:.2%}{loss}",
                flush=True,
            )
            lines.write([row])
    return 0


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """One row per way."""
    torch.manual_seed(0)
    if options.run:
        model = fastlm.load(options.run / "model").eval()
    else:
        model = Transformer(preset(name, vocab_size=options.vocab, max_positions=1024)).eval()
    models = {}
    for way, settings in WAYS.items():
        models[way] = copy.deepcopy(model)
        if settings is not None:
            nn.quantize_(models[way], **settings)
    steps = {way: stepper(m) for way, m in models.items()}
    logits = {way: step(0) for way, step in steps.items()}
    samples = time_calls([lambda s=step: s(BLOCK) for step in steps.values()], "cpu", options.seconds)
    rows = []
    for (way, m), times in zip(models.items(), samples):
        q1, median, q3 = (t * 1e3 / BLOCK for t in quartiles(times))
        ratio = quartiles([a / b for a, b in zip(samples[0], times)])[1]
        error = float((logits[way] - logits["fp32"]).abs().max() / logits["fp32"].abs().max())
        score = perplexity(m, options) if options.run else None
        size = {"model": Path(name).name, "vocab": model.config.vocab_size, "threads": torch.get_num_threads()}
        rows.append(
            {"kind": "decode_quantized", **size, "provider": way, "us": median, "q1": q1, "q3": q3, "ratio": ratio,
             "error": error, "perplexity": score}
        )  # fmt: skip
    return rows


@torch.no_grad()
def stepper(model: Transformer) -> Callable[[int], torch.Tensor]:
    """A call that decodes so many tokens behind the prompt, always from the same place; 0 for the logits of the next one."""
    prompt = torch.arange(PROMPT)[None] % model.config.vocab_size
    cache = model.make_cache(1, PROMPT + BLOCK + 1)
    model.hidden(prompt, cache=cache)
    decoder = CpuDecoder(model, [cache])
    row = decoder.rows[0]

    @torch.no_grad()
    def step(count: int) -> torch.Tensor:
        row.length, row.mask[PROMPT:] = PROMPT, -torch.inf
        for token in range(max(count, 1)):
            logits = decoder.step([token], [0])
        return logits

    return step


@torch.no_grad()
def perplexity(model: Transformer, options: argparse.Namespace) -> float:
    """Over the first windows of 256 tokens of the run's validation data, each decoded token by token."""
    store, loss, count = open_split(options.run / "data", "validation"), 0.0, 0
    length = min(model.config.max_positions, 256)
    for start in range(0, min(len(store) - 1, options.windows * length), length):
        tokens = np.empty(min(length + 1, len(store) - start), np.int64)
        store.read(start, start + len(tokens), tokens)
        cache = model.make_cache(1, length)
        model.hidden(torch.from_numpy(tokens)[None, :1], cache=cache)
        decoder = CpuDecoder(model, [cache])
        logits = torch.cat([decoder.step([token], [0]) for token in tokens[1:-1].tolist()])
        loss += float(F.cross_entropy(logits, torch.from_numpy(tokens)[2:], reduction="sum"))
        count += len(logits)
    return math.exp(loss / count)


if __name__ == "__main__":
    raise SystemExit(main())
