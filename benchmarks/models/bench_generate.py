"""Decode speed beside transformers' eager generate: same weights, shapes and dtype, taking turns in one process.

    python -m benchmarks.models.bench_generate [--repeats 5] [--json results.json]

128 new tokens after a prompt of 16, batch 1, greedy, vocabulary 8192: GPT-2 with 6 layers of 384 and Llama with 6 layers of 384
and 2 key/value heads. The rate is new tokens over the time of the whole call, prefill included. With equal fp32 or fp64
weights both must give the same tokens, or nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch

import fastlm

NEW, PROMPT, VOCABULARY = 128, 16, 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_pair(family: str, dtype: torch.dtype):
    """The same random model in transformers and here."""
    import transformers

    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 1024}
        config = transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **none)
    else:
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2}
        more = {"intermediate_size": 1024, "max_position_embeddings": 1024, "tie_word_embeddings": True}
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **more, **none)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, fastlm.load(folder)


def measure(family: str, dtype_name: str, repeats: int) -> dict:
    """One row of the table: tokens/s of both, medians of interleaved repeats."""
    theirs, ours = make_pair(family, DTYPES[dtype_name])
    prompt = torch.randint(VOCABULARY, (1, PROMPT))
    mask = torch.ones_like(prompt)
    runs = {
        "transformers": lambda: theirs.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False),
        "fastlm": lambda: ours.generate(prompt, NEW, temperature=0, eos_id=()),
        "fastlm, fast=False": lambda: ours.generate(prompt, NEW, temperature=0, eos_id=(), fast=False),
    }
    outputs = {name: run() for name, run in runs.items()}
    if dtype_name == "fp32" and not all(torch.equal(out, outputs["transformers"]) for out in outputs.values()):
        raise SystemExit(f"{family} {dtype_name}: the tokens differ; nothing measured")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: NEW / statistics.median(times) for name, times in seconds.items()}
    best = {name: NEW / min(times) for name, times in seconds.items()}
    ratio = rates["fastlm"] / rates["transformers"]
    return {"model": family, "dtype": dtype_name, "tokens_per_second": rates, "best": best, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for family in ("gpt2", "llama"):
        for dtype_name in DTYPES:
            row = measure(family, dtype_name, arguments.repeats)
            rows.append(row)
            rates = "  ".join(
                f"{name} {rate:.0f} (best {row['best'][name]:.0f})" for name, rate in row["tokens_per_second"].items()
            )
            print(f"{family:6} {dtype_name}  tokens/s: {rates}  ratio {row['ratio']:.2f}", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
