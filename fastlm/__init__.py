"""fastlm: fused kernels for language models, and the transformer, training and generation built on them."""

from __future__ import annotations

import importlib

from fastlm._version import __version__

# Public names are imported on first use: `import fastlm` needs no Triton, no CUDA and no compiled file.
_LAZY = {
    "load": "fastlm.models",
    "Transformer": "fastlm.models",
    "TransformerConfig": "fastlm.models",
    "UserError": "fastlm.errors",
}
_MODULES = ("ops", "nn", "models", "optim", "data", "train", "generate", "evaluate", "testing")

__all__ = ["__version__", *_LAZY, *_MODULES]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
