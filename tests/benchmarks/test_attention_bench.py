"""The attention benchmark: everybody computes the same thing, operations are counted right, and a refusal says why.

flash-attn and xformers are played by stand-ins that follow their documents, so what is tested is how they are called.
"""

import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.harness import measure
from benchmarks.ops import attention_providers as others
from benchmarks.ops.bench_attention import BENCH, flops, gate_size, make
from fastlm import ops

SIZE = {"B": 2, "S": 40, "H": 2, "H_kv": 2, "width": 16}
ONE = {**SIZE, "B": 1}
CELLS = [
    SIZE,
    {**SIZE, "causal": False},
    {**SIZE, "window": 7},
    {**SIZE, "window": 7, "causal": False},
    {**SIZE, "S": 64, "causal": False, "density": 0.5, "block": 16},
    {**ONE, "packed": 3},
    {**ONE, "packed": 3, "causal": False},
    {**ONE, "packed": 3, "window": 7},
]
IDS = [" ".join(f"{k}={v}" for k, v in cell.items() if k not in SIZE) or "causal" for cell in CELLS]


def _call(cell):
    torch.manual_seed(0)
    return make(torch.float32, "cpu", **cell)


def _check(fn, cell):
    args = [x.detach() if torch.is_tensor(x) else x for x in _call(cell)]  # FlexAttention wants no gradient on the CPU
    with torch.no_grad():
        expected, got = BENCH.reference(*args), fn(*args)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)


def _band(S, left, right):
    """bool [S, S] of flash-attention's window_size."""
    i = torch.arange(S)
    distance = i[:, None] - i
    return ((left < 0) | (distance <= left)) & ((right < 0) | (-distance <= right))


@pytest.mark.parametrize("cell", CELLS, ids=IDS)
def test_sdpa_and_flex_see_what_the_op_sees(cell):
    _check(others.by_sdpa, cell)
    if cell.get("density") is None:
        _check(others.by_flex(flex_attention), cell)


def test_flex_takes_the_same_blocks():
    cell = {**ONE, "S": 512, "causal": False, "density": 0.3}
    mask = _call(cell)[3]
    assert mask.flex.sparsity() == pytest.approx(75) and mask.blocks.density == 0.25  # 1 of 4 blocks a row
    _check(others.by_flex(flex_attention), cell)


@pytest.mark.parametrize("cell", CELLS, ids=IDS)
def test_pairs_are_those_of_the_mask(cell):
    mask = _call(cell)[3]
    lengths = mask.lengths or (mask.S,)
    if mask.live is None and mask.window is None:  # the papers' half of the square
        assert mask.pairs == sum(n * n // (2 if mask.causal else 1) for n in lengths)
    elif mask.live is None:
        assert mask.pairs == sum(int(_band(n, *mask.band).sum()) for n in lengths)
    else:
        assert mask.pairs == mask.blocks.live_pairs == int(mask.dense.sum())
    assert sum(lengths) == cell["S"]


def test_operations_follow_the_density():
    cells = [{**SIZE, "S": 128, "causal": False, "block": 16, "density": d} for d in (0.25, 0.5, 1.0)]
    counted = [flops("forward", *_call(cell)) for cell in cells]
    dense = flops("forward", *_call({**SIZE, "S": 128, "causal": False}))
    assert dense == 4 * 2 * 2 * 128 * 128 * 16
    assert counted == [dense / 4, dense / 2, dense]
    assert flops("backward", *_call(SIZE)) == 2.5 * flops("forward", *_call(SIZE))
    lengths = _call({**ONE, "packed": 3})[3].lengths
    assert len(set(lengths)) == 3 and min(lengths) > 0


@pytest.mark.parametrize("suite", ("tiny", "cpu", "quick", "full"))
def test_the_gate_keeps_the_kind_of_cell(suite):
    sizes = BENCH.sizes[suite]
    assert len({str(sorted(size.items())) for size in sizes}) == len(sizes)
    for size in sizes:
        at = gate_size(size)
        assert at["S"] <= 1024 and at.keys() == size.keys()
        for same in ("width", "H", "H_kv", "density"):
            assert at.get(same) == size.get(same)
        assert size.get("window", 0) < size["S"] and at.get("window", 0) < at["S"]
        assert "density" not in size or at["S"] % at.get("block", 128) == 0


def test_the_sweep_holds_what_it_promises():
    full = BENCH.sizes["full"]
    plain = [s for s in full if not {"window", "density", "packed"} & s.keys()]
    for width in (64, 128, 256):
        for causal in (True, False):
            assert {s["S"] for s in plain if s["width"] == width and s["causal"] == causal} >= {1024, 4096, 16384}
        assert {s["density"] for s in full if "density" in s and s["width"] == width} == {0.05, 0.1, 0.25, 0.5, 1.0}
        assert {1024, 4096} <= {s["window"] for s in full if "window" in s and s["width"] == width}
    assert any("packed" in s for s in full)


def test_what_does_not_go_together_is_refused():
    for extra in (
        {"density": 0.5},  # causal
        {"density": 0.5, "causal": False, "S": 40},  # not whole blocks
        {"packed": 3, "window": 7, "causal": False},
        {"packed": 3, "B": 2},
    ):
        with pytest.raises(ValueError, match="bench attention"):
            _call({**SIZE, **extra})


def _stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def _flash(q, k, v, causal=False, window_size=(-1, -1)):
    left, right = window_size
    return ops.attention(q, k, v, causal=causal, window=(left, 0 if causal else right), backend="reference")


def _flash_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window_size=(-1, -1)):
    assert max_q == max_k == cu_q.diff().max() and cu_q is cu_k and cu_q.dtype == torch.int32
    parts = (x.split(cu_q.diff().tolist()) for x in (q, k, v))
    return torch.cat([_flash(*(x[None] for x in part), causal, window_size)[0] for part in zip(*parts)])


