"""`python -m benchmarks.models.bench_generate`: decoding beside transformers' eager generate, same weights, shapes and dtype.

Greedy, batch 1: 128 new tokens after a prompt of 16; bf16 means bf16 weights for both. The time is that of the whole call,
prefill included. Calls are taken in turns within one process and the ratio is the median of the turns' ratios. In fp32 all must
give the same tokens, or nothing is timed. In bf16 rounding differs and fresh weights have many near ties: the row says how many
tokens agree before the first that does not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import fastlm
from benchmarks.clock import quartiles, time_calls
from benchmarks.lines import Lines
from benchmarks.machine import machine
from benchmarks.models.cost import decode_bytes
from benchmarks.peaks import rates as measured_rates
from fastlm.models import Transformer, preset

MODELS = {"cpu": ("gpt2-6x384", "llama-6x384"), "cuda": ("gpt2", "llama-3.2-1b")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE = "transformers"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.bench_generate", description=__doc__)
    parser.add_argument("--model", action="append", help=f"a preset (several allowed); default {MODELS}")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default both")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="per model and dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to generate.jsonl there")
    parser.add_argument("--rates", type=Path, help="file of the machine's rates; measured and written if there is none")
    options = parser.parse_args(argv)
    rates = measured_rates(options.device, options.rates)
    header = machine(options.device) | {name: round(value, 3) for name, value in rates.items()}
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))
    lines = Lines(options.out and options.out / "generate.jsonl", header)
    for name in options.model or MODELS[options.device]:
        for dtype in options.dtype or DTYPES:
            for row in measure(name, dtype, options, rates):
                print(
                    f"{row['model']:14} {row['dtype']:5} {row['provider']:18} {row['tokens_per_second']:7,.0f} tokens/s "
                    f"{row['ms']:8.1f} ms ({row['q1']:.1f} - {row['q3']:.1f})  {row['ratio']:5.2f}x  "
                    f"{row['share']:4.0%} of copy rate  "
                    f"{row['same']} of {options.new} tokens as {BASELINE}",
                    flush=True,
                )
                lines.write([row])
    return 0


def measure(name: str, dtype: str, options: argparse.Namespace, rates: dict[str, float]) -> list[dict]:
    """One row per provider; "share" is cost.decode_bytes over the time and the measured rate of a copy.

    Raises AssertionError if a provider's fp32 tokens differ from transformers'.
    """
    torch.manual_seed(0)
    calls = providers(name, DTYPES[dtype], options)
    texts = {provider: call()[0].tolist()[options.prompt :] for provider, call in calls.items()}
    same = {provider: _agreement(text, texts[BASELINE]) for provider, text in texts.items()}
    if dtype == "fp32":
        assert all(n == options.new for n in same.values()), f"{name}: tokens that agree with {BASELINE}: {same}"
    samples = dict(zip(calls, time_calls(list(calls.values()), options.device, options.seconds)))
    config, length = preset(name), options.prompt + options.new // 2
    read = decode_bytes(config, torch.empty((), dtype=DTYPES[dtype]).element_size(), length)
    rows = []
    for provider, times in samples.items():
        q1, median, q3 = quartiles(times)
        ratio = quartiles([a / b for a, b in zip(samples[BASELINE], times)])[1]
        size = {"model": name, "dtype": dtype, "prompt": options.prompt, "new": options.new}
        speed = {"ms": median, "q1": q1, "q3": q3, "tokens_per_second": options.new / median * 1e3, "ratio": ratio}
        speed["share"] = options.new * read / median / 1e6 / rates["copy_gbps"]
        rows.append({"kind": "generate", **size, "provider": provider, "same": same[provider], **speed})
    return rows


def providers(name: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Callable]:
    """provider -> a call that generates, all with the same weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = preset(name, max_positions=max(options.prompt + options.new, 1024))
    with tempfile.TemporaryDirectory() as folder:
        Transformer(config).to(dtype).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
        ours = fastlm.load(folder, device=options.device)
    prompt = torch.randint(config.vocab_size, (1, options.prompt), device=options.device)
    theirs.generation_config.eos_token_id = None
    mask, eager = torch.ones_like(prompt), {"do_sample": False, "max_new_tokens": options.new}
    calls = {
        BASELINE: lambda: theirs.generate(prompt, attention_mask=mask, **eager),
        "fastlm": lambda: ours.generate(prompt, options.new, temperature=0, eos_id=()),
    }
    if options.device == "cpu":
        calls["fastlm fast=False"] = lambda: ours.generate(prompt, options.new, temperature=0, eos_id=(), fast=False)
    return calls


def _agreement(ours: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    raise SystemExit(main())
