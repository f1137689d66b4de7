"""What happens between steps: who has gradients, what users do to groups and states. Always what torch's AdamW does."""

import random

import pytest
import torch

from fastlm.optim import AdamW

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
