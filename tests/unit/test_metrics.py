import pytest
import torch
from torch import nn

from distlenet.training.evaluation import evaluate
from distlenet.training.meter import Meter

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def update(meter, losses, answers, labels):
    logits = nn.functional.one_hot(torch.tensor(answers), 10).float()
    meter.update(torch.tensor([sum(losses)]), logits, torch.tensor(labels))


@pytest.mark.usefixtures("group")
def test_means_are_over_images_not_over_batches():
    meter = Meter(CPU)
    update(meter, [1.0, 1.0, 1.0], [1, 2, 3], [1, 2, 4])
    update(meter, [9.0], [5], [6])  # a last batch of one image with a huge loss: the mean of means is 5
    metrics = meter.total()
    assert metrics.loss == 3.0
    assert metrics.accuracy == 0.5
    assert metrics.count == 4


@pytest.mark.usefixtures("group")
def test_a_window_is_what_came_since_the_last_one():
    meter = Meter(CPU)
    update(meter, [1.0], [1], [1])
    assert meter.window().loss == 1.0
    update(meter, [5.0], [1], [2])
    window = meter.window()
    assert (window.loss, window.accuracy, window.count) == (5.0, 0.0, 1)
    assert (meter.window().count, meter.total().count, meter.total().count) == (0, 2, 2)
    meter.reset()
    assert meter.total().count == 0


@pytest.mark.usefixtures("group")
def test_a_saved_meter_goes_on():
    meter = Meter(CPU)
    update(meter, [2.0], [1], [1])
    meter.window()
    update(meter, [4.0], [1], [1])
    resumed, elsewhere = Meter(CPU), Meter(CPU)
    resumed.load_state_dict(meter.state_dict(), rank=0)
    elsewhere.load_state_dict(meter.state_dict(), rank=1)
    assert resumed.window().loss == 4.0
    assert resumed.total().loss == 3.0
    assert elsewhere.total().count == 0  # rank 0 carries the sums alone, or they would count twice


@pytest.mark.usefixtures("group")
def test_sums_of_losses_do_not_depend_on_their_order():
    """Losses from 1e-6 to 1e6: plain float64 sums of them differ from order to order."""
    generator = torch.Generator().manual_seed(0)
    losses = 10 ** (torch.rand(500, generator=generator) * 12 - 6)
    sums, plain = set(), set()
    for _ in range(5):
        order = torch.randperm(500, generator=generator)
        meter = Meter(CPU)
        for part in losses[order].split(7):
            meter.update(part, torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))
        sums.add(float(meter.epoch[0]))
        plain.add(sum(losses[order].double().tolist()))
    assert len(sums) == 1
    assert len(plain) > 1


class Answers(nn.Module):
    """Answers 0 for a black image and 1 for any other."""

    def forward(self, x):
        bright = (x > 0).flatten(1).any(1).long()
        return nn.functional.one_hot(bright, 10).float()


@pytest.mark.usefixtures("group")
def test_evaluation_counts_each_image_once_or_fails():
    images = torch.tensor([0, 255, 0, 0, 255], dtype=torch.uint8).view(5, 1, 1)
    labels = torch.tensor([0, 1, 0, 1, 0])
    batches = [(images[:4], labels[:4], torch.arange(4)), (images[4:], labels[4:], torch.arange(4, 5))]
    net = Answers()
    off = torch.autocast("cpu", enabled=False)
    metrics = evaluate(net, batches, lambda x: x.float(), off, CPU, expected=5)
    assert metrics.accuracy == pytest.approx(3 / 5)
    assert metrics.count == 5
    assert net.training
    with pytest.raises(RuntimeError, match="counted 5 images of a set of 6"):
        evaluate(net, batches, lambda x: x.float(), off, CPU, expected=6)
