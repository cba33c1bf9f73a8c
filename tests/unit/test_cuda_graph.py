"""Captured steps, without a GPU; see tests/fake_cuda for captures and replays."""

import pytest
import torch

from distlenet.training.cuda_graph import check_shape
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def test_a_batch_of_another_shape_is_not_replayed():
    """It would be broadcast to the captured shape."""
    check_shape(torch.zeros(4, 5), torch.zeros(4, 5))
    with pytest.raises(
        UserError, match=r"tensor of shape \[4, 1\], but the captured one of the same size has \[4, 5\]; "
    ):
        check_shape(torch.zeros(4, 5), torch.zeros(4, 1))
