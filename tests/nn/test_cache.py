"""The cache's bookkeeping; its use is tested in tests/models/test_transformer.py."""

import pytest
import torch

from fastlm.errors import UserError
from fastlm.nn import KVCache


def make():
    return KVCache(2, 3, 4, batch=2, max_length=8)


def test_appends_behind_each_row():
    cache = make()
    k, v = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    keys, values = cache.append(1, k, v)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    cache.advance(5)
    cache.set_lengths([2, 4])
    assert (cache.length, cache.longest) == (None, 4)
    assert cache.positions(2).tolist() == [[2, 3], [4, 5]]
    more = torch.randn(2, 2, 3, 4)
    keys, _ = cache.append(1, more, more)
    assert keys.shape == (2, 6, 3, 4)
    assert torch.equal(keys[0, :4], torch.cat([k[0, :2], more[0]]))
    assert torch.equal(keys[1], torch.cat([k[1, :4], more[1]]))
    assert not cache.k[0].any(), "another layer was written"
    cache.advance(2)
    assert cache.lengths.tolist() == [4, 6]
    cache.set_lengths([3, 3])
    assert cache.length == 3


def test_bad_lengths():
    cache = make()
    with pytest.raises(UserError, match="one for each row, got 3"):
        cache.set_lengths([1, 2, 3])
    with pytest.raises(UserError, match=r"in 0\.\.8, got \[1, 9\]"):
        cache.set_lengths([1, 9])
    cache.set_lengths([8, 2])
    with pytest.raises(UserError, match="1 more tokens after 8"):
        cache.check_room(1)
