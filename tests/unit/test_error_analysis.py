import base64
import io

import pytest
import torch
from PIL import Image

from distlenet.tasks.error_analysis import MAX_MISTAKES, ClassificationErrors

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("group")]

CLASSES = ("a", "b", "c")
IMAGES = torch.arange(80 * 4 * 4).remainder(256).to(torch.uint8).view(80, 4, 4)


def make_analysis() -> ClassificationErrors:
    return ClassificationErrors([(image, 0) for image in IMAGES], CLASSES, torch.device("cpu"))


def update(analysis, predicted, confidence, labels, indices):
    """Add logits whose softmax gives ``predicted`` that confidence, and the other classes equal parts of the rest."""
    confidence = torch.tensor(confidence, dtype=torch.float64)
    probabilities = torch.ones(len(predicted), len(CLASSES), dtype=torch.float64)
    probabilities *= ((1 - confidence) / (len(CLASSES) - 1))[:, None]
    probabilities[torch.arange(len(predicted)), torch.tensor(predicted)] = confidence
    labels = torch.tensor(labels)
    analysis.update(probabilities.log(), (IMAGES[: len(labels)], labels), torch.tensor(indices))


def test_report_covers_all_batches():
    analysis = make_analysis()
    update(analysis, [0, 1], [0.9, 0.6], labels=[0, 2], indices=[10, 11])
    update(analysis, [2, 2], [0.8, 0.7], labels=[1, 2], indices=[12, 13])
    report = analysis.report()
    assert report["classes"] == ["a", "b", "c"]
    assert report["confusion"] == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]  # [label][predicted]
    mistakes = [(row["index"], row["label"], row["predicted"]) for row in report["mistakes"]]
    assert mistakes == [(12, 1, 2), (11, 2, 1)]  # the most confident first
    # exp of a log in float64: three roundings of 1.1e-16 relative, of numbers below 1
    assert [row["confidence"] for row in report["mistakes"]] == pytest.approx([0.8, 0.6], abs=1e-15)


@pytest.mark.parametrize("order", [1, -1])
def test_equally_confident_mistakes_are_kept_by_index_in_any_order_of_arrival(order):
    analysis = make_analysis()
    for index in range(3 * MAX_MISTAKES)[::order]:
        update(analysis, [1], [0.75], labels=[0], indices=[index])
    assert [row["index"] for row in analysis.report()["mistakes"]] == list(range(MAX_MISTAKES))


def test_report_without_mistakes():
    analysis = make_analysis()
    update(analysis, [0], [0.5], labels=[0], indices=[0])
    assert analysis.report()["mistakes"] == []
    assert make_analysis().report()["mistakes"] == []  # a rank, or a job, without samples


def test_mistakes_have_their_images():
    analysis = make_analysis()
    update(analysis, [1], [0.5], labels=[0], indices=[2])
    (mistake,) = analysis.report()["mistakes"]
    with Image.open(io.BytesIO(base64.b64decode(mistake["png"]))) as image:
        assert list(image.tobytes()) == IMAGES[2].flatten().tolist()
