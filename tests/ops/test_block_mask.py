"""BlockMask against dense masks, formulas written out query by query, and counts known by hand."""

import math

import pytest
import torch

from fastlm.ops.block_mask import BlockMask

BLOCKS = (16, (16, 32), (32, 16))
SIZES = [(37, 53), (53, 37), (32, 64), (1, 1), (5, 70)]


def _masks(S, T, device):
    """Masks [Bm, Hm, S, T] of all kinds: random with empty rows, columns and blocks, whole blocks, all, nothing."""
    random = torch.rand(2, 3, S, T, device=device) < 0.3
    holes = random.clone()
    holes[:, :, S // 3 : S // 2] = False
    holes[:, :, :, T // 4 : 3 * T // 4] = False
    full = torch.ones(1, 1, S, T, dtype=torch.bool, device=device)
    mixed = full.repeat(2, 1, 1, 1)
    mixed[1, :, : S // 2, : T // 2] = False
    mixed[:, :, S - 1, T - 1] = False
    return {"random": random, "holes": holes, "all": full, "nothing": ~full, "mixed": mixed}


def _lists(count, partial, index, pattern, at):
    """The list at one row or column, as ({block: pattern} of the partial ones, [full ones]), its layout checked."""
    n, p = int(count[at]), int(partial[at])
    index, pattern = index[at].tolist(), pattern[at].tolist()
    assert 0 <= p <= n and not any(index[n:]) and not any(pattern[p:])
    assert index[:p] == sorted(index[:p]) and index[p:n] == sorted(index[p:n])
    return dict(zip(index[:p], pattern[:p])), index[p:n]


def _check(mask):
    """The layout that kernels rely on, and equal rows and columns."""
    tensors = mask.tensors()
    assert all(t.is_contiguous() and t.dtype is torch.int32 for t in tensors[:8])
    patterns = tensors[8]
    assert patterns.dtype is torch.uint8 and tuple(patterns.shape[1:]) == mask.block and int(patterns.max()) <= 1
    (S, T), (block_q, block_k) = mask.lengths, mask.block
    Bm, Hm = mask.row_count.shape[:2]
    nQ, nK = math.ceil(S / block_q), math.ceil(T / block_k)
    assert tuple(mask.row_count.shape) == (Bm, Hm, nQ) and tuple(mask.column_count.shape) == (Bm, Hm, nK)
    assert mask.row_index.shape[-1] == max(1, int(mask.row_count.max()) if nQ else 0)
    assert mask.column_index.shape[-1] == max(1, int(mask.column_count.max()) if nK else 0)
    rows, columns, used = set(), set(), set()
    for b in range(Bm):
        for h in range(Hm):
            for i in range(nQ):
                partial, full = _lists(*tensors[:4], (b, h, i))
                rows |= {(b, h, i, j, p) for j, p in partial.items()} | {(b, h, i, j, None) for j in full}
                used |= set(partial.values())
            for j in range(nK):
                partial, full = _lists(*tensors[4:8], (b, h, j))
                columns |= {(b, h, i, j, p) for i, p in partial.items()} | {(b, h, i, j, None) for i in full}
    assert rows == columns
    assert used == set(range(len(patterns))) or (not used and len(patterns) == 1)
    assert len(patterns.unique(dim=0)) == len(patterns)
    return rows


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_from_dense_and_back(size, block, device):
    for name, dense in _masks(*size, device).items():
        mask = BlockMask.from_dense(dense, block=block)
        assert torch.equal(mask.to_dense(), dense), name
        rows = _check(mask)
        assert mask.live_pairs == int(dense.sum())
        # Each block is what the dense mask says it is.
        bq, bk = mask.block
        for b, h, i, j, pattern in rows:
            part = dense[b, h, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            assert (pattern is None) == bool(part.all() and part.shape[1] == bk) and part.any()
        live = sum(
            bool(part.any())
            for b in dense.flatten(0, 1)
            for high in b.split(mask.block[0], 0)
            for part in high.split(mask.block[1], 1)
        )
        assert len(rows) == live and mask.density == live / sum(mask.counts)


def test_two_dimensions_and_any_strides(device):
    dense = (torch.rand(53, 37, device=device) < 0.5).t()
    mask = BlockMask.from_dense(dense, block=16)
    assert torch.equal(mask.to_dense(), dense[None, None])
    wide = dense.expand(2, 3, 37, 53)
    assert torch.equal(BlockMask.from_dense(wide, block=16).to_dense(), wide)


@pytest.mark.parametrize("size", [(0, 40), (40, 0), (0, 0)], ids=str)
def test_no_queries_or_no_keys(size, device):
    for mask in (
        BlockMask.from_dense(torch.ones(size, dtype=torch.bool, device=device), block=16),
        BlockMask.from_rule(lambda b, h, q, k: q >= k, *size, block=16, device=device),
        BlockMask.from_blocks(
            torch.ones([-(-n // 16) for n in size], dtype=torch.bool, device=device), *size, block=16
        ),
        BlockMask.longformer(*size, window=2, block=16, device=device),
        BlockMask.bigbird(*size, block=16, causal=True, device=device),
        BlockMask.top_blocks(*(torch.ones(1, n, 1, 8, device=device) for n in size), 2, block=16, causal=True),
    ):
        assert _check(mask) == set() and mask.to_dense().shape[2:] == size
        assert mask.density == 0 and mask.live_pairs == 0
        assert torch.equal((mask | mask).to_dense(), mask.to_dense())


def test_causal_by_hand(device):
    mask = BlockMask.local(128, causal=True, block=16, device=device)
    assert mask.counts == (28, 8, 28) and mask.density == 36 / 64
    assert torch.equal(mask.patterns, torch.ones(1, 16, 16, dtype=torch.uint8, device=device).tril())
    assert mask.row_count[0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] == mask.column_count[0, 0].flip(0).tolist()
    assert mask.row_index[0, 0, 3].tolist() == [3, 0, 1, 2, 0, 0, 0, 0]  # its partial block first
    assert mask.column_index[0, 0, 5].tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert mask.row_partial.unique().tolist() == mask.column_partial.unique().tolist() == [1]
    assert mask.live_pairs == 128 * 129 // 2


def test_ragged_edges_by_hand(device):
    # 37 queries, 53 keys: the last queries do not count, so the last row is full; keys past T make the last column partial.
    mask = BlockMask.from_blocks(torch.ones(3, 4, dtype=torch.bool, device=device), 37, 53, block=16)
    assert mask.counts == (9, 3, 0) and mask.to_dense().all() and mask.live_pairs == 37 * 53
    want = torch.zeros(2, 16, 16, dtype=torch.uint8, device=device)
    want[0, :, :5] = 1  # the upper rows of blocks
    want[1, :5, :5] = 1  # the last one, 5 queries high
    assert torch.equal(mask.patterns, want)
    assert mask.row_index[0, 0, 2].tolist() == [3, 0, 1, 2]
    dense = torch.ones(1, 1, 37, 53, dtype=torch.bool, device=device)
    assert all(torch.equal(x, y) for x, y in zip(mask.tensors(), BlockMask.from_dense(dense, block=16).tensors()))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_rule_of_sequence_head_query_and_key(block, device):
    document = torch.tensor([[0] * 20 + [1] * 33, [0] * 7 + [1] * 20 + [2] * 26], device=device)

    def rule(b, h, q, k):
        return (document[b, q] == document[b, k]) & (q - k <= 5 * h + 3)

    b, h, q, k = torch.meshgrid(*(torch.arange(n, device=device) for n in (2, 3, 37, 53)), indexing="ij")
    mask = BlockMask.from_rule(rule, 37, 53, batch=2, heads=3, block=block, device=device)
    _check(mask)
    assert torch.equal(mask.to_dense(), rule(b, h, q, k))
    other = BlockMask.from_dense(rule(b, h, q, k), block=block)
    assert all(torch.equal(x, y) for x, y in zip(mask.tensors(), other.tensors()))


def test_a_rule_sees_one_row_of_blocks_at_a_time(device):
    pairs, most = 0, 0

    def rule(b, h, q, k):
        nonlocal pairs, most
        assert b.dtype == h.dtype == q.dtype == k.dtype == torch.int64
        seen = (q + k + b + h) % 3 == 0
        pairs, most = pairs + seen.numel(), max(most, seen.numel())
        return seen

    mask = BlockMask.from_rule(rule, 150, 90, batch=2, heads=2, block=(32, 16), device=device)
    assert most == 32 * 90 and pairs == 4 * 150 * 90
    assert mask.live_pairs == 4 * 150 * 90 // 3


def test_a_rule_may_return_less_than_all_pairs(device):
    by_key = BlockMask.from_rule(lambda b, h, q, k: k < 20, 40, 40, block=16, device=device)
    assert torch.equal(by_key.to_dense()[0, 0], (torch.arange(40, device=device) < 20).expand(40, 40))
    always = BlockMask.from_rule(lambda b, h, q, k: b == 0, 32, 32, batch=2, block=16, device=device)
    assert always.to_dense()[0].all() and not always.to_dense()[1].any()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_from_blocks(block, heads, device):
    S, T = 37, 53
    bq, bk = (block, block) if isinstance(block, int) else block
    live = torch.rand(2, heads, math.ceil(S / bq), math.ceil(T / bk), device=device) < 0.5
    mask = BlockMask.from_blocks(live, S, T, block=block)
    _check(mask)
    want = live.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :S, :T]
    assert torch.equal(mask.to_dense(), want)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("size", [(37, 53), (32, 64)], ids=str)
def test_or_and(size, block, device):
    dense = _masks(*size, device)
    masks = {name: BlockMask.from_dense(x, block=block) for name, x in dense.items()}
    for a in masks:
        for b in masks:
            either, both = masks[a] | masks[b], masks[a] & masks[b]
            assert torch.equal(either.to_dense(), dense[a] | dense[b]), (a, b)
            assert torch.equal(both.to_dense(), dense[a] & dense[b]), (a, b)
        _check(masks["mixed"] | masks[a])
        _check(masks["mixed"] & masks[a])


def test_combined_parts_become_full_or_empty_again(device):
    # Two halves of a ragged mask make it whole: 37 queries, so that the last block is judged by its 5 queries.
    left = BlockMask.from_rule(lambda b, h, q, k: (q + k) % 2 == 0, 37, 48, block=16, device=device)
    right = BlockMask.from_rule(lambda b, h, q, k: (q + k) % 2 == 1, 37, 48, block=16, device=device)
    assert left.counts == (0, 9, 0) and len(left.patterns) == 2  # one for whole blocks, one for the last row
    assert (left | right).counts == (9, 0, 0) and (left & right).counts == (0, 0, 9)
    heads = BlockMask.from_dense(torch.rand(1, 3, 37, 48, device=device) < 0.5, block=16)
    batch = BlockMask.from_dense(torch.rand(2, 1, 37, 48, device=device) < 0.5, block=16)
    assert torch.equal((heads | batch).to_dense(), heads.to_dense() | batch.to_dense())


def test_to_tensors_and_repr(device):
    mask = BlockMask.local(40, 56, before=9, causal=True, block=(16, 32), device=device)
    names = ["count", "partial", "index", "pattern"]
    names = [f"{side}_{name}" for side in ("row", "column") for name in names] + ["patterns"]
    assert all(x is getattr(mask, name) for x, name in zip(mask.tensors(), names)) and len(mask.tensors()) == 9
    moved = mask.to("meta")
    assert all(x.device.type == "meta" for x in moved.tensors())
    assert (moved.lengths, moved.block) == (mask.lengths, mask.block)
    assert moved.to_dense().shape == (1, 1, 40, 56)  # no value is read
    assert BlockMask.from_dense(mask.to_dense().cpu(), block=16, device=device).row_count.device.type == device
    full, partial, empty = mask.counts
    assert (
        repr(mask)
        == f"BlockMask(S=40, T=56, block=(16, 32), batch=1, heads=1, density={mask.density:.3f}: {full} full, {partial} partial, "
        f"{empty} empty blocks, {len(mask.patterns)} patterns, device={mask.row_count.device})"
    )
    assert "0 patterns" in repr(BlockMask.from_blocks(torch.ones(2, 2, dtype=torch.bool), 32, 32, block=16))


def test_two_runs_are_equal_and_inputs_stay(device):
    dense = torch.rand(1, 2, 37, 53, device=device) < 0.4
    before = dense.clone()
    first, second = (BlockMask.from_dense(dense, block=16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.tensors(), second.tensors())) and torch.equal(dense, before)


MASK, SMALL = (
    torch.ones(37, 53, dtype=torch.bool),
    BlockMask.from_blocks(torch.ones(2, 2, dtype=torch.bool), 32, 32, block=16),
)
Q = torch.randn(1, 8, 4, 16)


@pytest.mark.parametrize(
    "error, words, call",
    [
        (
            TypeError,
            "from_dense: mask must be a bool tensor, got torch.float32",
            lambda: BlockMask.from_dense(MASK.float()),
        ),
        (TypeError, "from_dense: mask must be a bool tensor, got list", lambda: BlockMask.from_dense([[True]])),
        (ValueError, r"from_dense: mask must be \[S, T\].*got \[1, 37, 53\]", lambda: BlockMask.from_dense(MASK[None])),
        (ValueError, "from_dense: block must be 16.*got 24", lambda: BlockMask.from_dense(MASK, block=24)),
        (ValueError, r"block must be 16.*got \(16, 8\)", lambda: BlockMask.from_dense(MASK, block=(16, 8))),
        (ValueError, r"block must be 16.*got \(16,\)", lambda: BlockMask.from_dense(MASK, block=(16,))),
        (ValueError, "block must be 16.*got None", lambda: BlockMask.from_dense(MASK, block=None)),
        (ValueError, "from_rule: S must be an integer >= 0, got -1", lambda: BlockMask.from_rule(max, -1, 4)),
        (ValueError, "from_rule: T must be an integer >= 0, got 4.0", lambda: BlockMask.from_rule(max, 4, 4.0)),
        (ValueError, "from_rule: batch must be an integer >= 1", lambda: BlockMask.from_rule(max, 4, 4, batch=0)),
        (
            TypeError,
            "rule must return a bool tensor, got torch.int64",
            lambda: BlockMask.from_rule(lambda b, h, q, k: q - k, 4, 4),
        ),
        (TypeError, "rule must return a bool tensor, got bool", lambda: BlockMask.from_rule(lambda *_: True, 4, 4)),
        (
            ValueError,
            r"rule must return a tensor that broadcasts to \[4, 6\], got \[4, 5\]",
            lambda: BlockMask.from_rule(lambda b, h, q, k: (q >= k)[:, :5], 4, 6),
        ),
        (ValueError, r"from_blocks: live must end in \[1, 1\]", lambda: BlockMask.from_blocks(MASK, 37, 53)),
        (TypeError, "from_blocks: live must be a bool tensor", lambda: BlockMask.from_blocks(MASK.int(), 37, 53)),
        (ValueError, "local: before must be an integer >= -1, got -2", lambda: BlockMask.local(8, before=-2)),
        (ValueError, "local: S must be", lambda: BlockMask.local("8")),
        (ValueError, "strided: stride must be an integer >= 1", lambda: BlockMask.strided(8, stride=0)),
        (ValueError, "strided: summary must be an integer in 1..4", lambda: BlockMask.strided(8, stride=4, summary=5)),
        (ValueError, "longformer: window must be", lambda: BlockMask.longformer(8, window=-1)),
        (
            ValueError,
            r"longformer: global_tokens must be .* 0..7, got \[8\]",
            lambda: BlockMask.longformer(8, window=1, global_tokens=[8]),
        ),
        (
            ValueError,
            "longformer: global_tokens .* got -1",
            lambda: BlockMask.longformer(8, window=1, global_tokens=-1),
        ),
        (ValueError, "bigbird: random_blocks must be", lambda: BlockMask.bigbird(8, random_blocks=-1)),
        (ValueError, "bigbird: heads must be an integer >= 1", lambda: BlockMask.bigbird(8, heads=0)),
        (ValueError, "top_blocks: count must be an integer >= 1", lambda: BlockMask.top_blocks(Q, Q, 0)),
        (ValueError, r"top_blocks: q and k must be \[B, S, H, Dh\]", lambda: BlockMask.top_blocks(Q, Q[0], 1)),
        (ValueError, "q's 4 heads must be a multiple of k's 3", lambda: BlockMask.top_blocks(Q, Q[:, :, :3], 1)),
        (TypeError, "q and k must be floating point", lambda: BlockMask.top_blocks(Q, Q.long(), 1)),
        (ValueError, "k must be on q's device cpu, got meta", lambda: BlockMask.top_blocks(Q, Q.to("meta"), 1)),
        (
            ValueError,
            r"both masks must have one lengths, got \(32, 32\)",
            lambda: SMALL | BlockMask.local(32, 31, block=16),
        ),
        (ValueError, "both masks must have one block", lambda: SMALL & BlockMask.local(32, block=32)),
        (ValueError, "both masks must be on one device, got cpu and meta", lambda: SMALL & SMALL.to("meta")),
        (
            ValueError,
            r"batch and heads must be equal or 1, got \(1, 2\) and \(1, 3\)",
            lambda: BlockMask.bigbird(64, heads=2, block=16) | BlockMask.bigbird(64, heads=3, block=16),
        ),
        (TypeError, "unsupported operand", lambda: SMALL | MASK),
    ],
)
def test_mistakes_are_named(error, words, call):
    with pytest.raises(error, match=words):
        call()
