import base64
import io
import json

import pytest
import torch
from PIL import Image

from distlenet.training.error_analysis import MISTAKES, Details, write_details

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def logits(predicted, confidence, classes=3):
    """Logits whose softmax gives ``predicted`` that confidence, and the others the rest in equal parts."""
    rest = torch.full((len(predicted), classes), 1.0, dtype=torch.float64)
    rest *= ((1 - torch.tensor(confidence, dtype=torch.float64)) / (classes - 1))[:, None]
    rest[torch.arange(len(predicted)), torch.tensor(predicted)] = torch.tensor(confidence, dtype=torch.float64)
    return rest.log()


@pytest.mark.usefixtures("group")
def test_confusions_and_the_surest_mistakes_are_of_the_whole_set():
    details = Details(3, CPU)
    details.update(logits([0, 1], [0.9, 0.6]), torch.tensor([0, 2]), torch.tensor([10, 11]))
    details.update(logits([2, 2], [0.8, 0.7]), torch.tensor([1, 2]), torch.tensor([12, 13]))
    confusion, mistakes = details.reduce()
    assert confusion.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    assert mistakes[:, 1:].tolist() == [[12, 1, 2], [11, 2, 1]]
    # exp of a log in float64: three roundings of 1.1e-16 relative, of numbers below 1
    assert mistakes[:, 0].tolist() == pytest.approx([0.8, 0.6], abs=1e-15)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_sure_mistakes_the_first_of_the_set_are_kept_whatever_the_order(order):
    details = Details(3, CPU)
    for index in range(3 * MISTAKES)[::order]:
        details.update(logits([1], [0.75]), torch.tensor([0]), torch.tensor([index]))
    _, mistakes = details.reduce()
    assert mistakes[:, 1].tolist() == list(range(MISTAKES))


@pytest.mark.usefixtures("group")
def test_a_network_without_mistakes_has_none():
    details = Details(3, CPU)
    details.update(logits([0], [0.5]), torch.tensor([0]), torch.tensor([0]))
    assert details.reduce()[1].shape == (0, 4)
    assert Details(3, CPU).reduce()[1].shape == (0, 4)  # a rank, or a job, without images


def test_the_file_has_the_pictures(tmp_path):
    images = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    mistakes = torch.tensor([[0.5, 2, 0, 1]], dtype=torch.float64)
    write_details(tmp_path, torch.eye(2, dtype=torch.int64), mistakes, images, ("a", "b"))
    content = json.loads((tmp_path / "test.json").read_text())
    (found,) = content["mistakes"]
    with Image.open(io.BytesIO(base64.b64decode(found.pop("png")))) as picture:
        assert list(picture.tobytes()) == images[2].flatten().tolist()
    assert found == {"index": 2, "label": 0, "predicted": 1, "confidence": 0.5}
    assert (content["classes"], content["confusion"]) == (["a", "b"], [[1, 0], [0, 1]])


def test_a_full_disk_costs_the_pictures_not_the_run(tmp_path, capsys):
    (tmp_path / ".test.json.writing").mkdir()  # nothing can be written there
    mistakes = torch.zeros(0, 4, dtype=torch.float64)
    write_details(tmp_path, torch.eye(2, dtype=torch.int64), mistakes, torch.zeros(0, 4, 4), ("a", "b"))
    assert "test.json: cannot be written" in capsys.readouterr().err
