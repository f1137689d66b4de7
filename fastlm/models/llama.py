"""Llama (Touvron et al. 2023, arXiv:2302.13971): presets, and its config and weights as Hugging Face names them."""

from __future__ import annotations

from typing import Any

from fastlm.errors import UserError
from fastlm.models.config import TransformerConfig
from fastlm.models.rules import Rule, expand, hf_token_ids, token_ids

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."
# Rotary frequencies that old checkpoints carry.
IGNORED = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

_AXES = {"norm": "rms", "position": "rotary", "gated": True}
_LLAMA3 = {
    "vocab_size": 128256,
    "max_positions": 131072,
    "n_kv_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": "llama3",
    "rope_factor": 32.0,
    "bos_id": 128000,
    "eos_ids": (128001,),
}
_SMALL = {"n_kv_heads": 2, "max_positions": 1024}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {**_LLAMA3, "d_model": 2048, "n_layers": 16, "n_heads": 32, "d_ff": 8192},
    "llama-3.2-3b": {**_LLAMA3, "d_model": 3072, "n_layers": 28, "n_heads": 24, "d_ff": 8192},
    "llama-3.1-8b": {
        **_LLAMA3,
        **{"d_model": 4096, "n_layers": 32, "n_heads": 32, "d_ff": 14336, "rope_factor": 8.0, "tie_embeddings": False},
    },
    # Of the benchmarks.
    "llama-6x384": {**_SMALL, "vocab_size": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6},
    # Of `fastlm demo`: what a CPU can train in 100 seconds.
    "llama-4x192": {**_SMALL, "vocab_size": 1024, "d_model": 192, "n_layers": 4, "n_heads": 6},
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
_ROPE_KEYS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The TransformerConfig of a Llama config.json. Its dropout is not applied. Raises UserError for variants we lack."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if key not in hf]
    if missing:
        raise UserError(f"{missing[0]} is missing; a llama config needs it")
    activation = hf.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"hidden_act {activation!r} is not supported, only {', '.join(_ACTIVATIONS)} are")
    return TransformerConfig(
        **_AXES,
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf.get("num_key_value_heads"),
        head_dim=hf.get("head_dim"),
        d_ff=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[activation],
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        init_std=hf.get("initializer_range", 0.02),
        **_rope_from_hf(hf),
        **token_ids(hf, hf["vocab_size"]),
    )


def _rope_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 has one dict `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    out: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))}
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("partial_rotary_factor is not supported, only 1.0 is")
    if kind == "default":
        return out
    if kind not in _ROPE_KEYS:
        raise UserError(f"rope scaling {kind!r} is not supported, only default, {', '.join(_ROPE_KEYS)} are")
    missing = [key for key in _ROPE_KEYS[kind] if key not in rope]
    if missing:
        raise UserError(f"rope scaling {kind!r} lacks {missing[0]}")
    out |= {"rope_scaling": kind} | {f"rope_{key}": float(rope[key]) for key in _ROPE_KEYS[kind]}
    if kind == "llama3":
        trained = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 2048)
        out["rope_original_positions"] = trained
    return out


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The content of config.json, for a config that `reason_against` has nothing against.

    Rotary settings are written as before transformers 5, which it and everything else still reads.
    """
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    scaling = None
    if config.rope_scaling != "none":
        keys = _ROPE_KEYS[config.rope_scaling]
        scaling = {"rope_type": config.rope_scaling} | {key: getattr(config, f"rope_{key}") for key in keys}
        if config.rope_scaling == "llama3":
            scaling["original_max_position_embeddings"] = config.rope_original_positions
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": names[config.activation],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **hf_token_ids(config),
    }


def reason_against(config: TransformerConfig) -> str | None:
    """Why a Llama cannot have this config, or None."""
    for name, value in _AXES.items():
        if getattr(config, name) != value:
            return f"{name} must be {value!r}, got {getattr(config, name)!r}"
    return None


def rules(config: TransformerConfig) -> list[Rule]:
    """Our parameters in Llama's names; it keeps apart what we multiply as one."""
    layer = "model.layers.{i}."
    kv = config.n_kv_heads * config.head_dim
    table = [
        Rule("embed.weight", ("model.embed_tokens.weight",)),
        Rule("norm.weight", ("model.norm.weight",)),
        Rule("blocks.{i}.norm1.weight", (layer + "input_layernorm.weight",)),
        Rule("blocks.{i}.norm2.weight", (layer + "post_attention_layernorm.weight",)),
    ]
    for kind, there in (("weight", True), ("bias", config.attention_bias)):
        if there:
            qkv = tuple(f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv")
            sizes = (config.n_heads * config.head_dim, kv, kv)
            table.append(Rule(f"blocks.{{i}}.attention.qkv.{kind}", qkv, sizes))
            table.append(Rule(f"blocks.{{i}}.attention.out.{kind}", (f"{layer}self_attn.o_proj.{kind}",)))
    for kind, there in (("weight", True), ("bias", config.mlp_bias)):
        if there:
            gate_up = (f"{layer}mlp.gate_proj.{kind}", f"{layer}mlp.up_proj.{kind}")
            table.append(Rule(f"blocks.{{i}}.mlp.gate_up.{kind}", gate_up, (config.d_ff, config.d_ff)))
            table.append(Rule(f"blocks.{{i}}.mlp.down.{kind}", (f"{layer}mlp.down_proj.{kind}",)))
    if not config.tie_embeddings:
        table.append(Rule("head.weight", ("lm_head.weight",)))
    return expand(table, config.n_layers)
