"""Named configs of every family."""

from __future__ import annotations

import difflib
from typing import Any

from fastlm.config import build
from fastlm.errors import UserError
from fastlm.models import gpt2, llama
from fastlm.models.config import TransformerConfig

PRESETS: dict[str, dict[str, Any]] = {**gpt2.PRESETS, **llama.PRESETS}


def preset(name: str, **changes: Any) -> TransformerConfig:
    """The config of that name with some fields changed: `preset("llama-6x384", vocab_size=1024)`.

    Raises UserError for an unknown name (with the nearest one), an unknown field or values that do not fit together.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
        raise UserError(f"model: no preset {name!r}; {remedy}")
    return build(TransformerConfig, PRESETS[name], changes, where="model")
