import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.utils.keyed_random import hash32, mix32, seed_micro_batch

pytestmark = pytest.mark.unit

bits_32 = st.integers(0, 2**32 - 1)


def test_mix32_is_one_to_one():
    numbers = torch.cat([torch.arange(100_000), torch.arange(2**32 - 100_000, 2**32)])
    assert len(mix32(numbers).unique()) == 200_000
    assert int(mix32(numbers).max()) < 2**32


@given(bits_32, bits_32, bits_32)
def test_hash32_depends_on_each_word_and_on_their_order(value, first, second):
    value = torch.tensor([value])
    assert torch.equal(hash32(value, first, second), hash32(value, torch.tensor([first]), torch.tensor([second])))
    assert not torch.equal(hash32(value, first), hash32(value, first ^ 1))
    if first != second:
        assert not torch.equal(hash32(value, first, second), hash32(value, second, first))


def test_random_numbers_depend_only_on_seed_step_and_shard():
    def draw(*key: int) -> tuple[float, ...]:
        seed_micro_batch(torch.default_generator, *key)
        return tuple(torch.rand(4).tolist())

    keys = [(seed, step, shard) for seed in range(4) for step in range(4) for shard in range(4)]
    first = {key: draw(*key) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert {key: draw(*key) for key in reversed(keys)} == first
