"""Text to batches: sources, cleaning, tokenizers, token shards and loaders.

report = prepare(DataConfig(sources=["books/", "code.jsonl@0.5"], output="data/mine"))
for batch in Loader("data/mine", "train", batch_size=8, context=256):
    loss = model.loss(batch.tokens, batch.labels)
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "clean": ("CleaningReport", "clean_text"),
    "corpus": ("StandardLibrary", "standard_library_sources"),
    "loader": ("Batch", "Loader", "evaluation_batches"),
    "packing": ("best_fit", "host_backend", "permutation"),
    "preparation": ("DataConfig", "PrepareReport", "prepare", "tokenizer_from_sources"),
    "shards": ("Shard", "ShardWriter", "open_shard"),
    "sources": ("Source",),
    "store": ("TokenStore", "open_split", "read_meta"),
    "tokenizer": ("Tokenizer", "load_tokenizer"),
    "tokenizer_training": ("train_tokenizer",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Imports a name on first use, so that `import fastlm` stays light."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
