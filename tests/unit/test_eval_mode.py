import pytest
from torch import nn

from distlenet.utils.eval_mode import eval_mode

pytestmark = pytest.mark.unit


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_mode_of_each_module_is_restored(error):
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)), nn.Dropout())
    model[1].eval()
    model[1][0].train()
    before = modes(model)
    assert before == [True, True, False, True, False, True]
    try:
        with eval_mode(model):
            assert not any(modes(model))
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert modes(model) == before


def test_a_network_in_evaluation_mode_stays_in_it():
    model = nn.Sequential(nn.Dropout()).eval()
    model[0].train()
    with eval_mode(model):
        assert modes(model) == [False, False]
    assert modes(model) == [False, True]


def test_a_module_may_change_more_than_its_mode():
    """Such as a layer that merges its weights for an evaluation."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(1, 1))
    with eval_mode(model):
        assert model[0].merged
    assert not model[0].merged
