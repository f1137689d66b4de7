"""Generation: prompts to text, greedy or sampled, streamed or in batches."""

from fastlm.generate.complete import complete
from fastlm.generate.cpu import CpuDecoder
from fastlm.generate.engine import generate
from fastlm.generate.sampling import (
    SamplingConfig,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_generator,
    sample,
)
from fastlm.generate.text import TextStream, print_piece

__all__ = [
    "CpuDecoder",
    "SamplingConfig",
    "TextStream",
    "complete",
    "filter_logits",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "make_generator",
    "print_piece",
    "sample",
]
