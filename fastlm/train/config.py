"""What a training run is told: one frozen dataclass, from which the flags of `fastlm train` derive."""

from __future__ import annotations

import dataclasses

from fastlm.config import option
from fastlm.errors import UserError
from fastlm.optim import SCHEDULES
from fastlm.optim.state import PRECISIONS

# The optimizers, each with the defaults of those settings that not all of them use.
HYPERPARAMETERS = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
    "lion": {"betas": (0.9, 0.99)},
    "sgd": {"momentum": 0.9},
    "muon": {"betas": (0.9, 0.95), "momentum": 0.9, "eps": 1e-10},
}
OPTIMIZERS = tuple(HYPERPARAMETERS)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Raises UserError for a value out of range."""

    data: str = option("", "folder made by `fastlm data prepare`")
    out: str = option("runs/train", "folder for checkpoints, metrics.jsonl, loss.png and the model")
    resume: bool = option(False, "continue from the newest valid checkpoint in the out folder")
    overwrite: bool = option(False, "delete an earlier run in the out folder first")

    steps: int | None = option(None, "optimizer steps; none for 1000, or for as many as max_seconds allows")
    max_seconds: float | None = option(
        None, "stop after this many seconds of wall time; the schedule then ends with the time"
    )
    batch_size: int = option(8, "sequences in one forward pass")
    context: int = option(256, "tokens in one sequence")
    accumulate: int = option(1, "forward passes summed into one step; the loss is the mean over all their live tokens")

    lr: float = option(1e-3, "peak learning rate")
    min_lr: float = option(1e-4, "learning rate at the end of the schedule")
    schedule: str = option("cosine", "how the learning rate falls after the warm-up", choices=tuple(SCHEDULES))
    warmup: int = option(100, "steps of linear warm-up")
    decay: float = option(0.1, "wsd: share of the steps, at the end, in which the learning rate falls")
    optimizer: str = option("adamw", "what makes the step; muon: hidden matrices, AdamW the rest", choices=OPTIMIZERS)
    betas: tuple[float, float] | None = option(
        None, "adamw, lion, muon's AdamW: decay rates of the moments; none for 0.9 and 0.95, with lion 0.9 and 0.99"
    )
    momentum: float | None = option(None, "sgd and muon: decay rate of the momentum; none for 0.9")
    eps: float | None = option(None, "adamw, and muon's AdamW: epsilon; none for 1e-8, with muon 1e-10")
    weight_decay: float = option(
        0.1, "of matrices; norms and biases have none; decoupled, but with sgd inside the gradient"
    )
    clip: float = option(1.0, "largest global gradient norm; 0 switches clipping off")
    optimizer_precision: str = option(
        "nearest", "how 16-bit weights keep what rounding cuts off; fp32 ones do not ask", choices=PRECISIONS
    )
    state_bits: int | None = option(
        None, "32 or 8: bits of an element of the optimizer's moments; none for the weights' own"
    )
    average_decay: float | None = option(
        None, "keep a moving average of the weights, evaluate and save that; such as 0.999"
    )

    precision: str = option("fp32", "bf16: autocast over fp32 weights", choices=("fp32", "bf16"))
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about a third more work"
    )
    compile: bool = option(False, "torch.compile the loss: a slow first step, then faster ones")
    device: str = option("auto", "cuda, cuda:1, cpu, or auto for a GPU where there is one")
    seed: int = option(0, "seed of everything random while training (dropout)")

    evaluate_every: int = option(100, "steps between evaluations on the validation part; 0 for one at the end only")
    evaluate_batches: int = option(
        20, "batches in an evaluation, the same ones each time; 0 for the whole validation part"
    )
    patience: int = option(0, "stop after this many evaluations without a better validation loss; 0 never stops early")
    checkpoint_every: int = option(500, "steps between checkpoints; 0 for one at the end only")
    keep_checkpoints: int = option(2, "newest checkpoints to keep")
    log_every: int = option(10, "steps between lines on the terminal and in metrics.jsonl")
    tensorboard: bool = option(False, "also write TensorBoard events to the out folder")

    def __post_init__(self) -> None:
        if self.steps is None and self.max_seconds is None:
            object.__setattr__(self, "steps", 1000)
        for name in (
            "steps",
            "max_seconds",
            "batch_size",
            "context",
            "accumulate",
            "keep_checkpoints",
            "log_every",
            "lr",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"train: {name} must be above 0, got {value}")
        counts = ("warmup", "evaluate_every", "evaluate_batches", "patience", "checkpoint_every")
        for name in ("min_lr", "eps", "weight_decay", "clip", *counts):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise UserError(f"train: {name} must be at least 0, got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise UserError(f"train: min_lr must not be above lr, got {self.min_lr} and {self.lr}")
        if not 0 <= self.decay <= 1:
            raise UserError(f"train: decay must be a share of the steps in [0, 1], got {self.decay}")
        for name in ("momentum", "average_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"train: {name} must be in [0, 1), got {value}")
        if self.state_bits not in (None, 8, 32):
            raise UserError(f"train: state_bits must be 32 or 8, got {self.state_bits}")
        for name, value in HYPERPARAMETERS.get(self.optimizer, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(f"train: betas must be two numbers in [0, 1), got {self.betas}")
        if self.resume and self.overwrite:
            raise UserError("train: resume continues a run and overwrite deletes it; give one of them")
