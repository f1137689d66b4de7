"""Training with little memory ends where fp32 training ends: closer to it than runs with other seeds are to each other."""

import inspect

import pytest
import torch

import fastlm
from fastlm import optim
from fastlm.models import TransformerConfig

LENGTH, BATCH = 32, 4
KINDS = {
    "fp32": (torch.float32, {}),
    "8 bits": (torch.float32, {"state_bits": 8}),
    "stochastic": (torch.bfloat16, {"precision": "stochastic"}),
    "remainder": (torch.bfloat16, {"precision": "remainder"}),
    "8 bits, remainder": (torch.bfloat16, {"precision": "remainder", "state_bits": 8}),
    "8 bits, stochastic": (torch.bfloat16, {"precision": "stochastic", "state_bits": 8}),
}


def _windows(text, starts):
    return text[starts[:, None] + torch.arange(LENGTH + 1)]


def held_out_loss(kind, seed, steps, modules=(inspect,)):
    """Of a tiny transformer after `steps` steps on the text of Python's own modules, the kind of text of the default corpus."""
    dtype, options = KINDS[kind]
    text = torch.tensor(list("".join(map(inspect.getsource, modules)).encode())).clamp(max=127)
    train, held_out = text[:-12000], _windows(text[-12000:], torch.arange(0, 11900, 61))
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=128, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=128, max_positions=LENGTH
    )
    model = fastlm.Transformer(config).to(dtype)
    # A short memory of the second moment: 1 / (1 - beta2) is well below the number of steps, as in real runs.
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), max_norm=1.0, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * optim.cosine(step, steps, warmup=10, floor=0.1)
        tokens = _windows(train, torch.randint(0, len(train) - LENGTH, (BATCH,)))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped == 0
    if options.get("state_bits") == 8:
        codes = [s["exp_avg"].dtype == torch.int8 for s in optimizer.state.values()]
        assert sum(codes) >= 6, "too few parameters are large enough for 8-bit codes"
    with torch.no_grad():
        return model.float().loss(held_out[:, :-1], held_out[:, 1:]).item()


def _check(kinds, seeds, steps, modules=(inspect,)):
    plain = [held_out_loss("fp32", seed, steps, modules) for seed in seeds]
    spread = max(plain) - min(plain)
    for kind in kinds:
        found = [held_out_loss(kind, seed, steps, modules) for seed in seeds]
        apart = abs(sum(found) - sum(plain)) / len(seeds)
        assert apart < spread, f"{kind}: {found} beside {plain} in fp32"


def test_8_bit_states_end_within_the_spread_of_two_seeds():
    _check(["8 bits"], seeds=(0, 1), steps=60)


@pytest.mark.slow
def test_every_mode_ends_within_the_spread_of_seeds():
    import argparse
    import ast
    import typing

    _check([k for k in KINDS if k != "fp32"], seeds=(0, 1), steps=300, modules=(inspect, argparse, ast, typing))
