"""Captured steps, without a GPU; see tests/fake_cuda for captures and replays."""

import random

import numpy as np
import pytest
import torch

from distlenet.training.cuda_graph import check_shape, host_random_state

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("other", [torch.zeros(4, 1), torch.zeros(4, 5).double()])
def test_a_batch_of_another_shape_or_type_is_not_replayed(other):
    """It would be broadcast, or converted."""
    check_shape(torch.zeros(4, 5), torch.ones(4, 5))
    with pytest.raises(RuntimeError, match=r"the captured one of the same size has \[4, 5\] of torch.float32; pad to"):
        check_shape(torch.zeros(4, 5), other)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_random_numbers_of_the_host_are_noticed(draw):
    before = host_random_state()
    assert host_random_state() == before
    draw()
    assert host_random_state() != before
