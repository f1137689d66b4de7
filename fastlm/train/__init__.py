"""Training: one loop, resumable bit for bit, with its checkpoints, metrics and report."""

from fastlm.train.checkpoint import latest_valid
from fastlm.train.config import TrainConfig
from fastlm.train.loop import NonFiniteError, TrainResult, train
from fastlm.train.metrics import read_metrics
from fastlm.train.report import write_report
from fastlm.train.signals import TrainingInterrupted

__all__ = [
    "NonFiniteError",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "latest_valid",
    "read_metrics",
    "train",
    "write_report",
]
