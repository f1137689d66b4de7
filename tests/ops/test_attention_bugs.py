"""Bugs planted in attention's kernels turn the checks of its features red; those of the plain op are in test_attention.py."""

import pytest

from fastlm.testing import check_accuracy, check_guards, planted_bug, poison_empty
from tests.ops import attention_matrix as matrix

# name -> (features that show it, kernel file, what it says, what it is made to say)
BUGS = {
    "window: left edge": (("window",), "attention_scores", "key >= query + (place", "key > query + (place"),
    "window: keys left out": (
        ("window",),
        "attention_common",
        "lo = tl.maximum(lo, first + place.offset - rule.left)",
        "lo = tl.maximum(lo, first + BLOCK + place.offset - rule.left)",
    ),
    "window: queries left out": (
        ("window",),
        "attention_common",
        "hi = tl.minimum(hi, tl.maximum(last - place.offset + rule.left + 1, 0))",
        "hi = tl.minimum(hi, tl.maximum(first - place.offset + rule.left + 1, 0))",
    ),
    "dk dv: left edge": (
        ("window",),
        "attention_dkdv",
        "(place.offset - rule.left) + 1",
        "(place.offset - rule.left) + 2",
    ),
    "prefix not seen": (("causal", "prefix"), "attention_scores", "band | (key < place.prefix)", "band"),
    "prefix past the queries' range": (
        ("causal, top left", "prefix"),
        "attention_common",
        "lo = tl.where(first < place.prefix, 0, lo)",
        "lo = lo",
    ),
    "left padding seen": (("left padding",), "attention_scores", "seen & (key >= place.start)", "seen"),
    "documents not told apart": (
        ("documents",),
        "attention_scores",
        "seen & (theirs == ours)",
        "seen & (theirs >= ours)",
    ),
    "packed: another sequence's keys": (("packed",), "attention_common", "k_row = first_k", "k_row = first_q"),
    "packed: last tile left out": (
        ("packed",),
        "attention_call",
        "return self.sequences if self.packed else 0",
        "return 0",
    ),
    "softcap: no slope": (("softcap",), "attention_dq", "(dscores * slope)", "dscores"),
    "softcap: no slope in dk": (("softcap",), "attention_dkdv", "dscores = dscores * slope", "pass"),
    "softcap: scale twice": (("softcap",), "attention_scores", "2.0 * LOG2E * scale", "2.0 * LOG2E * scale * scale"),
    "bias: in the wrong base": (("bias",), "attention_scores", 'float("-inf"), added * LOG2E', 'float("-inf"), added'),
    "bias: first head for all": (("bias",), "attention_scores", "place.h * rule.bias_h", "0 * rule.bias_h"),
    "dbias: tail": (("bias",), "attention_bias_bwd", "(n < columns)[None, :])", "(n < columns - 1)[None, :])"),
    "dbias: one head of all": (("broadcast bias",), "attention_bias_bwd", "(H if ALL_H else 1)):", "1):"),
    "relative bias: no clamp": (
        ("T5 relative bias",),
        "attention_scores",
        "tl.maximum(key - query - place.offset, -rule.reach)",
        "tl.maximum(key - query - place.offset, 10 - rule.reach)",
    ),
    "relative bias: wrapped diagonals": (
        ("T5 relative bias",),
        "attention_bias_bwd",
        "tl.where(wrapped < BLOCK, 0.0, sheared)",
        "tl.where(wrapped < BLOCK, sheared, 0.0)",
    ),
    "relative bias: far keys": (
        ("T5 relative bias",),
        "attention_bias_bwd",
        "sums[:, : zero - reach].sum(1) + far",
        "0 * far",
    ),
    "ALiBi: from the wrong corner": (("ALiBi",), "attention_scores", "query + place.offset - key", "query - key"),
    "sink twice": (("sinks",), "attention", "total * shrink + tl.exp2(sink", "total * shrink + 2 * tl.exp2(sink"),
    "dsinks: sign": (("sinks",), "attention_bwd", "dsinks = -(weight", "dsinks = (weight"),
    "blocks: partial ones whole": (
        ("block mask",),
        "attention",
        "tl.where(seen != 0, scores",
        "tl.where(seen >= 0, scores",
    ),
    "blocks: last one left out": (("block mask",), "attention_dq", "end = hi * pieces", "end = hi * pieces - 1"),
    "blocks: dk dv": (
        ("block mask",),
        "attention_dkdv",
        "tl.load(pattern_ptr + at) != 0",
        "tl.load(pattern_ptr + at) >= 0",
    ),
    "dropout: weights not grown": (("dropout",), "attention", "probs * rule.grown", "probs"),
    "dropout: other bits in dk": (
        ("dropout",),
        "attention_dkdv",
        "kept(rule, place, H, start, first_key",
        "kept(rule, place, H, start + 1, first_key",
    ),
    "dropout: other bits in dq": (
        ("dropout",),
        "attention_dq",
        "kept(rule, place, H, first, start",
        "kept(rule, place, H, first, start + 4",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_seen(name, device):
    names, file, old, new = BUGS[name]
    case, args, dtype = matrix.case_of(names, device)
    with planted_bug("attention", old, new, file=file), poison_empty(), pytest.raises(AssertionError):
        check_accuracy(case, "triton", dtype, device, args)


_OUTSIDE = [
    ("bias", "packed"),
    ("block mask", "window"),
    ("causal", "key lengths", "bias", "T5 relative bias"),  # tiles laid from the diagonal begin before the first query
]


@pytest.mark.parametrize("names", _OUTSIDE)
def test_nothing_is_read_or_written_outside(names, device):
    case, _, _ = matrix.case_of(names, device)
    check_guards(case, "triton", device)
