"""Captured steps, without a GPU; see tests/fake_cuda for captures and replays."""

import random

import numpy as np
import pytest
import torch

from distlenet.training.cuda_graph import check_shape, host_random_state, no_buffer_replaced

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


def test_a_replaced_buffer_is_put_back_and_noticed():
    """A replay would begin with the same tensor each time; one written to in place is correct."""
    model = torch.nn.BatchNorm1d(2)
    with no_buffer_replaced(model):
        model.running_mean.add_(1)
    before = model.running_mean
    with pytest.raises(RuntimeError, match="replaces a buffer"), no_buffer_replaced(model):
        model.running_mean = model.running_mean + 1
    assert model.running_mean is before
