"""Optimizers, learning-rate schedules and gradient clipping."""

from fastlm.optim.adamw import AdamW, parameter_groups
from fastlm.optim.clip import clip_coefficient, global_norm
from fastlm.optim.muon import Muon, muon_groups
from fastlm.optim.schedule import SCHEDULES, constant, cosine, linear

__all__ = [
    "SCHEDULES",
    "AdamW",
    "Muon",
    "clip_coefficient",
    "constant",
    "cosine",
    "global_norm",
    "linear",
    "muon_groups",
    "parameter_groups",
]
