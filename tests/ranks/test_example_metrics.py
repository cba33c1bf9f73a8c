"""The metrics of the examples ratings and detection."""

import pytest
import torch
from conftest import REPO

pytestmark = pytest.mark.ranks


def test_the_auc_is_the_share_of_ordered_pairs(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "examples/ratings")
    from ratings import area_under_curve

    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.8]), torch.tensor([0, 1, 0, 1, 1])
    pairs = [1, 0.5, 1, 1, 1, 1]  # 0.4 against 0.1 and 0.4, and twice 0.8 against 0.1 and 0.4
    assert area_under_curve(scores, labels) == sum(pairs) / len(pairs)


def test_average_precision(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "examples/detection")
    from detection import average_precision, right_detections

    right = torch.tensor([[True, False, True, False], [False, True, False, False]])
    expected = torch.tensor([(1 + 2 / 3) / 2, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(average_precision(right, torch.tensor([2, 1])), expected)

    # Two items of class 1. The first detection matches the first item, which is then taken; the third has no item.
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    boxes = torch.zeros(16, 4)
    boxes[:4] = torch.tensor([[0, 0, 10, 9], [0, 0, 10, 10], [40, 40, 50, 50], [20, 20, 30, 31]])
    labels = torch.ones(16, dtype=torch.int64)
    detections = {"boxes": boxes[None], "labels": labels[None], "scores": torch.arange(16, 0, -1)[None]}
    found = right_detections(detections, [(truth, torch.tensor([1, 1]))], 0.5)
    assert found[0].nonzero().flatten().tolist() == [0, 3]
    assert not right_detections({**detections, "labels": labels[None] * 0}, [(truth, torch.tensor([1, 1]))], 0.5).any()
