"""`python -m benchmarks.models.bench_train`: training steps of our models beside transformers', same weights, shapes and dtype.

A step is forward, loss, backward, and torch's fused AdamW for both. bf16 is autocast over fp32 weights for both. transformers
runs as it comes ("eager", with its default SDPA attention), without a cache, and with fastlm.nn.replace or Liger's kernels put
into it; --compile adds torch.compile of it and of ours. Steps are taken in turns within one process; the ratio is the median of
the turns' ratios. A provider that is missing, fails, or computes another loss or gradient gets no time but a reason.
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
from benchmarks.harness import failure
from benchmarks.lines import Lines
from benchmarks.machine import machine
from benchmarks.models.cost import train_flops
from benchmarks.peaks import rates as measured_rates
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
    parser.add_argument("--rates", type=Path, help="file of the machine's rates; measured and written if there is none")
    options = parser.parse_args(argv)
    batch, context = SHAPE[options.device]
    options.batch, options.context = options.batch or batch, options.context or context
    rates = measured_rates(options.device, options.rates)
    header = machine(options.device) | {name: round(value, 3) for name, value in rates.items()}
    print("  ".join(f"{k}: {v}" for k, v in header.items() if k != "kind"))
    lines = Lines(options.out and options.out / "train.jsonl", header)
    for name in options.model or MODELS[options.device]:
        for dtype in options.dtype or ("fp32", "bf16"):
            for row in measure(name, dtype, options, rates):
                lines.write([row])
                if "reason" in row:
                    print(f"{name:14} {dtype:5} {row['provider']:25} no time: {row['reason']}", flush=True)
                    continue
                memory = f"{row['peak_mb']:9,.0f} MiB" if row["peak_mb"] else ""
                print(
                    f"{row['model']:14} {row['dtype']:5} {row['provider']:25} {row['tokens_per_second']:9,.0f} tokens/s "
                    f"{row['ms']:9.1f} ms ({row['q1']:.1f} - {row['q3']:.1f})  {row['ratio']:5.2f}x"
                    f"  MFU {row['mfu']:4.0%}{memory}",
                    flush=True,
                )
    return 0


def measure(name: str, dtype: str, options: argparse.Namespace, rates: dict[str, float]) -> list[dict]:
    """One row per provider: its times, or the reason why it has none, such as a loss or gradient norm unlike transformers'.

    "mfu" is cost.train_flops over the time and the measured rate of a large product.
    """
    config = preset(name, max_positions=max(options.context, 1024))
    torch.manual_seed(0)
    text = torch.randint(config.vocab_size, (options.batch, options.context + 1), device=options.device)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    size = {"model": name, "dtype": dtype, "mode": options.mode, "batch": options.batch, "context": options.context}
    calls, rows, expected = {}, [], None
    with tempfile.TemporaryDirectory() as folder:
        Transformer(config).save_pretrained(folder)
        for provider, make in providers(folder, options).items():
            try:
                call = _Step(*make(), tokens, labels, dtype, options)
                found = call.loss_and_norm()
                expected = expected or found
                _check(found, expected, dtype)
                calls[provider] = call
            except Exception as error:  # whatever a foreign library throws is its row's text
                reason = f"missing: {error}" if isinstance(error, ImportError) else failure(error)
                rows.append({"kind": "no train", **size, "provider": provider, "reason": reason})
    samples = dict(zip(calls, time_calls(list(calls.values()), options.device, options.seconds)))
    flops = train_flops(config, options.batch, options.context)
    for provider, times in samples.items():
        q1, median, q3 = quartiles(times)
        ratio = quartiles([a / b for a, b in zip(samples[BASELINE], times)])[1]
        speed = {"ms": median, "q1": q1, "q3": q3, "tokens_per_second": tokens.numel() / median * 1e3, "ratio": ratio}
        speed["mfu"] = flops / median / 1e9 / rates[PEAK[dtype]]
        speed["peak_mb"] = peak_mb(calls[provider]) if options.device == "cuda" else None
        rows.append({"kind": "train", **size, "provider": provider, **speed})
    return rows


def _check(found: tuple[float, float], expected: tuple[float, float], dtype: str) -> None:
    """The gate. bf16 rounds each library's activations in other places."""
    for what, got, want in zip(("loss", "gradient norm"), found, expected):
        allowed = (1e-4 if dtype == "fp32" else 1e-2) * want
        assert abs(got - want) <= allowed, f"wrong: {what} {got}, {BASELINE} has {want}"


def providers(folder: str, options: argparse.Namespace) -> dict[str, Callable[[], tuple[torch.nn.Module, Callable]]]:
    """provider -> a function that makes (model, its loss of (tokens, labels)), all with the weights in `folder`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def with_loss(model: torch.nn.Module) -> tuple[torch.nn.Module, Callable]:
        model = model.to(options.device).train()
        return model, lambda x, y: model(x, labels=y, shift_labels=y, use_cache=False).loss

    def theirs():
        return with_loss(AutoModelForCausalLM.from_pretrained(folder))

    def replaced():
        model = AutoModelForCausalLM.from_pretrained(folder)
        fastlm.nn.replace(model, loss=True)
        return with_loss(model)

    def liger():
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        return with_loss(AutoLigerKernelForCausalLM.from_pretrained(folder))

    def mine():
        model = fastlm.load(folder, device=options.device).train()
        return model, model.loss

    def compiled(make: Callable) -> Callable:
        def build():
            model, loss = make()
            return model, torch.compile(loss)

        return build

    found = {BASELINE: theirs, "fastlm": mine, f"{BASELINE} + nn.replace": replaced, f"{BASELINE} + liger": liger}
    if options.compile:
        found |= {f"{BASELINE} compiled": compiled(theirs), "fastlm compiled": compiled(mine)}
    return found


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
