"""Generation: prompts to text, greedy or sampled, streamed or in batches."""

from fastlm.generate.complete import complete
from fastlm.generate.cpu import CpuDecoder
from fastlm.generate.engine import generate
from fastlm.generate.sampling import Draws, SamplingConfig
from fastlm.generate.text import TextStream, print_piece

__all__ = [
    "CpuDecoder",
    "Draws",
    "SamplingConfig",
    "TextStream",
    "complete",
    "generate",
    "print_piece",
]
