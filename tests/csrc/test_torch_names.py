"""What csrc/bindings uses of torch: names that the oldest supported torch has, too."""

import re

from tests.csrc.host_library import CSRC

# Compiled with nvcc 13.0 against the headers of torch 2.11.0 and of 2.13.0; CONTRIBUTING.md says how. The target version
# of the stable ABI hides newer functions only: a macro that came later compiles against the torch at hand all the same.
KNOWN = {
    "macros": "STABLE_TORCH_LIBRARY_FRAGMENT STABLE_TORCH_LIBRARY_IMPL STD_TORCH_CHECK TORCH_ABI_VERSION TORCH_BOX"
    " TORCH_ERROR_CODE_CHECK AOTI_TORCH_SUCCESS",
    "C functions and types": "torch_call_dispatcher aoti_torch_get_current_cuda_stream AOTITorchError StableIValue",
    "names": "torch::stable torch::headeronly::IntHeaderOnlyArrayRef torch::headeronly::Layout torch::headeronly::ScalarType"
    " stable::Device stable::Tensor stable::accelerator::DeviceGuard stable::clone stable::contiguous stable::copy_"
    " stable::detail::from stable::detail::to stable::fill_ stable::new_empty stable::new_zeros stable::sum stable::to"
    " stable::zero_",
    "methods (of the standard library, too)": "back begin const_data_ptr data def dim element_size end equals"
    " get_device_index has_value impl is_contiguous is_cpu is_cuda mutable_data_ptr numel scalar_type size sizes slice stride"
    " strides value_or",
    "headers": "torch/csrc/stable/accelerator.h torch/csrc/stable/library.h torch/csrc/stable/ops.h torch/csrc/stable/tensor.h"
    " torch/headeronly/core/ScalarType.h",
}
PATTERNS = {
    "macros": r"\b(?:[A-Z]+_)*TORCH_(?!TARGET_VERSION)[A-Z_]+\b",
    "C functions and types": r"\b(?:(?:aoti_)?torch_\w+(?=[(\"])|AOTITorch\w+|Stable\w+)",
    "names": r"\b(?:torch|stable)::[\w:]+\w",
    "methods (of the standard library, too)": r"(?:(?<=\w\.)|(?<=->)|(?<=[)\]]\.))[a-z]\w*(?=[(<])",
    "headers": r"(?<=#include <)(?:torch|ATen|c10)/[^>]+",
}


def used(text: str) -> dict[str, set[str]]:
    code = re.sub(r"//.*", "", text)
    return {kind: set(re.findall(pattern, code)) for kind, pattern in PATTERNS.items()}


def test_bindings_use_what_the_oldest_torch_has():
    found = used("\n".join(path.read_text(encoding="utf-8") for path in sorted(CSRC.glob("bindings/*"))))
    for kind, names in KNOWN.items():
        assert found[kind] == set(names.split()), (
            f"{kind} of csrc/bindings have changed: compile them against torch 2.11 (CONTRIBUTING.md), then change this list"
        )


def test_a_newer_name_is_seen():
    for line, kind, name in (
        ("STABLE_TORCH_ERROR_CODE_CHECK(call());", "macros", "STABLE_TORCH_ERROR_CODE_CHECK"),
        ("return stable::empty({1});", "names", "stable::empty"),
        ("x = torch::headeronly::Device(1);", "names", "torch::headeronly::Device"),
        ("aoti_torch_new(1)", "C functions and types", "aoti_torch_new"),
        ("x.layout(), y->layout(), f(x).layout()", "methods (of the standard library, too)", "layout"),
        ("#include <torch/csrc/stable/newer.h>", "headers", "torch/csrc/stable/newer.h"),
    ):
        assert used(line)[kind] == {name} and name not in KNOWN[kind].split()
