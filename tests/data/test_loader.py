import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import Loader, TokenStore, evaluation_batches
from fastlm.errors import UserError

PACKINGS = ["stream", "best_fit"]


def numbered(lengths):
    """A store whose tokens are their own positions, in documents of the given lengths."""
    return TokenStore.from_tokens(np.arange(sum(lengths)), np.cumsum(lengths))


def take(loader, count):
    return [next(loader) for _ in range(count)]


def same(a, b):
    return a.tokens.equal(b.tokens) and a.labels.equal(b.labels) and a.index.equal(b.index)


@settings(deadline=None)
@given(n=st.integers(2, 300), context=st.integers(1, 40), seed=st.integers(0, 5))
def test_stream_has_every_window_once_an_epoch(n, context, seed):
    if n < context + 1:
        with pytest.raises(UserError, match=f"too few for one sample of context {context}"):
            Loader(numbered([n]), batch_size=1, context=context)
        return
    loader = Loader(numbered([n]), batch_size=1, context=context, seed=seed)
    for _ in range(3):
        rows = take(loader, loader.samples_per_epoch)
        starts = sorted(int(row.tokens[0, 0]) for row in rows)
        assert len(set(starts)) == len(starts) == loader.samples_per_epoch
        assert np.diff(starts).tolist() == [context] * (len(starts) - 1)
        for row in rows:
            assert row.tokens[0].tolist() == list(range(int(row.tokens[0, 0]), int(row.tokens[0, 0]) + context))
            assert row.labels.equal(row.tokens + 1)
        assert n - context * loader.samples_per_epoch <= 2 * context


def test_stream_offset_and_order_change_with_epoch_and_seed():
    def epochs(seed):
        loader = Loader(numbered([2000]), batch_size=1, context=16, seed=seed)
        return [[int(b.tokens[0, 0]) for b in take(loader, loader.samples_per_epoch)] for _ in range(8)]

    first = epochs(0)
    assert len({min(starts) for starts in first}) > 4, "offsets"
    assert len({tuple(np.argsort(starts)) for starts in first}) == 8, "orders"
    assert epochs(0) == first
    assert epochs(1) != first


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@settings(deadline=None)
@given(lengths=lengths, context=st.integers(1, 25), seed=st.integers(0, 3))
def test_best_fit_has_every_target_once_an_epoch(lengths, context, seed):
    store = numbered(lengths)
    if max(lengths) < 2:
        with pytest.raises(UserError, match="no document of two tokens or more"):
            Loader(store, batch_size=1, context=context, packing="best_fit")
        return
    loader = Loader(store, batch_size=1, context=context, seed=seed, packing="best_fit")
    starts = {0, *store.document_ends[:-1].tolist()}
    for _ in range(2):
        targets = []
        for batch in take(loader, loader.samples_per_epoch):
            live = batch.labels != -100
            assert batch.labels[live].equal(batch.tokens[live] + 1)
            targets += batch.labels[live].tolist()
        assert sorted(targets) == [t for t in range(sum(lengths)) if t not in starts], "all but the first of a document"


def test_best_fit_keeps_short_documents_whole_and_rows_full():
    rng = np.random.default_rng(0)
    store = numbered(rng.geometric(0.06, 400).clip(2, 64).tolist())
    loader = Loader(store, batch_size=1, context=64, packing="best_fit")
    ends = set((store.document_ends - 1).tolist())
    starts = {0, *store.document_ends.tolist()}
    filled = 0
    orders = []
    for _ in range(2):
        rows = take(loader, loader.samples_per_epoch)
        orders.append([row.tokens[0].tolist() for row in rows])
        for row in rows:
            tokens, labels = row.tokens[0].tolist(), row.labels[0].tolist()
            stops = [s for s in range(64) if labels[s] == -100 and tokens[s] in ends]
            used = stops[-1] + 1
            assert all(labels[s] == -100 and tokens[s] == 0 for s in range(used, 64)), "padding"
            assert all(tokens[s] in starts for s in range(used) if s == 0 or labels[s - 1] == -100), "whole documents"
            filled += used
    assert filled == 2 * len(store)
    assert filled / (2 * 64 * loader.samples_per_epoch) > 0.99
    assert sorted(orders[0]) != sorted(orders[1]), "each epoch packs anew"


@pytest.mark.parametrize("packing", PACKINGS)
def test_batch_is_int64_and_numbered(packing):
    loader = Loader(numbered([500]), batch_size=3, context=8, packing=packing)
    take(loader, 2)
    batch = next(loader)
    assert batch.tokens.dtype == batch.labels.dtype == batch.index.dtype == torch.int64
    assert batch.tokens.shape == batch.labels.shape == (3, 8)
    assert batch.index.tolist() == [6, 7, 8]
    first = int(batch.tokens[0, 0])
    assert f"{first:,}" in loader.describe(6) and "sample 6 (epoch 0)" in loader.describe(6)
    assert batch.to("cpu").tokens.equal(batch.tokens)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("before", [0, 1, 7, 40])
