"""Language models: one Transformer, its config, presets, and Hugging Face's folder format."""

from fastlm.models.config import TransformerConfig
from fastlm.models.io import load, save
from fastlm.models.presets import PRESETS, preset
from fastlm.models.transformer import Transformer

__all__ = ["PRESETS", "Transformer", "TransformerConfig", "load", "preset", "save"]
