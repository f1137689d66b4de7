"""2:4 sparsity: which weights are kept, bit for bit; the module; what is said where there is no gain."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastlm.nn import SparseLinear24, prune_2_4, sparse_gain
from fastlm.nn.sparse import SparseGain, why_not_sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_two_of_four_are_kept_bit_for_bit(dtype):
    weight = torch.randn(6, 5, 20).to(dtype)
    pruned, mask = prune_2_4(weight)
    for row, kept, chosen in zip(weight.view(-1, 4), pruned.view(-1, 4), mask.view(-1, 4)):
        values = row.abs().tolist()
        best = sorted(range(4), key=lambda i: (-values[i], i))[:2]
        assert chosen.nonzero().flatten().tolist() == sorted(best)
        for i in range(4):
            want = row[i] if i in best else torch.zeros((), dtype=dtype)
            assert torch.equal(kept[i].view(1).view(torch.uint8), want.view(1).view(torch.uint8))
    again, same = prune_2_4(pruned)
    assert torch.equal(again, pruned) and torch.equal(same & (pruned != 0), mask & (pruned != 0))


def test_every_order_ties_nan_and_strides():
    fours = torch.tensor(list(product((-2.0, 0.0, 1.0, 2.0), repeat=4)))
    pruned, mask = prune_2_4(fours)
    assert (mask.sum(1) == 2).all()
    assert torch.equal(pruned.abs().sum(1), fours.abs().sort(1).values[:, 2:].sum(1))
    assert prune_2_4(torch.tensor([1.0, -1.0, 1.0, 1.0]))[1].tolist() == [True, True, False, False]
    assert prune_2_4(torch.tensor([1.0, float("nan"), 3.0, 2.0]))[1].tolist() == [False, True, True, False]
    weight = torch.randn(8, 12)
    assert torch.equal(prune_2_4(weight.t().contiguous().t())[0], prune_2_4(weight)[0])
    assert prune_2_4(torch.empty(0, 8))[0].shape == (0, 8)


def test_module_is_the_masked_linear(device):
    linear = torch.nn.Linear(24, 10, device=device)
    module = SparseLinear24.from_linear(linear)
    pruned, mask = prune_2_4(linear.weight)
    x = torch.randn(3, 24, device=device)
    torch.testing.assert_close(module(x), F.linear(x, pruned, linear.bias))
    assert torch.equal(module.weight, pruned) and torch.equal(module.mask, mask)
    assert set(module.state_dict()) == {"weight", "bias"}
    plain = torch.nn.Linear(24, 10, device=device)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(plain(x), module(x))


def test_zeros_stay_zero_in_training(device):
    module = SparseLinear24(16, 8, bias=False, device=device)
    mask = module.mask.clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    before = module.weight.detach().clone()
    for _ in range(3):
        module(torch.randn(5, 16, device=device)).square().sum().backward()
        assert (module.weight.grad[~mask] == 0).all()
        optimizer.step()
    assert (module.weight[~mask] == 0).all() and not torch.equal(module.weight, before)
    assert torch.equal(copy.deepcopy(module).mask, mask)
    module.weight.data[~mask] = 100.0  # whatever is put there is not seen
    with torch.no_grad():
        x = torch.randn(5, 16, device=device)
        torch.testing.assert_close(module(x), F.linear(x, torch.where(mask, module.weight, 0)))
    module.prune()
    assert not torch.equal(module.mask, mask)


def test_momentum_from_before_the_pruning_is_not_seen(device):
    module, x = SparseLinear24(16, 8, bias=False, device=device), torch.randn(5, 16, device=device)
    module.mask.fill_(True)  # as dense as nn.Linear
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        module(x).square().sum().backward()
        optimizer.step()
        if step == 1:
            module.prune()
    assert (module.weight[~module.mask] != 0).any()  # it moves on
    kept = torch.where(module.mask, module.weight, 0)
    assert torch.equal(module(x), F.linear(x, kept)) and torch.equal(module.state_dict()["weight"], kept)
    again = SparseLinear24(16, 8, bias=False, device=device)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x)) and torch.equal(again.mask & (kept != 0), kept != 0)
    whole = copy.deepcopy(torch.nn.Sequential(module))
    assert torch.equal(whole.state_dict()["0.weight"], kept)
    assert module.state_dict(keep_vars=True)["weight"] is module.weight


def test_loading_by_assignment_leaves_the_callers_tensor(device):
    given = torch.randn(8, 16, device=device)
    before = given.clone()
    module = SparseLinear24(16, 8, bias=False, device=device)
    module.load_state_dict({"weight": given}, assign=True)
    assert torch.equal(given, before)
    assert torch.equal(module.weight, prune_2_4(before)[0]) and module.weight.requires_grad
    with torch.device("meta"):
        module = SparseLinear24(16, 8, bias=False)
    module.load_state_dict({"weight": given}, assign=True)
    assert torch.equal(given, before) and torch.equal(module.mask, prune_2_4(before)[1])


def test_from_linear_keeps_mode_and_gradients(device):
    linear = torch.nn.Linear(16, 8, device=device).eval()
    linear.weight.requires_grad_(False)
    module = SparseLinear24.from_linear(linear)
    assert not module.training and not module.weight.requires_grad and module.bias.requires_grad
    assert SparseLinear24.from_linear(linear.train()).training


def test_the_compressed_weight_follows(device, monkeypatch):
    made = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: made.append(dense) or dense)
    module = SparseLinear24(16, 8, device=device).requires_grad_(False)
    assert module._compressed_weight() is module._compressed_weight() and len(made) == 1
    module.weight.mul_(2)
    assert torch.equal(module._compressed_weight(), module.weight) and len(made) == 2
    module.weight.data = module.weight.data.clone() * 2  # other memory
    assert torch.equal(module._compressed_weight(), module.weight) and len(made) == 3
    module.weight.data.mul_(2)  # no trace but the values
    module.prune()
    assert torch.equal(module._compressed_weight(), module.weight) and len(made) == 4


def test_no_gain_on_a_cpu_is_said():
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    found = sparse_gain(weight, 16)
    assert found.gain is None and "need a CUDA GPU, the weight is on cpu" in found.reason
    assert str(found) == f"2:4 sparse product, 16 rows: no gain: {found.reason}"
    assert (
        str(SparseGain(8, 2.0, 1.0, 2.0, None)) == "2:4 sparse product, 8 rows: 2.00x: dense 2.000 ms, sparse 1.000 ms"
    )
    assert "no gain (0.50x)" in str(SparseGain(8, 1.0, 2.0, 0.5, None))


@pytest.mark.gpu
def test_sparse_kernels_equal_the_dense_product():
    module = SparseLinear24(256, 128, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    assert why_not_sparse(module.weight) is None
    x = torch.randn(40, 256, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=2e-2, atol=2e-2)
    first = module._compressed[1]
    module(x)
    assert module._compressed[1] is first
    module.weight.mul_(2)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=2e-2, atol=2e-2)
    assert sparse_gain(module.weight, 64, calls=5).gain > 0


def test_errors():
    with pytest.raises(ValueError, match=r"prune_2_4: weight must be \[..., D\] with D a multiple of 4, got \[3, 6\]"):
        prune_2_4(torch.randn(3, 6))
    with pytest.raises(
        TypeError, match="prune_2_4: weight must be float16, .*, got torch.int64: prune the weight first"
    ):
        prune_2_4(torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="got torch.float8_e4m3fn: prune the weight first and quantize"):
        prune_2_4(torch.ones(4).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="SparseLinear24: in_features must be a multiple of 4, got 6"):
        SparseLinear24(6, 4)
    with pytest.raises(ValueError, match=r"sparse_gain: weight must be \[F, D\], got \[4\]"):
        sparse_gain(torch.randn(4), 1)
