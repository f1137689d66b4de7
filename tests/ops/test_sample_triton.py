"""sample's Triton kernel draws what the reference draws; its noise is Philox's; bugs planted in it are seen."""

import contextlib
import importlib
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from fastlm import ops  # noqa: E402
from fastlm.kernels import sample as kernel  # noqa: E402
from fastlm.ops.random_bits import philox  # noqa: E402
from fastlm.testing import planted_bug, poison_empty  # noqa: E402
from tests.ops.test_sample import OPTIONS, filtered  # noqa: E402

tl = triton.language

EACH = {
    "temperature": torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 1e-38]), "top_k": torch.tensor([0, 1, 5, 10**6, 2, 3]),
    "top_p": torch.tensor([0.5, 0.9, 1.0, 0.1, 0.2, 0.99]), "min_p": torch.tensor([0, 0.1, 0.5, 1.0, 0, 0]),
}  # fmt: skip
SEEDS = [(-5, 2), (2**40 + 3, 2**33 + 7), (-(2**63), -1), (7, 2**31)]


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def check(x, options, seed=(5, 0)):
    """The kernel's tokens and log-probabilities of x [B, V] against the reference's."""
    options, seed = on(x.device, options), torch.tensor(seed, device=x.device)
    with poison_empty():
        found, logprobs = ops.sample(x, seed=seed, return_logprobs=True, backend="triton", **options)
        alone = ops.sample(x, seed=seed, backend="triton", **options)
    want, expected = ops.sample(x, seed=seed, return_logprobs=True, backend="reference", **options)
    assert found.dtype == torch.int64 and torch.equal(found, want) and torch.equal(alone, want)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=5e-6, equal_nan=True)


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0}, EACH], ids=str)
def test_it_draws_what_the_reference_draws(options, device):
    for columns, dtype in ((1, torch.float32), (7, torch.float16), (300, torch.bfloat16), (5003, torch.float32)):
        x = torch.randn(6, columns, device=device).to(dtype)  # of 16 bits many are equal
        x[5, columns // 2] = -math.inf
        check(x, options)


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_seeds_and_offsets(seed, device):
    for columns in (300, 9000):  # a row of one program, and one that programs share
        check(torch.randn(1, columns, device=device), {"top_p": 0.99}, seed)


@pytest.mark.parametrize("columns", (6144, 9001))
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"temperature": 0}, {"temperature": torch.tensor([0.0])}], ids=str
)
def test_programs_share_a_wide_row(options, columns, device):
    with mock.patch.object(kernel, "num_sms", lambda device: 4):
        assert kernel._parts(1, columns, torch.device(device)) == (4 if columns > 8000 else 1)
    with mock.patch.object(kernel, "num_sms", lambda device: 8):
        x = 2 * torch.randn(2, columns, device=device)
        x[0, [columns - 3, columns - 1]] = x[0].amax()  # the first of equal ones, in two parts
        check(x, {name: v.expand(2) if isinstance(v, torch.Tensor) else v for name, v in options.items()})
        for place, value in ((5000, math.nan), (5000, math.inf), (slice(None), -math.inf)):
            x[1, place] = value
            check(x, options if "temperature" not in options else {})


def test_rows_of_any_layout(device):
    x = torch.randn(6, 300, device=device)
    for view in (x[::2, 3:290], x.T.contiguous().T, x[:1].expand(4, 300), x[:, ::3], x[:0], x[:1, :1].expand(3, 1)):
        check(view, {"top_k": 20})
    seed = torch.tensor([3, 9, 5], device=device)[::2]  # not contiguous
    assert torch.equal(ops.sample(x, seed=seed, backend="triton"), ops.sample(x, seed=seed, backend="reference"))


def test_tokens_fall_with_their_probabilities(device):
    rows, logits = 300, torch.tensor([0.6, -1.0, 0.9, 0.1])
    expected = filtered(logits, top_p=0.9, temperature=0.8)
    drawn = ops.sample(logits.to(device).expand(rows, -1), seed=1, backend="triton", top_p=0.9, temperature=0.8)
    counts = torch.bincount(drawn.cpu(), minlength=4)
    live = expected > 0
    assert counts[~live].sum() == 0 and live.sum() == 3
    assert ((counts - rows * expected)[live] ** 2 / (rows * expected[live])).sum() < 13.8  # 99.9% of chi-squared with 2


@triton.jit
def _gumbel_kernel(word_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, kernel_gumbel(tl.load(word_ptr + i)))


@triton.jit
def _noise_kernel(seed_ptr, out_ptr, row, start, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), kernel_noise(seed_ptr, row, start, BLOCK))


kernel_gumbel, kernel_noise = kernel.gumbel, kernel.noise_of


def gumbel(words):
    """In the kernel, of words in [0, 2^32) as int64."""
    out = torch.empty(words.shape, dtype=torch.float32, device=words.device)
    _gumbel_kernel[(1,)](words.to(torch.int32), out, BLOCK=words.numel())
    return out


