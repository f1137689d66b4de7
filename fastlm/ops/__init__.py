"""The ops: one public function each, `F.*`-shaped, with interchangeable backends. See `explain` and `use_backend`."""

from fastlm.ops._op import Explanation, explain, use_backend
from fastlm.ops.activation import activation, glu
from fastlm.ops.adamw import adamw_
from fastlm.ops.append_kv import append_kv_
from fastlm.ops.attention import attention
from fastlm.ops.attention_maps import attention_weights, received_attention
from fastlm.ops.attention_options import RelativeBias
from fastlm.ops.block_mask import BlockMask
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.decode_attention import decode_attention
from fastlm.ops.fp8_linear import fp8_linear, fp8_quantize
from fastlm.ops.global_norm import global_norm
from fastlm.ops.kl_div import kl_div
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_kl_div import linear_kl_div
from fastlm.ops.linear_logprobs import linear_logprobs
from fastlm.ops.lion import lion_
from fastlm.ops.lora_linear import lora_linear
from fastlm.ops.mlp import gated_mlp, mlp
from fastlm.ops.newton_schulz import newton_schulz
from fastlm.ops.quantized_linear import quantized_linear
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import rotary
from fastlm.ops.sample import sample
from fastlm.ops.sgd import sgd_
from fastlm.ops.softmax import softmax

__all__ = [
    "BlockMask",
    "Explanation",
    "RelativeBias",
    "activation",
    "adamw_",
    "append_kv_",
    "attention",
    "attention_weights",
    "cross_entropy",
    "decode_attention",
    "explain",
    "fp8_linear",
    "fp8_quantize",
    "gated_mlp",
    "global_norm",
    "glu",
    "kl_div",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_logprobs",
    "lion_",
    "lora_linear",
    "mlp",
    "newton_schulz",
    "quantized_linear",
    "received_attention",
    "rms_norm",
    "rotary",
    "sample",
    "sgd_",
    "softmax",
    "use_backend",
]
