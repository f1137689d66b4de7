"""What happens between steps: who has gradients, what users do to groups and states. Always what torch's AdamW does."""

import random
import subprocess
import sys
import weakref

import pytest
import torch

from fastlm.optim import SGD, AdamW, Lion

SHAPES = [(3, 4), (5,), (4, 2), (), (6,), (2, 2)]
OPTIONS = {"lr": 0.05, "weight_decay": 0.1}


def _pair(seed):
    torch.manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    pair = []
    for cls, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        pair.append(cls([{"params": params[:2]}, {"params": params[2:5], "weight_decay": 0.3}], **OPTIONS))
    return ours, theirs, pair


def _forget(optimizer, p, how):
    if p not in optimizer.state:
        return
    if how == "delete":
        del optimizer.state[p]
    elif how == "replace":
        optimizer.state[p] = {}
    elif how == "empty":
        optimizer.state[p].clear()
    elif how == "step":
        optimizer.state[p]["step"] = torch.tensor(7.0)
    else:
        optimizer.state.clear()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_changes_between_steps(seed):
    chance = random.Random(seed)
    ours, theirs, pair = _pair(seed)
    added = False
    for number in range(24):
        event = chance.choice(
            ["none", "none", "some", "delete", "replace", "empty", "step", "clear", "load", "lr", "add"]
        )
        moving = [chance.random() < 0.6 if event == "some" else True for _ in SHAPES]
        which = chance.randrange(5)
        for optimizer, params in zip(pair, (ours, theirs)):
            if event in ("delete", "replace", "empty", "step", "clear"):
                _forget(optimizer, params[which], event)
            elif event == "load":
                optimizer.load_state_dict(optimizer.state_dict())
            elif event == "lr":
                optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
            elif event == "add" and not added:
                optimizer.add_param_group({"params": params[5:], "lr": 0.2})
        added = added or event == "add"
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.randn(p.shape) if moving[i] else None
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in pair:
            optimizer.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            mine, other = (o.state.get(t, {}) for o, t in zip(pair, (p, q)))
            assert mine.keys() == other.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_parameter_that_changes_its_dtype():
    """By its data, as .to() does. Rounded to nearest its weight would stand still."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(64)) for _ in range(2)]
    optimizer = AdamW(params, lr=1e-4, precision="stochastic")

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    params[1].data = params[1].data.bfloat16()
    for _ in range(50):
        step()
    assert params[1].dtype == torch.bfloat16 and optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(params[1].float().mean(), params[0].mean(), rtol=0, atol=1e-3)
    assert params[1].float().mean() < 0.998


def test_states_that_are_cleared_are_freed():
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = AdamW([p])
    p.grad = torch.ones(8)
    optimizer.step()
    gone = weakref.ref(optimizer.state[p]["exp_avg"])
    optimizer.state.clear()
    assert gone() is None
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("cls", (AdamW, SGD, Lion))
def test_steps_are_counted_in_fp32(cls):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = torch.nn.Parameter(torch.ones(5000))
        optimizer = cls([p], lr=1e-3, state_bits=8, **({"momentum": 0.9} if cls is SGD else {}))
        p.grad = torch.ones(5000)
        optimizer.step()
        assert optimizer.state[p]["step"].dtype == torch.float32
        again = cls([p], lr=1e-3, **({"momentum": 0.9} if cls is SGD else {}))
        again.load_state_dict(optimizer.state_dict())
        assert again.state[p]["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_imported_under_another_default_device():
    code = """
import torch
with torch.device("meta"):
    from fastlm.optim import AdamW
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = AdamW([p], lr=0.1, skip_nonfinite=False)
optimizer.step()
assert p.isfinite().all() and optimizer.state[p]["step"] == 1, (p, optimizer.state[p])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
