"""A small real training run in a process of its own, for a test to kill: python -m tests.train.killed_run '{"out": ...}'."""

from __future__ import annotations

import json
import sys

import torch

from fastlm.config import build
from fastlm.data import Loader
from fastlm.models import Transformer, TransformerConfig
from fastlm.train import TrainConfig, TrainResult, train

MODEL = TransformerConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_positions=16)
SETTINGS = {
    "steps": 40,
    "warmup": 4,
    "batch_size": 2,
    "context": 16,
    "accumulate": 2,
    "lr": 0.01,
    "min_lr": 0.001,
    "evaluate_every": 7,
    "evaluate_batches": 2,
    "checkpoint_every": 3,
    "log_every": 1,
    "device": "cpu",
}


def run(**changes) -> TrainResult:
    """Trains on 600 tokens, so that the run passes the ends of several epochs."""
    config = build(TrainConfig, SETTINGS, changes)
    torch.manual_seed(1)
    model = Transformer(MODEL)
    text = torch.randint(MODEL.vocab_size, (600,), generator=torch.Generator().manual_seed(2)).tolist()
    loaders = [
        Loader(part, batch_size=config.batch_size, context=config.context, seed=3) for part in (text, text[:100])
    ]
    return train(model, config, *loaders)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(**json.loads(sys.argv[1]))
