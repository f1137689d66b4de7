"""Modules over the ops, with the state dicts of torch's own, and the key/value cache."""

from fastlm.nn.cache import KVCache
from fastlm.nn.norm import LayerNorm, RMSNorm

__all__ = ["KVCache", "LayerNorm", "RMSNorm"]
