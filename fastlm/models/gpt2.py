"""GPT-2 (Radford et al. 2019): presets, and its config and weights as Hugging Face names them."""

from __future__ import annotations

from typing import Any

from fastlm.errors import UserError
from fastlm.models.config import TransformerConfig
from fastlm.models.rules import Rule, expand, hf_token_ids, token_ids

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
# Causal masks that old checkpoints carry.
IGNORED = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"

_AXES = {
    "norm": "layer",
    "position": "learned",
    "activation": "gelu_tanh",
    "gated": False,
    "attention_bias": True,
    "mlp_bias": True,
}
_RELEASED = {**_AXES, "vocab_size": 50257, "max_positions": 1024, "bos_id": 50256, "eos_ids": (50256,)}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {**_RELEASED, "d_model": 768, "n_layers": 12, "n_heads": 12},
    "gpt2-medium": {**_RELEASED, "d_model": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {**_RELEASED, "d_model": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {**_RELEASED, "d_model": 1600, "n_layers": 48, "n_heads": 25},
    # Of the benchmarks.
    "gpt2-6x384": {**_AXES, "vocab_size": 8192, "max_positions": 1024, "d_model": 384, "n_layers": 6, "n_heads": 6},
    # nanoGPT's setting for a CPU.
    "gpt2-4x128": {**_AXES, "vocab_size": 65, "max_positions": 64, "d_model": 128, "n_layers": 4, "n_heads": 4},
}
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "relu2": "relu2",
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The TransformerConfig of a GPT-2 config.json. Its dropout is not applied. Raises UserError for variants we lack."""
    refused = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}
    for key, usual in refused.items():
        if hf.get(key, usual) != usual:
            raise UserError(f"{key} = {hf[key]} is not supported, only {usual} is")
    activation = hf.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UserError(f"activation_function {activation!r} is not supported, only {', '.join(_ACTIVATIONS)} are")
    missing = [key for key in ("vocab_size", "n_embd", "n_layer", "n_head") if key not in hf]
    if missing:
        raise UserError(f"{missing[0]} is missing; a gpt2 config needs it")
    return TransformerConfig(
        **{**_AXES, "activation": _ACTIVATIONS[activation]},
        vocab_size=hf["vocab_size"],
        d_model=hf["n_embd"],
        n_layers=hf["n_layer"],
        n_heads=hf["n_head"],
        d_ff=hf.get("n_inner"),
        max_positions=hf.get("n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        init_std=hf.get("initializer_range", 0.02),
        **token_ids(hf, hf["vocab_size"]),
    )


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The content of config.json, for a config that `reason_against` has nothing against."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **hf_token_ids(config),
    }


def reason_against(config: TransformerConfig) -> str | None:
    """Why a GPT-2 cannot have this config, or None."""
    for name, value in _AXES.items():
        if name != "activation" and getattr(config, name) != value:
            return f"{name} must be {value!r}, got {getattr(config, name)!r}"
    if config.n_kv_heads != config.n_heads:
        return f"n_kv_heads must be n_heads {config.n_heads}, got {config.n_kv_heads}"
    if config.n_heads * config.head_dim != config.d_model:
        return f"head_dim must be d_model / n_heads = {config.d_model / config.n_heads:g}, got {config.head_dim}"
    return None


def rules(config: TransformerConfig) -> list[Rule]:
    """Our parameters in GPT-2's names; its products are stored [in, out]."""
    table = [
        Rule("embed.weight", ("transformer.wte.weight",)),
        Rule("positions.weight", ("transformer.wpe.weight",)),
        Rule("norm.weight", ("transformer.ln_f.weight",)),
        Rule("norm.bias", ("transformer.ln_f.bias",)),
    ]
    for ours, theirs in {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }.items():
        product = not ours.startswith("norm")
        table.append(Rule(f"blocks.{{i}}.{ours}.weight", (f"transformer.h.{{i}}.{theirs}.weight",), transpose=product))
        table.append(Rule(f"blocks.{{i}}.{ours}.bias", (f"transformer.h.{{i}}.{theirs}.bias",)))
    if not config.tie_embeddings:
        table.append(Rule("head.weight", ("lm_head.weight",)))
    return expand(table, config.n_layers)
