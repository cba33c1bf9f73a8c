import re

import pytest
import torch

from distlenet.utils.structure import check_same_structure

pytestmark = pytest.mark.unit

STATE = {"model": {"weight": torch.zeros(2, 3)}, "epochs": [1, 2], "done": False, "loss": 0.5, "name": None}


def test_other_values_of_the_same_structure_are_accepted():
    other = {"model": {"weight": torch.ones(2, 3)}, "epochs": (0, 2**53 - 1), "done": True, "loss": 1, "name": "x"}
    assert check_same_structure(other, STATE, "state") is None  # no error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "state.model is {}"),
        ({"model": {"weight": torch.zeros(3, 2)}}, "state.model.weight is a tensor (3, 2) of torch.float32"),
        ({"model": {"weight": torch.zeros(2, 3).double()}}, "state.model.weight is a tensor (2, 3) of torch.float64"),
        ({"epochs": [1]}, "state.epochs is [1]"),
        ({"epochs": [1, -1]}, "state.epochs[1] is -1, expected something like 2"),
        ({"epochs": [1, 2**53]}, "state.epochs[1] is 9007199254740992"),
        ({"epochs": [1, True]}, "state.epochs[1] is True"),
        ({"epochs": [1, 2.0]}, "state.epochs[1] is 2.0"),
        ({"done": 1}, "state.done is 1, expected something like False"),
        ({"loss": "0.5"}, "state.loss is '0.5'"),
        ({"name": 3}, "state.name is 3, expected something like None"),
    ],
)
def test_the_first_difference_is_named(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_same_structure({**STATE, **change}, STATE, "state")
