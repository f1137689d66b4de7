"""The ops: one public function each, `F.*`-shaped, with interchangeable backends. See `explain` and `use_backend`."""

from fastlm.ops._op import Explanation, explain, use_backend
from fastlm.ops.rms_norm import rms_norm

__all__ = ["Explanation", "explain", "rms_norm", "use_backend"]
