"""How a parameter of ours is spelled in a Hugging Face checkpoint: a table of rules per family, read in both directions.

The idea of declarative two-way rules is from transformers' WeightConverter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter. `{i}` in the names stands for the layer.

    Attributes:
        ours: name in our state dict.
        theirs: names in the checkpoint; several are the rows of ours in that order.
        sizes: rows of each of several.
        transpose: theirs is stored [in, out].
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transpose: bool = False

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs, contiguous."""
        tensors = [t.t() if self.transpose else t for t in tensors]
        return (torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0]).contiguous()

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """Their tensors from ours, contiguous."""
        parts = tensor.split(self.sizes) if self.sizes else (tensor,)
        return [(t.t() if self.transpose else t).contiguous() for t in parts]

    def shapes(self, ours: Sequence[int]) -> list[list[int]]:
        """The shapes of theirs, given the shape of ours."""
        parts = [[rows, *ours[1:]] for rows in self.sizes] if self.sizes else [list(ours)]
        return [part[::-1] if self.transpose else part for part in parts]


def expand(rules: Iterable[Rule], n_layers: int) -> list[Rule]:
    """Rules with `{i}` once per layer, the others once."""
    out = []
    for rule in rules:
        for i in range(n_layers if "{i}" in rule.ours else 1):
            theirs = tuple(name.replace("{i}", str(i)) for name in rule.theirs)
            out.append(dataclasses.replace(rule, ours=rule.ours.replace("{i}", str(i)), theirs=theirs))
    return out


def token_ids(hf: dict, vocab_size: int) -> dict:
    """bos_id, eos_ids and pad_id of a Hugging Face config. Ids outside the vocabulary (-1, or a default that was left in a
    smaller model's config) can never be generated and count as none."""

    def valid(token: object) -> bool:
        return isinstance(token, int) and 0 <= token < vocab_size

    eos = hf.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [eos]
    ids = {ours: hf.get(theirs) for ours, theirs in (("bos_id", "bos_token_id"), ("pad_id", "pad_token_id"))}
    return {k: v if valid(v) else None for k, v in ids.items()} | {"eos_ids": tuple(t for t in eos if valid(t))}


def hf_token_ids(config) -> dict:
    """The three ids as Hugging Face configs spell them: one eos as a number, several as a list."""
    eos = list(config.eos_ids)
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_id,
    }