def test_noise_has_its_digits_and_is_philoxs(device):
    ends = 2 ** torch.arange(32, device=device)
    words = torch.cat(
        (
            torch.randint(2**32, (64,), device=device),
            ends,
            ends - 1,
            2**32 - ends,
            2**32 - 1 - ends,
            ends * 0 + 3,
            ends * 0,
        )
    )
    words = torch.cat((words, words, words[:128])).reshape(-1)[:512]
    u = np.minimum(
        (words.cpu().numpy().astype(np.float32) + np.float32(0.5)) * np.float32(2**-32), np.float32(1 - 2**-24)
    )
    want = torch.from_numpy(-np.log(-np.log1p(-u.astype(np.float64))))
    error = (gumbel(words).cpu().double() - want).abs()
    # In units of the last place, of 1 where the noise is near 0: there it is of the waiting time, which is near 1.
    most = 1.5 if device == "cpu" else 4  # a GPU's division is rounded to 2
    assert (error / (2.0**-23 * want.abs().clamp_min(1))).max() < most

    for seed, row, start in ((-5, 3, 8), (2**40 + 3, 2**20, 4096)):
        key = torch.tensor([seed, 2**33 + 7], device=device)
        out = torch.empty(64, device=device)
        _noise_kernel[(1,)](key, out, row, start, BLOCK=64)
        group = torch.arange(start // 4, start // 4 + 16, device=device)
        counter = [group, *(torch.full_like(group, c) for c in (row, 0x73616D70, 7))]
        assert torch.equal(out, gumbel(torch.stack(philox(key[0], *counter), -1).flatten()))


class _Calls(TorchDispatchMode):
    """Those that launch something, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "alias" in str(func) or "empty" in str(func)):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_torch_does_little_beside_it_and_waits_for_nothing(device):
    """A token of decoding costs what is launched; the reference's noise alone is 190 calls."""
    x, seed = torch.randn(2, 300, device=device).bfloat16(), torch.tensor([1, 2], device=device)
    for options, most in (
        ({}, 0),
        ({"min_p": 0.1}, 0),
        ({"top_k": 5}, 5),
        ({"top_p": 0.9}, 20),
        ({"top_k": 5, "top_p": 0.9}, 25),
    ):
        with mock.patch.object(kernel, "draw", lambda logits, *_: (logits, logits)), _Calls() as calls:
            ops.sample(x, seed=seed, backend="triton", **options)
        assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(calls.names)
        names = [name for name in calls.names if name not in ("sample", "promote_types")]
        assert len(names) <= most, names


@contextlib.contextmanager
def planted(old, new):
    with planted_bug("sample", old, new, file="sample"):
        module = importlib.import_module("_planted_kernels.sample")
        with mock.patch.dict(sys.modules, {"fastlm.kernels.sample": module}):
            yield


BUGS = {
    "another stream": ("tl.constexpr(0x73616D70)", "tl.constexpr(0x73616D71)"),
    "words in another order": (
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
    "the same noise in each tile": ("c0 = start // 4 +", "c0 ="),
    "the same noise in each row": ("zero + row, zero + _STREAM", "zero, zero + _STREAM"),
    "the offset's upper half": ("(tl.load(seed_ptr + 1) & 0xFFFFFFFF)", "(tl.load(seed_ptr + 1) >> 32)"),
    "the threshold is out": ("(x >= threshold)", "(x > threshold)"),
    "thresholds that do not lie side by side": ("threshold.contiguous()", "threshold"),
    "no min-p": ("& (s >= floor)", ""),
    "no temperature": ("s = below * factor", "s = below"),
    "the last columns are not drawn": ("if full < end:\n        state", "if full > end:\n        state"),
    "the last of equal ones": ("tl.where(x > tops, col, places)", "tl.where(x >= tops, col, places)"),
    "probability after temperature": ("sums += tl.exp(below)", "sums += tl.exp(below * factor)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug, device):
    x = torch.randn(8, 5003, device=device).round(decimals=1)
    x[0, [10, 10 + 2048]] = 9.0  # in the same lane of two tiles
    options = {"temperature": torch.tensor([0.0, *7 * [0.6]]), "top_k": 400, "min_p": 0.02}
    check(x, options, (5, 2**33 + 1))
    with planted(*BUGS[bug]), pytest.raises(AssertionError):
        check(x, options, (5, 2**33 + 1))


def test_what_it_cannot_serve(device):
    with pytest.raises(ValueError, match="kernels take float32, bfloat16, float16, got float64"):
        ops.sample(torch.zeros(2, 5, dtype=torch.float64, device=device), backend="triton")
    with pytest.raises(ValueError, match=r"fewer than 2\^30 logits"):
        ops.sample(torch.zeros(1, 1, device=device).expand(1, 2**30), backend="triton")
