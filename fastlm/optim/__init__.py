"""Optimizers, learning-rate schedules and gradient clipping."""

from fastlm.optim.adamw import AdamW, parameter_groups
from fastlm.optim.base import FusedOptimizer
from fastlm.optim.clip import clip_coefficient, global_norm
from fastlm.optim.lion import Lion
from fastlm.optim.muon import Muon, muon_groups
from fastlm.optim.schedule import SCHEDULES, constant, cosine, inverse_sqrt, linear, wsd
from fastlm.optim.sgd import SGD

__all__ = [
    "SCHEDULES",
    "SGD",
    "AdamW",
    "FusedOptimizer",
    "Lion",
    "Muon",
    "clip_coefficient",
    "constant",
    "cosine",
    "global_norm",
    "inverse_sqrt",
    "linear",
    "muon_groups",
    "parameter_groups",
    "wsd",
]
