"""The models' costs: counted from the config, checked against a real model's weights and torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from benchmarks.models.cost import decode_bytes, matrix_parameters, train_flops
from fastlm.models import preset

CONFIGS = [
    preset("gpt2-4x128"),
    preset("llama-4x192"),
    preset("llama-4x192", tie_embeddings=False, d_model=96, n_heads=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "untied"])
def test_matrices_are_the_model_s(config):
    model = fastlm.Transformer(config)
    matrices = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    assert matrix_parameters(config) == matrices + model.head_weight.numel()
    assert decode_bytes(config, 2, 10) == 2 * (
        matrices + model.head_weight.numel() + 20 * config.n_layers * config.n_kv_heads * config.head_dim
    )


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "untied"])
def test_flops_are_those_torch_counts(config):
    model, S = fastlm.Transformer(config), 16
    tokens = torch.randint(config.vocab_size, (2, S))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens)
    blocks = counter.get_total_flops()
    products = 2 * 2 * S * matrix_parameters(config)
    # The counter may see attention as a product over all keys, or not at all; the matrices it sees whole.
    attention = 4 * 2 * config.n_layers * config.n_heads * config.head_dim * S * S
    assert logits.shape[-1] == config.vocab_size and products <= blocks <= products + attention
    assert train_flops(config, 2, S) == pytest.approx(3 * (products + attention / 2))