@pytest.mark.parametrize("cell", CELLS, ids=IDS)
def test_flash_attn_is_called_as_documented(cell, monkeypatch):
    functions = {"flash_attn_func": _flash, "flash_attn_varlen_func": _flash_varlen}
    _stand_in(monkeypatch, "flash_attn", **functions)
    _stand_in(
        monkeypatch,
        "flash_attn_interface",
        **{n: lambda *a, f=f, **k: (f(*a, **k), None) for n, f in functions.items()},
    )
    for module in ("flash_attn", "flash_attn_interface"):
        call = others.with_flash_attn(module)()
        if "density" in cell:
            with pytest.raises(NotImplementedError, match="no block masks"):
                call(*_call(cell))
        else:
            _check(call, cell)


class _Bias:
    """An attn_bias of xformers: `local` keys with the query's own, `lengths` of the blocks on the diagonal."""

    def __init__(self, lengths=None, causal=True, local=None):
        self.lengths, self.causal, self.local = lengths, causal, local

    @classmethod
    def from_seqlens(cls, lengths):
        return cls(lengths, False)

    def make_causal(self):
        return _Bias(self.lengths, True)

    def make_local_attention(self, window_size):
        return _Bias(self.lengths, self.causal, window_size)


def _efficient(q, k, v, attn_bias=None):
    bias = attn_bias or _Bias(causal=False)
    lengths = bias.lengths or (q.shape[1],)
    seen = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    seen &= _band(q.shape[1], -1 if bias.local is None else bias.local - 1, 0 if bias.causal else -1)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize("cell", CELLS, ids=IDS)
def test_xformers_is_called_as_documented(cell, monkeypatch):
    biases = _stand_in(monkeypatch, "attn_bias", LowerTriangularMask=_Bias, BlockDiagonalMask=_Bias)
    _stand_in(monkeypatch, "xformers")
    _stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=_efficient)
    _stand_in(monkeypatch, "xformers.ops.fmha", attn_bias=biases)
    call = others.with_xformers()
    if "density" in cell or (cell.get("window") and not cell.get("causal", True)):
        with pytest.raises(NotImplementedError):
            call(*_call(cell))
    else:
        _check(call, cell)
    with pytest.raises(NotImplementedError, match="grouped heads"):
        call(*_call({**SIZE, "H_kv": 1}))


def test_a_kernel_that_refuses_gives_torchs_reason(monkeypatch):
    def refuse(*args, **kwargs):
        warnings.warn("Flash attention kernel not used because: (Triggered internally at x.h)", stacklevel=1)
        warnings.warn(
            "Flash Attention does not support non-null attn_mask. (Triggered internally at y.h)", stacklevel=1
        )
        warnings.warn("Memory Efficient attention has been runtime disabled. (Triggered internally)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = others.with_kernel(others.SDPA["flash"])()
    args = _call(SIZE)
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with warnings.catch_warnings(), pytest.raises(NotImplementedError) as refused:
        warnings.simplefilter("ignore")
        call(*args)
    assert str(refused.value) == "Flash Attention does not support non-null attn_mask."


def test_who_is_not_here_is_a_row_that_says_so():
    rows = measure(BENCH, BENCH.sizes["tiny"][1], torch.float32, "cpu", seconds=0.001)
    reasons = {r.provider: r.reason for r in rows if r.ms is None}
    timed = {r.provider for r in rows if r.ms is not None}
    assert {"sdpa", "fastlm:torch"} <= timed and timed | reasons.keys() == {p.name for p in BENCH.providers}
    if not torch.cuda.is_available():
        for name in ("fastlm:triton", "sdpa:cudnn", "flex", "torch:varlen"):
            assert reasons[name].startswith("missing: ")
