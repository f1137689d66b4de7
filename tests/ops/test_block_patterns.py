"""The patterns of BlockMask and top_blocks, against their formulas written out pair by pair."""

import math

import pytest
import torch

from fastlm.ops.block_mask import BlockMask

BLOCKS = (16, (16, 32), (32, 16))


def _dense(S, T, seen):
    """bool [S, T] of seen(place, key) for one pair at a time, place being q + T - S."""
    return torch.tensor([[bool(seen(q + T - S, k)) for k in range(T)] for q in range(S)]).view(S, T)


# Each pattern as a formula of one query's key position p and one key k; `causal` adds k <= p.
PATTERNS = {
    "local": (lambda S, T, **o: BlockMask.local(S, T, before=9, after=4, **o), lambda p, k: -4 <= p - k <= 9),
    "before": (lambda S, T, **o: BlockMask.local(S, T, before=0, **o), lambda p, k: k >= p),
    "after": (lambda S, T, **o: BlockMask.local(S, T, after=20, **o), lambda p, k: k <= p + 20),
    "strided": (
        lambda S, T, **o: BlockMask.strided(S, T, stride=7, **o),
        lambda p, k: abs(p - k) <= 7 or abs(p - k) % 7 == 0,
    ),
    "fixed": (
        lambda S, T, **o: BlockMask.strided(S, T, stride=8, summary=2, **o),
        lambda p, k: math.floor(p / 8) == math.floor(k / 8) or k % 8 in (6, 7),
    ),
    "longformer": (
        lambda S, T, **o: BlockMask.longformer(S, T, window=5, global_tokens=3, **o),
        lambda p, k: abs(p - k) <= 5 or k < 3 or 0 <= p < 3,
    ),
    "longformer-places": (
        lambda S, T, **o: BlockMask.longformer(S, T, window=0, global_tokens=[30, 2], **o),
        lambda p, k: p == k or k in (2, 30) or p in (2, 30),
    ),
    "longformer-window": (
        lambda S, T, **o: BlockMask.longformer(S, T, window=3, global_tokens=0, **o),
        lambda p, k: abs(p - k) <= 3,
    ),
}


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("size", [(37, 53), (53, 37), (40, 40)], ids=str)
@pytest.mark.parametrize("make, formula", PATTERNS.values(), ids=PATTERNS)
def test_patterns(make, formula, size, causal, device):
    mask = make(*size, causal=causal, block=(16, 32), device=device)
    assert mask.block == (16, 32) and mask.lengths == size and mask.row_count.device.type == device
    want = _dense(*size, lambda p, k: formula(p, k) and (k <= p or not causal))
    assert torch.equal(mask.to_dense()[0, 0].cpu(), want)


def test_keys_are_as_many_as_queries_by_default():
    for mask in (
        BlockMask.local(40, before=3, block=16),
        BlockMask.strided(40, stride=5, block=16),
        BlockMask.longformer(40, window=3, block=16),
        BlockMask.bigbird(40, block=16),
    ):
        assert mask.lengths == (40, 40) and mask.to_dense()[0, 0].diagonal().all()


def _places(i, S, T, bq):
    return [q + T - S for q in range(i * bq, min((i + 1) * bq, S))]


@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("size", [(160, 160), (100, 170), (170, 100)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bigbird(block, size, causal, whole, device):
    (S, T), heads, drawn = size, 3, 2
    mask = BlockMask.bigbird(
        S, T, window=1, global_blocks=whole, random_blocks=drawn, heads=heads, causal=causal, block=block, device=device
    )
    dense, (bq, bk) = mask.to_dense()[0].cpu(), mask.block
    assert mask.row_count.device.type == device and len(dense) == heads
    for i in range(math.ceil(S / bq)):
        places = _places(i, S, T, bq)
        on = {p // bk for p in places}
        fixed = {j for j in range(math.ceil(T / bk)) if j < whole or min(on) - 1 <= j <= max(on) + 1}
        if any(0 <= p < whole * bk for p in places):
            fixed = set(range(math.ceil(T / bk)))
        for h in range(heads):
            part = dense[h, i * bq : (i + 1) * bq]
            if causal:
                allowed = torch.arange(T) <= torch.tensor(places)[:, None]
                assert not (part & ~allowed).any()
            else:
                allowed = torch.ones_like(part)
            live = set()
            for j in range(math.ceil(T / bk)):
                here, may = part[:, j * bk : (j + 1) * bk], allowed[:, j * bk : (j + 1) * bk]
                assert not here.any() or torch.equal(here, may)
                live |= {j} if here.any() else set()
            possible = {j for j in range(math.ceil(T / bk)) if j * bk <= max(places) or not causal}
            assert fixed & possible <= live
            assert len(live - fixed) == min(drawn, len(possible - fixed))


def test_bigbird_draws_by_seed_and_head():
    def dense(**options):
        return BlockMask.bigbird(512, block=16, heads=2, **options).to_dense()[0]

    first, again, other = dense(seed=1), dense(seed=1), dense(seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])
    none = dense(random_blocks=0, global_blocks=0, window=0)
    assert torch.equal(none[0], torch.block_diag(*[torch.ones(16, 16)] * 32).bool())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("size", [(80, 80), (36, 100), (100, 36)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_top_blocks(block, size, causal, count, device):
    (S, T), groups = size, 2
    # Small whole numbers in blocks of 4, 16 or 32, so that means are exact and ties are real.
    q = torch.randint(-4, 5, (2, S, 4, 8), device=device).float()
    k = torch.randint(-4, 5, (2, T, 2, 8), device=device).to(torch.bfloat16)
    mask = BlockMask.top_blocks(q, k.float() if block == 16 else k, count, block=block, causal=causal)
    dense, (bq, bk) = mask.to_dense().cpu(), mask.block
    q, k = q.double().cpu(), k.double().cpu()
    for b in range(2):
        for h in range(4):
            for i in range(math.ceil(S / bq)):
                places = _places(i, S, T, bq)
                mean = q[b, i * bq : (i + 1) * bq, h].mean(0)
                score, kept = {}, set()
                for j in range(math.ceil(T / bk)):
                    if causal and j * bk > max(places):
                        continue
                    score[j] = float(mean @ k[b, j * bk : (j + 1) * bk, h // groups].mean(0))
                    if causal and min(places) // bk <= j <= max(places) // bk:
                        kept.add(j)
                for j in sorted(score, key=lambda j: -score[j]):
                    if j not in kept and len(kept) < count:
                        kept.add(j)
                live = {j for j in range(math.ceil(T / bk)) if dense[b, h, i * bq, j * bk]}
                assert live == kept, (b, h, i)


def test_top_blocks_are_chosen_in_fp32(device):
    q = torch.ones(1, 32, 2, 16, device=device, requires_grad=True)
    k = torch.ones(1, 48, 1, 16, device=device)
    k[:, 16:32] += 2**-12  # in bf16 all three blocks would score the same, and the first would win
    plain = BlockMask.top_blocks(q, k, 1, block=16)
    with torch.autocast(device, torch.bfloat16):
        cast = BlockMask.top_blocks(q, k, 1, block=16)
    assert plain.row_index.unique().tolist() == cast.row_index.unique().tolist() == [1]
    assert BlockMask.top_blocks(q, k, 100, block=16).to_dense().all()  # more than there are
