"""A model and data so small that a training run takes a fraction of a second."""

from __future__ import annotations

import dataclasses
import time

import torch

from fastlm.train import TrainConfig, read_metrics

VOCABULARY = 31


class TinyModel(torch.nn.Module):
    """Embedding, dropout, MLP with a norm, tied output: has a matrix, a vector, a tied weight and randomness."""

    def __init__(self, width=16, dropout=0.1):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)
        self.head = torch.nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))
        return self.head(x)

    def loss(self, tokens, labels, reduction="mean"):
        logits = self(tokens).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction=reduction)


@dataclasses.dataclass
class TinyBatch:
    tokens: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


class TinyLoader:
    """Endless batches that depend on the seed and the batch's number only; `length` ends them."""

    def __init__(self, seed=0, batch_size=4, context=8, length=None, pause=0.0):
        self.seed, self.shape, self.length, self.pause, self.position = seed, (batch_size, context), length, pause, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.length is not None and self.position >= self.length:
            raise StopIteration
        time.sleep(self.pause)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.position)
        start = torch.randint(VOCABULARY, (self.shape[0], 1), generator=generator)
        text = (start + 3 * torch.arange(self.shape[1] + 1)) % VOCABULARY
        labels = text[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100  # uneven numbers of live tokens
        index = torch.arange(self.shape[0]) + self.position * self.shape[0]
        self.position += 1
        return TinyBatch(text[:, :-1], labels, index)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def settings(out, **changes):
    """A short run's TrainConfig."""
    base = {"steps": 20, "warmup": 2, "context": 8, "batch_size": 4, "evaluate_every": 5, "evaluate_batches": 2}
    return TrainConfig(
        **{"out": str(out), "lr": 0.01, "min_lr": 0.001, "log_every": 1, "device": "cpu", **base, **changes}
    )


def make_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return TinyModel(**kwargs)


def losses(out):
    """step -> training loss, step -> validation loss, with every bit; a step that stands there twice is an error."""
    found = {"train": {}, "evaluation": {}}
    for record in read_metrics(out / "metrics.jsonl"):
        assert record["step"] not in found[record["kind"]]
        found[record["kind"]][record["step"]] = record["loss" if record["kind"] == "train" else "validation_loss"]
    return found["train"], found["evaluation"]
