from typing import NamedTuple

import pytest
import torch

from distlenet.utils.nested import (
    count_samples,
    has_lists,
    map_tensors,
    nonfinite_samples,
    select_samples,
    tensors_in,
)

pytestmark = pytest.mark.unit

NESTED = {
    "image": torch.arange(12.0).view(4, 3),
    "boxes": [torch.zeros(n, 2) for n in (1, 0, 2, 5)],  # ragged: one item per sample
    "target": (torch.arange(4), {"weight": torch.ones(4)}),
}


def test_tensors_are_listed_in_a_fixed_order():
    image, *boxes, labels, weights = tensors_in(NESTED)
    assert image is NESTED["image"]
    assert [len(box) for box in boxes] == [1, 0, 2, 5]
    assert (labels is NESTED["target"][0], weights is NESTED["target"][1]["weight"]) == (True, True)


def test_map_keeps_the_structure_and_other_values():
    mapped = map_tensors(lambda tensor: tensor + 1, {**NESTED, "text": ["a", "b", "c", "d"], "none": None})
    assert list(mapped) == ["image", "boxes", "target", "text", "none"]
    assert (mapped["text"], mapped["none"]) == (["a", "b", "c", "d"], None)
    assert (type(mapped["boxes"]), type(mapped["target"]), type(mapped["target"][1])) == (list, tuple, dict)
    for before, after in zip(tensors_in(NESTED), tensors_in(mapped), strict=True):
        assert torch.equal(after, before + 1)


@pytest.mark.parametrize("data", [NESTED, NESTED["boxes"], (NESTED["boxes"], NESTED["image"]), {"a": NESTED["target"]}])
def test_samples_are_counted_also_if_the_first_part_is_ragged(data):
    assert count_samples(data) == 4


@pytest.mark.parametrize("samples", [slice(1, 3), slice(1, None, 2), slice(4, 8)])
def test_selection_has_the_same_samples_of_each_part(samples):
    selected = select_samples(NESTED, samples)
    expected = list(range(4))[samples]
    assert selected["image"].is_contiguous()
    assert torch.equal(selected["image"], NESTED["image"][expected])
    assert [len(box) for box in selected["boxes"]] == [(1, 0, 2, 5)[i] for i in expected]
    assert selected["target"][0].tolist() == expected
    assert selected["target"][1]["weight"].shape == (len(expected),)


class Sample(NamedTuple):
    image: torch.Tensor
    target: torch.Tensor


def test_a_named_tuple_keeps_its_type():
    """torch's default_collate makes one of named tuples."""
    batch = Sample(torch.zeros(4, 2), torch.arange(4))
    for result in (map_tensors(torch.clone, batch), select_samples(batch, slice(2))):
        assert type(result) is Sample
    assert result.target.tolist() == [0, 1]


def test_selection_of_other_values_is_refused():
    with pytest.raises(TypeError, match="but holds a int"):
        select_samples({"image": torch.zeros(2), "size": 3}, slice(0, 1))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (torch.zeros(2), False),
        ((torch.zeros(2), {"a": torch.zeros(2)}), False),
        ({"a": (torch.zeros(2), [torch.zeros(1), torch.zeros(2)])}, True),
        (["one", "two"], True),
        ((), False),
    ],
)
def test_lists_are_found(data, expected):
    assert has_lists(data) == expected


def test_samples_that_are_not_finite_are_found_in_each_part():
    data = map_tensors(torch.clone, NESTED)
    assert nonfinite_samples(data) == nonfinite_samples(()) == []
    data["image"][0, 2], data["boxes"][2][1, 1], data["target"][1]["weight"][3] = torch.nan, torch.inf, -torch.inf
    assert nonfinite_samples(data) == [0, 2, 3]
