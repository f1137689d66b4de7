"""Modules over the ops: drop-in layers with the state dicts of torch's own, and the key/value cache."""

from fastlm.nn import transformers
from fastlm.nn.attention import Attention, alibi_slopes
from fastlm.nn.cache import KVCache
from fastlm.nn.distillation_loss import CrossEntropyLoss, KLDivLoss
from fastlm.nn.fp8_linear import Fp8Linear
from fastlm.nn.lora import LoRALinear
from fastlm.nn.loss import LinearCrossEntropyLoss
from fastlm.nn.mlp import MLP, GatedMLP
from fastlm.nn.multihead_attention import MultiheadAttention
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.quantized_linear import QuantizedLinear, QuantizeReport, quantize_
from fastlm.nn.recording import attend, record_attention
from fastlm.nn.replace import Report, replace
from fastlm.nn.softmax import Softmax
from fastlm.nn.sparse import SparseLinear24, prune_2_4, sparse_gain

__all__ = [
    "MLP",
    "Attention",
    "CrossEntropyLoss",
    "Fp8Linear",
    "GatedMLP",
    "KLDivLoss",
    "KVCache",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "MultiheadAttention",
    "QuantizeReport",
    "QuantizedLinear",
    "RMSNorm",
    "Report",
    "Softmax",
    "SparseLinear24",
    "alibi_slopes",
    "attend",
    "quantize_",
    "prune_2_4",
    "record_attention",
    "replace",
    "sparse_gain",
    "transformers",
]
