"""Packing and shuffling: their properties, fixed values, and the compiled module against its numpy twin."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import packing
from fastlm.data.packing import best_fit, host_backend, mix_seed, permutation

BACKENDS = ["numpy"] + (["compiled"] if host_backend() == "compiled" else [])
compiled = pytest.mark.skipif(host_backend() != "compiled", reason="fastlm._host is not built")
packings = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=120), st.just(capacity))
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permutation_values_are_fixed(backend):
    # These orders decide what a resumed run sees: they may never change.
    assert permutation(10, 0, backend=backend).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    assert permutation(10, 2**64 - 1, backend=backend).tolist() == permutation(10, -1, backend=backend).tolist()
    assert permutation(0, 1, backend=backend).tolist() == []
    assert permutation(1, 1, backend=backend).tolist() == [0]


def test_permutation_is_the_argsort_of_splitmix64():
    mask = 2**64 - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    keys = [mix((mix(7) + (i + 1) * 0x9E3779B97F4A7C15) & mask) for i in range(50)]
    assert permutation(50, 7).tolist() == sorted(range(50), key=keys.__getitem__)


@pytest.mark.parametrize("n", [2, 31, 33, 100, 5000])
def test_permutation_visits_each_once_and_depends_on_the_seed(n):
    order = permutation(n, 5)
    assert sorted(order.tolist()) == list(range(n))
    assert order.dtype == np.int64
    if n > 2:
        assert order.tolist() != permutation(n, 6).tolist() != list(range(n))


def test_permutation_is_uniform():
    # Where element 0 lands in 4 places over 4000 seeds: 1000 each, standard deviation 27.
    places = np.bincount([permutation(4, seed).tolist().index(0) for seed in range(4000)], minlength=4)
    assert np.abs(places - 1000).max() < 140, places


def test_mix_seed_separates_words():
    seeds = {mix_seed(a, b) for a in range(-20, 20) for b in range(40)}
    assert len(seeds) == 1600
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(3, 1) == 0xBCA402F674DDD08D


@compiled
@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(-(2**70), 2**70))
def test_twin_permutation(n, seed):
    np.testing.assert_array_equal(permutation(n, seed, backend="numpy"), permutation(n, seed, backend="compiled"))


@compiled
def test_twin_permutation_of_many():
    # Large enough for the compiled sort to use all its buckets.
    n = 1_200_000
    np.testing.assert_array_equal(permutation(n, 3, backend="numpy"), permutation(n, 3, backend="compiled"))


@compiled
@settings(deadline=None, max_examples=200)
@given(packings)
def test_twin_best_fit(case):
    for ours, theirs in zip(best_fit(*case, backend="numpy"), best_fit(*case, backend="compiled")):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype == np.int64


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None)
@given(case=packings)
def test_best_fit_places_every_piece_without_overlap(backend, case):
    lengths, capacity = case
    rows, offsets = best_fit(lengths, capacity, backend=backend)
    taken = np.zeros((max(rows, default=-1) + 1, capacity), int)
    for length, row, offset in zip(lengths, rows, offsets):
        taken[row, offset : offset + length] += 1
    assert taken.sum() == sum(lengths)
    assert taken.max(initial=0) <= 1
    assert (np.diff(taken, axis=1) <= 0).all(), "rows fill from the left without holes"
    assert (taken[:, 0] == 1).all(), "no empty row"


@settings(deadline=None)
@given(packings, st.integers(0, 100))
def test_best_fit_is_best_fit(case, seed):
    lengths, capacity = case
    rows, offsets = best_fit(lengths, capacity)
    space: list[int] = []  # a plain O(n * rows) best fit over falling lengths
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [left for left in space if left >= lengths[item]]
        left = min(fits, default=capacity)
        assert offsets[item] == capacity - left
        if fits:
            assert space[rows[item]] == left
        else:
            space.append(capacity)
        space[rows[item]] -= lengths[item]
    shuffled = np.array(lengths, int)[permutation(len(lengths), seed)]
    assert best_fit(shuffled, capacity)[0].max(initial=-1) == rows.max(initial=-1), "rows depend on the lengths alone"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 0], [3, 9], [-1]])
def test_best_fit_refuses_lengths_outside_the_row(backend, lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.8, got"):
        best_fit(lengths, 8, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_refusals(backend):
    with pytest.raises(ValueError, match="n must be >= 0"):
        permutation(-1, 0, backend=backend)
    with pytest.raises(ValueError, match="capacity must be >= 1"):
        best_fit([], 0, backend=backend)
    with pytest.raises(ValueError, match="one dimension"):
        best_fit([[1]], 4, backend=backend)
    with pytest.raises(ValueError, match="backend must be"):
        permutation(1, 0, backend="fast")


def test_the_compiled_module_serves_where_it_is_built(monkeypatch):
    class Host:
        permutation = staticmethod(lambda n, seed: ("permutation", n, seed))
        best_fit = staticmethod(lambda lengths, capacity: ("best_fit", lengths.tolist(), capacity))

    monkeypatch.setattr(packing, "_host", Host)
    assert host_backend() == "compiled"
    assert permutation(3, -1) == permutation(3, -1, backend="compiled") == ("permutation", 3, 2**64 - 1)
    assert best_fit([1, 2], 4) == ("best_fit", [1, 2], 4)
    monkeypatch.setattr(packing, "_host", None)
    assert host_backend() == "numpy"
    assert sorted(permutation(3, 0).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="build it with `python setup.py build_ext --inplace`"):
        permutation(3, 0, backend="compiled")
