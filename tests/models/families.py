"""Tiny random models of both families as transformers makes them, and ours with the same weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import fastlm

VOCABULARY = 61
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LLAMA = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 160,
}
_GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 160}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}

CONFIGS = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, **_GPT2, **_NO_IDS),
    "gpt2-untied-gelu": lambda: GPT2Config(
        vocab_size=VOCABULARY, **_GPT2, **_NO_IDS, n_inner=100, activation_function="gelu", tie_word_embeddings=False
    ),
    "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, **_LLAMA, **_NO_IDS),
    "llama-gqa-tied": lambda: LlamaConfig(
        vocab_size=VOCABULARY, **_LLAMA, **_NO_IDS, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "llama-mqa-biases-head-dim": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        **_LLAMA,
        **_NO_IDS,
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama3-rope": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        **{**_LLAMA, "hidden_size": 64},
        **_NO_IDS,
        num_key_value_heads=2,
        rope_theta=5000.0,
        rope_scaling=dict(LLAMA3),
    ),
    "linear-rope": lambda: LlamaConfig(
        vocab_size=VOCABULARY, **_LLAMA, **_NO_IDS, rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
}
NAMES = list(CONFIGS)


def make_theirs(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A transformers model whose weights are large enough that every part of it shows in the logits."""
    torch.manual_seed(NAMES.index(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for key, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and key.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.2)
    return model.to(dtype).eval()


def pair(name: str, folder, dtype: torch.dtype = torch.float32):
    """(their model, our model) with the same weights."""
    theirs = make_theirs(name, dtype)
    theirs.save_pretrained(folder)
    return theirs, fastlm.load(folder)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
