"""The ops: one public function each, `F.*`-shaped, with interchangeable backends. See `explain` and `use_backend`."""

from fastlm.ops._op import Explanation, explain, use_backend
from fastlm.ops.activation import activation, glu
from fastlm.ops.adamw import adamw_
from fastlm.ops.attention import attention
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import rotary

__all__ = [
    "Explanation",
    "activation",
    "adamw_",
    "attention",
    "explain",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "use_backend",
]
