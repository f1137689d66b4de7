"""Attention where reviewers broke it: sizes, values and tiles that no pair of features shows."""

import sys

import pytest
import torch

from fastlm import ops
from fastlm.testing import check_accuracy, poison_empty
from tests.ops import attention_matrix as matrix


def _qkv(S, T, B=2, H=2, H_kv=1, D=16, device="cpu"):
    return [torch.randn(B, n, heads, D, device=device) for n, heads in ((S, H), (T, H_kv), (T, H_kv))]


def _agree(q, k, v, **options):
    """Outputs, lse and all gradients of the kernels are those of the reference."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    leaves += [x.requires_grad_() for x in options.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    found = []
    for backend in ("triton", "reference"):
        out, lse = ops.attention(q, k, v, **options, return_lse=True, backend=backend)
        loss = out.square().sum() + lse.masked_fill(lse == float("-inf"), 0).sum()
        found.append((out, lse, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("machine", [80, 90])
@pytest.mark.parametrize("name", ["bias", "T5 relative bias"])
def test_tiles_across_many_rows_of_blocks(name, machine, device, monkeypatch):
    """The bias kernels' own tiles on a GPU are four blocks of 16 high; the interpreter's are one."""
    from fastlm.kernels import attention_bias_bwd

    if device == "cpu":  # a GPU takes its own in every run
        monkeypatch.setattr(attention_bias_bwd, "generation", lambda device: machine)
    case, args, dtype = matrix.case_of(("block mask", name, "causal"), device)
    check_accuracy(case, "triton", dtype, device, args)


@pytest.mark.parametrize(
    "window, same",
    [
        ((2**31 - 1, 2**31 - 1), None),
        ((sys.maxsize, 0), (None, 0)),
        ((0, sys.maxsize), (0, None)),
        ((2**30 - 1, 3), (None, 3)),
    ],
)
def test_endless_windows(window, same, device):
    q, k, v = _qkv(17, 23, device=device)
    for backend in ("reference", "torch", "triton"):
        got = ops.attention(q, k, v, window=window, backend=backend)
        assert torch.equal(got, ops.attention(q, k, v, window=same, backend=backend))


@pytest.mark.parametrize("cu", [[0, -1000, -1000, 20], [0, 9, 5, 20], [3, 9, 12, 18], [0, 5, 900, 20]])
def test_wrong_cu_seqlens_write_nothing_outside(cu, device):
    """Nobody checks them on a GPU: whatever they hold, rows of no sequence are 0 and nothing else is touched."""
    from fastlm.kernels.attention import attention_fwd
    from fastlm.kernels.attention_bwd import attention_bwd

    q, k, v = (x[0] for x in _qkv(20, 20, 1, device=device))
    call = matrix.call_of(q, k, v, cu_seqlens_q=torch.tensor([0, 5, 9, 20], device=device), causal=True)
    wrong = torch.tensor(cu, device=device)
    call = call._replace(extras=[call.extras[0], wrong, wrong, *call.extras[3:]])
    with poison_empty():
        o, lse = attention_fwd(*call)
        grads = attention_bwd(torch.ones_like(o), None, o, lse, [False] * 3, *call)[:3]
    assert all(torch.isfinite(x).all() for x in (o, *grads))
    if cu == [3, 9, 12, 18]:
        assert o[0, :3].count_nonzero() == 0 and grads[0][0, 18:].count_nonzero() == 0


def test_a_sink_of_minus_infinity_is_none(device):
    sinks, lengths = torch.tensor([float("-inf"), 0.5], device=device), torch.tensor([0, 9], device=device)
    _agree(*_qkv(17, 23, device=device), sinks=sinks, key_lengths=lengths)


def test_a_relative_bias_of_minus_infinity_hides(device):
    by_distance = torch.randn(2, 9, device=device)
    by_distance[:, 3], by_distance[0, :] = float("-inf"), float("-inf")
    q, k, v = _qkv(17, 23, device=device)
    got, want = (
        ops.attention(q, k, v, relative_bias=by_distance, return_lse=True, backend=b) for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want)
    assert torch.equal(got[0][:, :, 0], torch.zeros_like(got[0][:, :, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_hides_as_minus_infinity_does(dtype, device):
    q, k, v = _qkv(17, 23, device=device)
    hidden = torch.rand(2, 1, 17, 23, device=device) < 0.5
    hidden[:, :, 4] = True
    seen = torch.zeros(hidden.shape, dtype=dtype, device=device)
    for backend in ("reference", "torch", "triton"):
        got, want = (
            ops.attention(q, k, v, bias=seen.masked_fill(hidden, low), backend=backend)
            for low in (torch.finfo(dtype).min, float("-inf"))
        )
        assert torch.equal(got, want) and torch.equal(got[:, 4], torch.zeros_like(got[:, 4]))


def test_right_padding_moves_no_diagonal_without_causal(device):
    """A padded batch of an encoder with a window and a bias by distance gives what each row alone gives."""
    q, k, v = _qkv(17, 17, device=device)
    options = {"window": (3, 3), "relative_bias": torch.randn(2, 7, device=device)}
    lengths = torch.tensor([17, 9], device=device)
    for backend in ("reference", "torch", "triton"):
        whole = ops.attention(q, k, v, key_lengths=lengths, **options, backend=backend)
        alone = ops.attention(q[1:, :9], k[1:, :9], v[1:, :9], **options, backend=backend)
        torch.testing.assert_close(whole[1:, :9], alone)


def test_slopes_that_could_have_a_gradient_matter_only_where_one_is_taken(device):
    q, k, v = _qkv(5, 7, device=device)
    slopes = torch.ones(2, device=device, requires_grad=True)
    with torch.no_grad():
        ops.attention(q, k, v, alibi_slopes=slopes, backend="triton")


@pytest.mark.parametrize(
    "match, options",
    [
        ("bias must be a tensor", {"bias": [[0.0]]}),
        ("sinks must be a tensor", {"sinks": 1.0}),
        ("key_lengths must be a tensor", {"key_lengths": [3, 4]}),
        ("document_ids must be one tensor or a pair", {"document_ids": 5}),
        (r"document_ids of the queries must be \[2, 17\]", {"document_ids": torch.zeros(17, dtype=torch.int64)}),
        ("relative_bias must be floating point", {"relative_bias": torch.zeros(2, 5, dtype=torch.int64)}),
        ("needs a table", {"relative_bias": ops.RelativeBias(torch.zeros(8))}),
        ("seed must be an int", {"dropout_p": 0.5, "seed": 1.5}),
        ("scale must be finite", {"scale": float("nan")}),
        ("softcap must be > 0 or None: a normal number of fp32", {"softcap": float("inf")}),
        (r"pair \(left, right\)", {"window": (1.5, 0)}),
    ],
)
def test_errors(match, options):
    with pytest.raises((ValueError, TypeError), match=match):
        ops.attention(*_qkv(17, 23), **options)


def test_errors_of_shapes():
    q, k, v = _qkv(17, 23)
    with pytest.raises(ValueError, match="v must be"):
        ops.attention(q, k, v[..., :0])
    with pytest.raises(TypeError, match="k must be a tensor"):
        ops.attention(q, None, v)
    packed = [x[0] for x in (q, q[:, :, :1], q[:, :, :1])]
    cu = torch.tensor([0, 2, 17])
    mask = ops.BlockMask.from_blocks(torch.ones(1, 1, dtype=torch.bool), 14, 14, block=16)
    for name, value in (("bias", torch.zeros(14, 15)), ("block_mask", mask)):
        with pytest.raises(ValueError, match=f"{name} covers"):
            ops.attention(*packed, cu_seqlens_q=cu, **{name: value})


def test_every_seed_of_torch_is_taken(device):
    q, k, v = _qkv(5, 7, device=device)
    for seed in (2**64 - 1, 2**63, -(2**63), 0):
        ops.attention(q, k, v, dropout_p=0.5, seed=seed, backend="triton")
