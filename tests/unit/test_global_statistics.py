"""BatchNorm over the global batch, on one rank: the same as torch's. tests/ranks/test_buffers.py uses several ranks."""

import copy

import pytest
import torch
from torch import nn

from distlenet.reduction.global_statistics import GlobalBatchNorm, use_global_statistics
from distlenet.utils.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("group")]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (8, 3)),
        (nn.BatchNorm1d(3, affine=False), (8, 3, 5)),
        (nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
        (nn.BatchNorm3d(3, eps=0.1, momentum=0.3), (4, 3, 2, 3, 2)),
        (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    ],
)
def test_one_rank_equals_plain_batchnorm(layer, shape):
    torch.manual_seed(1)
    model = nn.Sequential(copy.deepcopy(layer))
    plain, names = copy.deepcopy(model), list(model.state_dict())
    use_global_statistics(model)
    assert isinstance(model[0], GlobalBatchNorm)
    assert list(model.state_dict()) == names
    for _ in range(3):
        ours = (torch.randn(shape) * 3 + 50).requires_grad_()  # a mean that float32 squares would not survive
        theirs = ours.detach().clone().requires_grad_()
        weights = torch.randn(shape)
        (model(ours) * weights).sum().backward()
        (plain(theirs) * weights).sum().backward()
        # float32: values near 50 have 4e-6; divided by standard deviations near 3 and summed over up to 100 values.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=name)
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-3)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(ours), plain.eval()(theirs))


def test_single_value_is_refused_as_by_torch():
    model = nn.Sequential(nn.BatchNorm1d(3))
    use_global_statistics(model)
    for shape in ((2, 3), (1, 3, 2)):
        model(torch.ones(shape))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.ones(1, 3))


def test_only_known_layers_are_turned():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="sync_batchnorm=true: the model has no BatchNorm"):
        use_global_statistics(nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"1 \(Own\) is not a BatchNorm of torch.nn"):
        use_global_statistics(nn.Sequential(nn.Conv2d(1, 1, 1), Own(1)))
    model = nn.Sequential(nn.SyncBatchNorm(2))
    use_global_statistics(model)
    assert type(model[0]) is GlobalBatchNorm
