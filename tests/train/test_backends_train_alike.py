"""200 steps with the kernels and 200 with the reference end closer to each other than two seeds do."""

import inspect
import itertools
from contextlib import nullcontext

import pytest
import torch

import fastlm
from fastlm.models import TransformerConfig
from fastlm.ops import use_backend
from fastlm.optim import AdamW

pytest.importorskip("triton")
STEPS, EVERY, LENGTH = 200, 50, 16


def _windows(text, starts):
    return text[starts[:, None] + torch.arange(LENGTH + 1)]


def _run(seed, backend, device, autocast):
    """Held-out losses of a tiny model after every 50 of 200 steps on the text of a Python module."""
    text = torch.tensor(list(inspect.getsource(inspect).encode())).clamp(max=127)
    train, held_out = text[:-8000], _windows(text[-8000:], torch.arange(0, 7900, 31)).to(device)
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=128, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48, max_positions=LENGTH
    )
    model = fastlm.Transformer(config).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(1, STEPS + 1):
        tokens = _windows(train, torch.randint(0, len(train) - LENGTH, (2,))).to(device)
        with use_backend(backend):
            with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
                loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(model.loss(held_out[:, :-1], held_out[:, 1:]).item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16 autocast"]
)
def test_kernels_and_reference_train_alike(autocast, device):
    seeds = [_run(seed, "reference", device, autocast) for seed in range(4)]
    ours = _run(0, "triton", device, autocast)
    assert ours[-1] < ours[0] - 0.1, "the model did not learn"
    between_seeds = torch.stack([(a - b).abs() for a, b in itertools.combinations(seeds, 2)])
    gap, usual = (ours - seeds[0]).abs(), between_seeds.median(0).values
    print(f"held-out loss {ours.tolist()}\n  gap {gap.tolist()}\n  between seeds {usual.tolist()}")
    assert (gap < usual).all()
