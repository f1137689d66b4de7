"""Evaluation: how well a model predicts text, token by token and byte by byte."""

from fastlm.evaluate.perplexity import EvaluationResult, evaluate, gzip_bits_per_byte

__all__ = ["EvaluationResult", "evaluate", "gzip_bits_per_byte"]
