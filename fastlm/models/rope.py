"""Angles of the rotary embedding, with the stretchings that config.rope_scaling names."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.models.config import TransformerConfig


def rope_tables(config: TransformerConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, fp32 [max_positions, Dh / 2] each, for ops.rotary (pairs i, i + Dh / 2).

    Paper: Su et al. 2021, arXiv:2104.09864.
    """
    positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, _frequencies(config, device))
    return angles.cos(), angles.sin()


def _frequencies(config: TransformerConfig, device: torch.device) -> Tensor:
    """Radians a position, fp32 [Dh / 2]; in the order of operations that checkpoints were trained with."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling == "linear":  # Chen et al. 2023, arXiv:2306.15595
        return frequencies / config.rope_factor
    if config.rope_scaling == "llama3":  # Grattafiori et al. 2024, arXiv:2407.21783
        # Long waves are stretched, short ones kept; between them the share that is kept grows with the turns a wave makes
        # within the sequences first trained on.
        turns = config.rope_original_positions * frequencies / (2 * math.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / config.rope_factor + kept * frequencies
    return frequencies
