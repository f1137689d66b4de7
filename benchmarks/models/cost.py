"""What a training step or a new token must cost at least, so that a time becomes a share of the machine's measured peaks."""

from __future__ import annotations

from fastlm.models import TransformerConfig


def matrix_parameters(config: TransformerConfig) -> int:
    """Weights that every token is multiplied with: the blocks' matrices and the head, not the embeddings, norms and biases."""
    D, H, H_kv, Dh, F = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff
    block = D * (H + 2 * H_kv) * Dh + H * Dh * D + (3 if config.gated else 2) * D * F
    return config.n_layers * block + D * config.vocab_size


def train_flops(config: TransformerConfig, batch: int, context: int) -> float:
    """Floating point operations of forward and backward: 6 per weight and token, and 12 L H Dh S per token in attention, halved
    since half of the keys are masked. (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, there without the half.)"""
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * context
    return batch * context * (6.0 * matrix_parameters(config) + attention)


def decode_bytes(config: TransformerConfig, item: int, length: int) -> float:
    """Bytes that a new token of one row must read: every matrix once, keys and values of `length` tokens; `item` bytes each."""
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * length
    return float(item) * (matrix_parameters(config) + cache)
