"""BatchNorm over the global batch with ``exact``, on one rank; tests/ranks/test_buffers.py uses several ranks."""

import copy
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.exact import ExactReducer
from distlenet.reduction.global_statistics import use_global_statistics
from distlenet.reduction.lockstep import LockstepReducer, connect
from distlenet.utils.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("group"), pytest.mark.timeout(240)]

SHARDS = 4


class ResidualNet(nn.Module):
    """A BatchNorm of the input, which needs no gradient, a block with a downsample branch, and a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.BatchNorm2d(1)
        self.stem = nn.Conv2d(1, 4, 3)
        self.main = nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        )
        self.downsample = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6, momentum=None))
        self.linear = nn.Linear(6, 5)
        self.head = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.ones(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(self.input(x))
        self.calls = self.calls + 1  # while the other shards wait
        x = (self.main(x) + self.downsample(x)).relu().mean((2, 3)) * self.constant
        return self.linear(x), self.head(x).squeeze(1)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = ResidualNet()
    for name, parameter in net.named_parameters():
        if "weight" in name and parameter.dim() == 1:  # of a BatchNorm
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def make_batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels, and the virtual shards of the samples."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(n, 1, 9, 9, generator=generator) * torch.arange(1, n + 1).view(-1, 1, 1, 1) + 2
    return images, torch.randint(0, 5, (n,), generator=generator), torch.arange(n) % SHARDS


def losses(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], labels, reduction="none")


def take_step(reducer: ExactReducer, batch: tuple[Tensor, Tensor, Tensor], hook=lambda _: None):
    """Take one step; the loss of a shard with an odd number also depends on the head."""

    def compute(micro_batch):
        images, labels, _ = micro_batch.data
        hook(micro_batch.number)
        outputs = reducer.model(images)
        loss = losses(outputs, labels).sum()
        step.backward(loss + outputs[1].sum() if micro_batch.number % 2 else loss)
        return micro_batch.number

    with reducer.step(len(batch[0]), torch.tensor(0.0)) as step:
        numbers = step.map(compute, batch)
    return numbers, step.result


def make_reducer(kind: type[ExactReducer], model: nn.Module) -> ExactReducer:
    return kind(model, DistributedEnvironment(), SHARDS, 4, True, dist.all_reduce)


def distance(model: nn.Module, wanted: nn.Module) -> float:
    """Return the largest difference of gradients or buffers, relative to the largest value of a tensor, if above 1."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), wanted.parameters(), strict=True)]
    pairs += zip(model.buffers(), wanted.buffers(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


# Float32 kernels: sums of up to 81 × 16 products with relative errors of 6e-8 each, through three layers that divide by
# standard deviations near 1: below 1e-4.
TOLERANCE = 1e-4


@pytest.mark.parametrize("n", [16, 10, 3])
def test_gradients_and_statistics_equal_those_of_the_whole_batch_in_float64(n):
    """And not those of each shard."""
    model, (images, labels, shards) = make_net(), make_batch(n)
    local, wanted = copy.deepcopy(model), copy.deepcopy(model).double()
    use_global_statistics(model)
    reducer, threads = make_reducer(LockstepReducer, model), {*threading.enumerate()}
    for _ in range(3):  # the first step finds which buffers change
        wanted.zero_grad()
        outputs = wanted(images.double())
        ((losses(outputs, labels) + outputs[1] * (shards % 2)).sum() / n).backward()
        numbers, result = take_step(reducer, (images, labels, shards))
        assert numbers == list(range(min(n, SHARDS)))
        assert not result.flag.isnan()
        reducer.buffers.apply(result.buffer_change)
        assert distance(model, wanted) < TOLERANCE
    assert {*threading.enumerate()} <= threads  # one of another test may have ended
    assert reducer.buffers.sums.shape == (SHARDS, 5 * 1 + 2 * (1 + 4 + 6 + 6 + 6) + 1)  # not the constant
    if n == 16:  # a shard has more than one sample
        take_step(make_reducer(ExactReducer, local), (images, labels, shards))
        assert distance(local.linear, wanted.linear) > 100 * TOLERANCE


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def fail() -> None:
    raise ArithmeticError("of shard 2")


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize(("action", "error"), [(fail, ArithmeticError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("place", ["before", "between", "backward"])
def test_exception_in_one_shard_ends_all_threads(action, error, place):
    """Before the first layer, between two of them, and in a backward pass. A later step is not affected."""
    model = make_net()
    use_global_statistics(model)
    reducer, threads, batch = make_reducer(LockstepReducer, model), {*threading.enumerate()}, make_batch(16)
    take_step(reducer, batch)
    gradients = [p.grad.clone() for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    failing: list[int] = []  # the thread of shard 2

    def act(*_: object) -> None:
        if threading.get_ident() in failing:
            failing.clear()
            action()

    if place == "before":
        model.register_forward_pre_hook(act)
    elif place == "between":
        model.stem.register_forward_hook(act)
    else:
        model.linear.register_full_backward_hook(act)

    model.zero_grad()
    with pytest.raises(error):
        take_step(reducer, batch, lambda number: failing.append(threading.get_ident()) if number == 2 else None)
    reducer.reset(lambda model: model)
    assert {*threading.enumerate()} <= threads  # one of another test may have ended
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad()
    take_step(reducer, batch)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))


def test_shards_that_call_different_layers_are_refused():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.first if x.sum() > 0 else self.second)(x)

    model = Branches()
    use_global_statistics(model)
    reducer = make_reducer(LockstepReducer, model)
    message = (
        r"a shard is at first \(forward\), another one at second \(forward\): each forward pass must call the same"
    )
    with reducer.step(4, torch.tensor(0.0)) as step, pytest.raises(UserError, match=message):
        step.map(
            lambda micro_batch: step.backward(model(micro_batch.data).sum()), torch.tensor([[1.0], [2], [-1], [1]])
        )


class Ranks:
    """Two ranks as threads of this process, with an all-reduce between them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.barrier = threading.Barrier(2, timeout=20)

    def all_reduce(self, rows: Tensor) -> None:
        self.tensors.append(rows.clone())
        self.barrier.wait()
        rows.copy_(self.tensors[0] + self.tensors[1])  # an error if their shapes differ
        if self.barrier.wait() == 0:
            self.tensors.clear()
        self.barrier.wait()

    def map(self, models: Sequence[nn.Module], sizes: Sequence[int]) -> list[str]:
        """Let each rank compute the loss of so many samples with its model. Return the errors."""
        env = [DistributedEnvironment(rank=rank, world_size=2) for rank in range(2)]

        def run(rank: int) -> str:
            try:
                reducer = LockstepReducer(models[rank], env[rank], SHARDS, 4, True, self.all_reduce)
                reducer.warm_up(lambda model: model(torch.ones(2, 1)).sum())
                micro_batches = reducer.split(torch.arange(1.0, 1 + sizes[rank]).view(-1, 1))
                parameters = list(models[rank].parameters())

                def compute(micro_batch):
                    loss = connect(models[rank](micro_batch.data).sum())
                    torch.autograd.grad(loss, parameters, allow_unused=True)

                reducer.map(compute, micro_batches)
            except UserError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))


class Layers(nn.Module):
    """Layers of different sizes, called in the order of ``calls``; "shard" calls one more in every second shard."""

    def __init__(self, calls: str) -> None:
        super().__init__()
        self.calls, self.shards = calls, 0
        self.a, self.b, self.c = nn.BatchNorm1d(1), nn.BatchNorm1d(3), nn.BatchNorm1d(1)
        use_global_statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        self.shards += 1
        for name in "ab" + "c" * (self.shards % 2) if self.calls == "shard" else self.calls:
            x = getattr(self, name)(x.expand(-1, 3) if name == "b" else x[:, :1])
        return x


OF_RANKS, OF_SHARDS = (
    "ranks are at different BatchNorm layers",
    "a shard is at c (forward), another one at b (backward)",
)


@pytest.mark.parametrize(
    ("calls", "sizes", "problems"),
    [
        (("abc", "abc"), (4, 4), ("", "")),
        (("abc", "acb"), (4, 4), (OF_RANKS, OF_RANKS)),  # layers of different sizes
        (("a", "aabb"), (4, 4), (OF_RANKS, OF_RANKS)),  # one rank is at the end before the other
        (("shard", "ab"), (4, 4), (OF_SHARDS, OF_RANKS)),
        (("a", "ab"), (4, 0), (OF_RANKS, OF_RANKS)),  # a rank without samples
        (("ab", "ab"), (4, 0), ("", "")),
    ],
)
def test_ranks_that_call_different_layers_are_refused_on_all_ranks(calls, sizes, problems):
    """At the same time: no rank is left behind in a collective."""
    errors = Ranks().map([Layers(each) for each in calls], sizes)
    for error, problem in zip(errors, problems, strict=True):
        assert problem in error if problem else not error


class Shared(nn.Module):
    """Uses a weight and random numbers before and after a BatchNorm on which the result does not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.linear(x), 0.5)
        self.norm(x)
        return F.dropout(self.linear(x), 0.5)


def test_gradient_of_a_shard_does_not_depend_on_the_others_of_its_rank():
    """With bf16, torch keeps the converted weight: whether both uses share it changes the last bits of its gradient."""
    model = Shared()
    use_global_statistics(model)
    reducer = make_reducer(LockstepReducer, model)

    def gradient(micro_batch):
        torch.manual_seed(micro_batch.number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(micro_batch.data).sum()
        return torch.autograd.grad(connect(loss), model.linear.weight)[0]

    shards = reducer.split(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))
    together = reducer.map(gradient, shards)
    for shard, expected in zip(shards, together, strict=True):
        assert torch.equal(reducer.map(gradient, [shard])[0], expected)
