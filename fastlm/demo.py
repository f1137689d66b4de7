"""`fastlm demo`: from raw text to samples in about three minutes on a CPU, with no network."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from fastlm.data import DataConfig, standard_library_sources
from fastlm.evaluate import gzip_bits_per_byte
from fastlm.generate import complete
from fastlm.runs import evaluate_run, load_model, prepare_data, start_run
from fastlm.train import TrainConfig, write_report

PRESET = "llama-4x192"
PROMPTS = ("def ", "class Reader:\n", "import os\n")
SAMPLE_TOKENS = 160


def run(out: Path, seconds: float = 100.0) -> dict[str, float]:
    """Prepares the standard library's source, trains, evaluates against gzip, samples, writes report.html.

    Args:
        out: folder for data/, checkpoints/, model/, metrics.jsonl, loss.png, report.html; an earlier demo there is replaced.
        seconds: wall time of the training.

    Returns:
        The figures printed last: model and gzip bits per byte, top-1 accuracy, tokens per second.
    """
    began = time.monotonic()
    sources = standard_library_sources()
    print(
        f"[1/4] Data: {len(sources.train)} files of Python's standard library, {len(sources.validation)} more held out"
    )
    prepare_data(
        DataConfig(
            sources=sources.train,
            validation_sources=sources.validation,
            output=str(out / "data"),
            vocab_size=1024,
            append_eos="always",
            tokenizer_sample_mb=4.0,
        )
    )
    device = "a GPU, on Triton kernels" if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"\n[2/4] Training {PRESET} for {seconds:.0f} s on {device}")
    result = start_run(_settings(out, seconds), {}, preset=PRESET)

    print("\n[3/4] Evaluation on the held-out files")
    score = evaluate_run(str(out), sources.validation, None, "", None, 16, "bf16")
    gzip = gzip_bits_per_byte(sources.validation)
    print(score)
    verdict = "better" if score.bits_per_byte < gzip else "worse"
    print(f"bits per byte: model {score.bits_per_byte:.3f}, gzip -9 {gzip:.3f} on the same files: {verdict} than gzip")

    print("\n[4/4] Samples, temperature 0.7, top-p 0.95")
    samples = _samples(out)
    for prompt, text in samples:
        print(f"--- {prompt!r}\n{prompt}{text}")
    figures = {
        "model bits per byte": score.bits_per_byte,
        "gzip -9 bits per byte": gzip,
        "top-1 accuracy": score.top1_accuracy,
        "training tokens per second": result.tokens / result.seconds,
    }
    page = write_report(
        out,
        title="fastlm demo",
        summary=f"A Llama-style model of preset {PRESET}, trained for {result.seconds:.0f} seconds on the source of Python's "
        "standard library and evaluated on files it has not seen.",
        tables={"Held-out files": figures, "Evaluation": score.to_dict()},
        samples=samples,
    )
    print(f"\nDone in {time.monotonic() - began:.0f} s. Report: {page}  Model: {out / 'model'}")
    print(f'Go on with: fastlm generate {out} --prompt "def "')
    return figures


def _settings(out: Path, seconds: float) -> TrainConfig:
    return TrainConfig(
        data=str(out / "data"),
        out=str(out),
        overwrite=True,
        steps=None,
        max_seconds=seconds,
        batch_size=8,
        context=256,
        lr=3e-3,
        min_lr=1e-4,
        warmup=50,
        precision="bf16",
        evaluate_every=100,
        evaluate_batches=8,
        checkpoint_every=0,
        log_every=10,
    )


def _samples(out: Path) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs of the trained model."""
    model, tokenizer = load_model(out)
    options = {"temperature": 0.7, "top_p": 0.95}
    return [(p, complete(model, tokenizer, p, SAMPLE_TOKENS, seed=i, **options)) for i, p in enumerate(PROMPTS)]
