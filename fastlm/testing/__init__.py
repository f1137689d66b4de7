"""What tests and benchmarks share: the accuracy rule, guard bands, the battery of checks every op passes, planted bugs.

A test file describes its op once (`Case`) and calls `check_op(case, backend)`; see tests/ops/test_rms_norm.py.
"""

from fastlm._interpreter import repair_interpreter
from fastlm.testing.accuracy import Case, assert_accurate, check_accuracy
from fastlm.testing.contract import (
    check_autocast,
    check_compile,
    check_cuda_graph,
    check_dispatcher,
    check_double_backward,
    check_guards,
    check_op,
    check_reference,
    check_safety,
    check_strides,
    check_transforms,
)
from fastlm.testing.guards import bands_intact, guarded, poison_empty
from fastlm.testing.planted import planted_bug

__all__ = [
    "Case",
    "assert_accurate",
    "bands_intact",
    "check_accuracy",
    "check_autocast",
    "check_compile",
    "check_cuda_graph",
    "check_dispatcher",
    "check_double_backward",
    "check_guards",
    "check_op",
    "check_reference",
    "check_safety",
    "check_strides",
    "check_transforms",
    "guarded",
    "planted_bug",
    "poison_empty",
    "repair_interpreter",
]
