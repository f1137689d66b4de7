"""`python -m benchmarks.models.bench_train`: training steps of our models beside transformers', same weights, shapes and dtype.

A step is forward, loss, backward, and torch's fused AdamW for both. bf16 is autocast over fp32 weights for both. transformers
runs as it comes ("eager", with its default SDPA attention), without a cache; --compile adds torch.compile of either. Steps are
taken in turns within one process; the ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastlm
from benchmarks.clock import peak_mb, quartiles, time_calls
from benchmarks.lines import Lines
from benchmarks.machine import machine
from benchmarks.models.cost import train_flops
from benchmarks.peaks import peaks
from fastlm.models import Transformer, preset

MODELS = {"cpu": ("gpt2-6x384", "llama-6x384"), "cuda": ("gpt2", "llama-3.2-1b")}
SHAPE = {"cpu": (4, 256), "cuda": (8, 1024)}  # batch, context
PEAK = {"fp32": "float32_tflops", "bf16": "bfloat16_tflops"}
BASELINE = "transformers"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.bench_train", description=__doc__)
    parser.add_argument("--model", action="append", help=f"a preset (several allowed); default {MODELS}")
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"), help="default both")
    parser.add_argument("--batch", type=int, help="default 4, on a GPU 8")
    parser.add_argument("--context", type=int, help="default 256, on a GPU 1024")
    parser.add_argument("--compile", action="store_true", help="also time both compiled; takes minutes")
    parser.add_argument("--mode", choices=("step", "backward"), default="step", help="backward leaves AdamW out")
    parser.add_argument("--seconds", type=float, default=40.0, help="per model and dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder; rows are appended to train.jsonl there")
    options = parser.parse_args(argv)
    batch, context = SHAPE[options.device]
    options.batch, options.context = options.batch or batch, options.context or context
    rates = peaks((torch.float32, torch.bfloat16), options.device)
    header = machine(options.device) | {name: round(value, 3) for name, value in rates.items()}
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))
    lines = Lines(options.out and options.out / "train.jsonl", header)
    for name in options.model or MODELS[options.device]:
        for dtype in options.dtype or ("fp32", "bf16"):
            for row in measure(name, dtype, options, rates):
                memory = f"{row['peak_mb']:9,.0f} MiB" if row["peak_mb"] else ""
                print(
                    f"{row['model']:14} {row['dtype']:5} {row['provider']:22} {row['tokens_per_second']:9,.0f} tokens/s "
                    f"{row['ms']:9.1f} ms ({row['q1']:.1f} - {row['q3']:.1f})  {row['ratio']:5.2f}x"
                    f"  MFU {row['mfu']:4.0%}{memory}",
                    flush=True,
                )
                lines.write([row])
    return 0


def measure(name: str, dtype: str, options: argparse.Namespace, rates: dict[str, float]) -> list[dict]:
    """One row per provider; "mfu" is cost.train_flops over the time and the measured rate of a large product.

    Raises AssertionError if a provider's loss or gradient norm differs from transformers'.
    """
    config = preset(name, max_positions=max(options.context, 1024))
    torch.manual_seed(0)
    text = torch.randint(config.vocab_size, (options.batch, options.context + 1), device=options.device)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    losses = _losses(Transformer(config), options.compile, options.device)
    calls = {provider: _Step(*pair, tokens, labels, dtype, options) for provider, pair in losses.items()}
    expected = calls[BASELINE].loss_and_norm()
    for provider, call in calls.items():
        for got, want in zip(call.loss_and_norm(), expected):
            allowed = (1e-4 if dtype == "fp32" else 1e-2) * want
            assert abs(got - want) <= allowed, f"{name} {dtype} {provider}: {got}, {BASELINE} has {want}"
    samples = dict(zip(calls, time_calls(list(calls.values()), options.device, options.seconds)))
    flops = train_flops(config, options.batch, options.context)
    rows = []
    for provider, times in samples.items():
        q1, median, q3 = quartiles(times)
        ratio = quartiles([a / b for a, b in zip(samples[BASELINE], times)])[1]
        size = {"model": name, "dtype": dtype, "mode": options.mode, "batch": options.batch, "context": options.context}
        speed = {"ms": median, "q1": q1, "q3": q3, "tokens_per_second": tokens.numel() / median * 1e3, "ratio": ratio}
        speed["mfu"] = flops / median / 1e9 / rates[PEAK[dtype]]
        speed["peak_mb"] = peak_mb(calls[provider]) if options.device == "cuda" else None
        rows.append({"kind": "train", **size, "provider": provider, **speed})
    return rows


def _losses(ours: Transformer, compile: bool, device: str) -> dict[str, tuple[torch.nn.Module, Callable]]:
    """provider -> (model, its loss of (tokens, labels)), all with the weights of `ours`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)

        def theirs() -> tuple[torch.nn.Module, Callable]:
            model = AutoModelForCausalLM.from_pretrained(folder).to(device).train()
            return model, lambda x, y: model(x, labels=y, shift_labels=y, use_cache=False).loss

        def mine() -> tuple[torch.nn.Module, Callable]:
            model = fastlm.load(folder, device=device).train()
            return model, model.loss

        providers = {BASELINE: theirs(), "fastlm": mine()}
        if compile:
            for name, make in ((f"{BASELINE} compiled", theirs), ("fastlm compiled", mine)):
                model, loss = make()
                providers[name] = (model, torch.compile(loss))
    return providers


class _Step:
    """One training step of one provider, to be called again and again."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable,
        tokens: Tensor,
        labels: Tensor,
        dtype: str,
        options: argparse.Namespace,
    ) -> None:
        self.model, self.loss, self.tokens, self.labels = model, loss, tokens, labels
        self.autocast, self.device = dtype == "bf16", options.device
        self.optimizer = None
        if options.mode == "step":
            self.optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.1, fused=True)

    def backward(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.tokens, self.labels)
        loss.backward()
        return loss.detach()

    def loss_and_norm(self) -> tuple[float, float]:
        """What the provider computes, to be equal everywhere before anything is timed."""
        loss = self.backward().item()
        return loss, torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()


if __name__ == "__main__":
    raise SystemExit(main())
