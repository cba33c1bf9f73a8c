"""The statements of PyTorch's "Autograd" and "Neural Networks" tutorials are true."""

import pytest
import torch
import torch.nn.functional as F

from distlenet.models.lenet import Net

pytestmark = pytest.mark.unit


def test_the_gradient_of_the_mean_of_three_squares_is_four_and_a_half():
    x = torch.ones(2, 2, requires_grad=True)
    y = x + 2
    out = (3 * y * y).mean()
    assert y.grad_fn is not None
    assert x.grad_fn is None
    out.backward()
    assert torch.equal(x.grad, torch.full((2, 2), 4.5))  # 6y/4 at y = 3, exact in binary


def test_backward_of_a_scalar_is_backward_with_one():
    gradients = []
    for argument in (None, torch.tensor(1.0)):
        torch.manual_seed(0)
        net = Net()
        F.mse_loss(net(torch.randn(2, 1, 32, 32)), torch.zeros(2, 10)).backward(argument)
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_backward_of_a_vector_requires_a_vector():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="scalar"):
        (x * 2).backward()
    (x * 2).backward(torch.tensor([0.1, 1.0, 0.0001]))
    assert torch.equal(x.grad, 2 * torch.tensor([0.1, 1.0, 0.0001]))


@pytest.mark.parametrize(("start", "doublings"), [(1.0, 10), (300.0, 2)])
def test_a_graph_with_python_control_flow_differentiates(start, doublings):
    """The graph is recorded again in each pass, so the gradient depends on the number of iterations."""
    x = torch.tensor(start, requires_grad=True)
    y = x * 2
    while y.abs() < 1000:
        y = y * 2
    y.backward()
    assert x.grad == 2.0**doublings