def test_resume_in_mid_epoch_is_exact(packing, before):
    def make(batch_size=4):
        return Loader(numbered([30, 400, 7, 90]), batch_size=batch_size, context=16, seed=11, packing=packing)

    straight = make()
    take(straight, before)
    state = straight.state_dict()
    expected = take(straight, 25)
    assert len({b // straight.samples_per_epoch for batch in expected for b in batch.index.tolist()}) > 2
    resumed = make()
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert resumed.epoch == pytest.approx(before * 4 / resumed.samples_per_epoch)
    assert all(same(a, b) for a, b in zip(expected, take(resumed, 25)))
    other_size = make(2)
    other_size.load_state_dict(state)
    joined = torch.cat([batch.tokens for batch in take(other_size, 2)])
    assert joined.equal(expected[0].tokens)


def test_state_is_plain_data():
    import json

    loader = Loader(numbered([200]), batch_size=2, context=8)
    next(loader)
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()


@pytest.mark.parametrize(
    "change, name",
    [({"seed": 1}, "seed"), ({"context": 9}, "context"), ({"packing": "best_fit"}, "packing"), ({"data": 201}, "data")],
)
def test_resume_with_another_order_is_refused(change, name):
    def make(data=200, **options):
        return Loader(numbered([data]), **{"batch_size": 2, "context": 8, "seed": 0, **options})

    with pytest.raises(UserError, match=f"cannot resume the data order: {name} was"):
        make(**change).load_state_dict(make().state_dict())


@pytest.mark.parametrize("packing", PACKINGS)
def test_global_order_does_not_depend_on_the_world_size(packing):
    def steps(world_size, batch_size, count=30):
        ranks = [
            Loader(
                numbered([300, 50, 222]),
                batch_size=batch_size,
                context=10,
                seed=2,
                rank=rank,
                world_size=world_size,
                packing=packing,
            )
            for rank in range(world_size)
        ]
        batches = [take(rank, count) for rank in ranks]
        states = {str(rank.state_dict()) for rank in ranks}
        assert len(states) == 1, "any rank's state serves all"
        return torch.stack([torch.cat([batch.tokens for batch in step]) for step in zip(*batches)])

    alone = steps(1, 12)
    for world_size in (2, 3, 4, 12):
        assert steps(world_size, 12 // world_size).equal(alone)


def test_change_of_world_size_on_resume():
    options = {"context": 10, "seed": 2}
    alone = Loader(numbered([900]), batch_size=4, **options)
    take(alone, 5)
    state, expected = alone.state_dict(), next(alone)
    halves = []
    for rank in range(2):
        half = Loader(numbered([900]), batch_size=2, rank=rank, world_size=2, **options)
        half.load_state_dict(state)
        halves.append(next(half).tokens)
    assert torch.cat(halves).equal(expected.tokens)


@settings(deadline=None)
@given(n=st.integers(2, 200), context=st.integers(1, 50), batch_size=st.integers(1, 5))
def test_evaluation_covers_every_token_once(n, context, batch_size):
    targets = []
    rows = 0
    for batch in evaluation_batches(numbered([n]), context, batch_size):
        assert batch.tokens.shape == batch.labels.shape
        assert batch.index.tolist() == list(range(rows, rows + len(batch.index)))
        rows += len(batch.index)
        live = batch.labels != -100
        assert batch.labels[live].equal(batch.tokens[live] + 1)
        assert (batch.tokens[~live] == 0).all()
        targets += batch.labels[live].tolist()
        assert 1 <= len(batch.tokens) <= batch_size
    assert targets == list(range(1, n))
    assert rows == -(-(n - 1) // context)


def test_evaluation_takes_lists_and_tensors():
    for tokens in ([5, 6, 7], torch.tensor([5, 6, 7]), np.array([5, 6, 7], np.uint16)):
        [batch] = evaluation_batches(tokens, 4, 2)
        assert batch.tokens.tolist() == [[5, 6, 0, 0]]
        assert batch.labels.tolist() == [[6, 7, -100, -100]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"context": 2.5}, "context must be an integer of at least 1, got 2.5"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1, got 2"),
        ({"packing": "worst"}, "packing must be one of stream, best_fit, got 'worst'"),
        ({"context": 100}, "holds 100 tokens, too few for one sample of context 100; use more text or a context of at"),
        ({"data": [1.5]}, "tokens must be integers in one dimension, got float64"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        Loader(**{"data": numbered([100]), **options})
    with pytest.raises(UserError, match="holds 1 tokens; at least 2 are needed"):
        evaluation_batches([1], 4, 1)


def test_store_reads_across_parts():
    parts = [np.arange(5), np.arange(5, 5), np.arange(5, 6), np.arange(6, 20)]
    store = TokenStore(parts, np.array([20]), 20, "parts", "")
    for start in range(21):
        for stop in range(start, 21):
            out = np.empty(stop - start, np.int64)
            store.read(start, stop, out)
            assert out.tolist() == list(range(start, stop))
