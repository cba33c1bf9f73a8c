import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distlenet.config.loading import load_config
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.models.lenet import Net
from distlenet.reduction import DdpReducer, ExactReducer, make_reducer, micro_batch_size
from distlenet.reduction.exact import _gradient_in_memory_order
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

ALONE = DistributedEnvironment()


def backward(reduction, x, y, break_shard=None, factor=1.0):
    """Accumulate the gradient of the mean loss over all micro-batches, and reduce it."""
    for parameter in reduction.model.parameters():
        parameter.grad = None
    reduction.begin(asked=False)
    micro_batches = reduction.micro_batches(x, y)
    for shard, (images, labels) in micro_batches:
        with reduction.accumulate(last=shard == micro_batches[-1][0]):
            loss = F.cross_entropy(reduction.model(images), labels, reduction="sum")
            if shard == break_shard:
                loss = loss * factor
            reduction.backward(loss * (reduction.weight / len(x)))
    reduction.finish()


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("n", [16, 13, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_exact_gradient_is_the_gradient(n, layout):
    torch.manual_seed(0)
    net = Net().to(memory_format=layout)
    x, y = batch(n)
    double = Net().double()
    double.load_state_dict(net.state_dict())
    F.cross_entropy(double(x.double()), y).backward()
    backward(ExactReducer(net, ALONE, 8, 2, watch=True), x, y)
    for ours, true in zip(net.parameters(), double.parameters(), strict=True):
        # Float32 kernels: sums of up to 900 × 16 products of values near 1e-2, at 6e-8 relative each, well below
        # 1e-5; the grid of 2**-40 in each of 8 shards adds 4e-12.
        torch.testing.assert_close(ours.grad.double(), true.grad, rtol=1e-4, atol=1e-5)
        assert ours.grad.stride() == ours.stride()  # what fused optimizers take for granted


def test_a_gradient_that_lies_otherwise_than_its_parameter_is_put_in_order():
    weight = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    gradient = torch.arange(120.0).view(2, 3, 4, 5)  # contiguous
    weight.grad = gradient
    assert torch.equal(_gradient_in_memory_order(weight), gradient.permute(0, 2, 3, 1).flatten())


@pytest.mark.usefixtures("group")
def test_both_reductions_agree():
    x, y = batch(16)
    gradients = []
    for make in (
        lambda net: ExactReducer(net, ALONE, 8, 2, watch=True),
        lambda net: DdpReducer(net, ALONE, 1, 16),
        lambda net: DdpReducer(net, ALONE, 3, 6),  # micro-batches of 6, 6 and 4
    ):
        torch.manual_seed(0)
        net = Net()
        backward(make(net), x, y)
        gradients.append([p.grad.clone() for p in net.parameters()])
    for exact, whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(exact, whole, rtol=1e-4, atol=1e-5)  # as above
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 100), st.sampled_from([(1, 8), (2, 8), (4, 8), (8, 8), (3, 6), (2, 12), (1, 1)]))
def test_shards_do_not_depend_on_the_world_size(n, sizes):
    world_size, shards = sizes
    positions = torch.arange(n)
    found = {}
    for rank in range(world_size):
        reduction = ExactReducer(nn.Linear(1, 1), DistributedEnvironment(rank, 0, world_size), shards, 99, watch=True)
        for shard, (part,) in reduction.micro_batches(positions[rank::world_size]):
            assert shard not in found
            found[shard] = part.tolist()
    assert found == {shard: positions[shard::shards].tolist() for shard in range(shards)}


BOTH = (lambda net: ExactReducer(net, ALONE, 4, 4, watch=True), lambda net: DdpReducer(net, ALONE, 4, 4))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_found(make, factor):
    reduction = make(Net())
    backward(reduction, *batch(16))
    assert not reduction.bad
    backward(reduction, *batch(16), break_shard=2, factor=factor)
    assert reduction.bad
    backward(reduction, *batch(16))
    assert not reduction.bad


@pytest.mark.usefixtures("group")
def test_a_gradient_out_of_the_exact_sums_bounds_is_found():
    reduction = ExactReducer(Net(), ALONE, 4, 4, watch=True)
    backward(reduction, *batch(16), break_shard=2, factor=1e30)
    assert reduction.bad


@pytest.mark.usefixtures("group")
def test_the_bound_is_exact():
    """Just inside it passes, unrounded by the sum; at it, it is found."""
    layer = nn.Linear(1, 1, bias=False)
    reduction = ExactReducer(layer, ALONE, 8, 1, watch=True)
    assert reduction.limit == 512
    inside = torch.nextafter(torch.tensor(512.0), torch.tensor(0.0))
    for value, fine in ((inside, True), (-inside, True), (torch.tensor(512.0), False)):
        reduction.begin(asked=False)
        for shard in range(8):
            with reduction.accumulate(last=shard == 7):
                layer.weight.grad = value.view(1, 1).clone()
        reduction.finish()
        if fine:
            assert layer.weight.grad.item() == 8 * value.item()
        assert bool(reduction.bad) == (not fine)


@pytest.mark.usefixtures("group")
def test_fp16_expects_overflows_and_shows_them_to_the_scaler():
    layer = nn.Linear(1, 1, bias=False)
    reduction = ExactReducer(layer, ALONE, 1, 1, watch=False)
    reduction.begin(asked=False)
    with reduction.accumulate(last=True):
        layer.weight.grad = torch.full((1, 1), float("inf"))
    reduction.finish()
    assert not reduction.bad
    assert not layer.weight.grad.isfinite().all()


@pytest.mark.usefixtures("group")
def test_a_parameter_without_gradient_gets_zeros():
    net = nn.ModuleDict({"used": nn.Linear(1, 1), "unused": nn.Linear(1, 1)})
    reduction = ExactReducer(net, ALONE, 1, 1, watch=True)
    with reduction.accumulate(last=True):
        net["used"](torch.ones(1, 1)).sum().backward()
    reduction.finish()
    assert torch.equal(net["unused"].weight.grad, torch.zeros(1, 1))
    assert torch.equal(net["used"].weight.grad, torch.ones(1, 1))


def test_batch_statistics_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match=r"1 \(BatchNorm2d\).*GroupNorm"):
        ExactReducer(net, ALONE, 8, 2, watch=True)


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match="float32 parameters without gaps, but weight"):
        ExactReducer(nn.Linear(1, 1).double(), ALONE, 8, 2, watch=True)


EXACT, DDP = "distributed.reduction=exact", "distributed.reduction=ddp"


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (
            [DDP, "train.global_batch_size=64"],
            3,
            "64: does not divide by 3 ranks × 1 accumulation steps; give 63 or 66",
        ),
        ([DDP, "train.global_batch_size=10", "train.accumulation_steps=4"], 2, "give 8 or 16"),
        ([DDP, "train.global_batch_size=5"], 8, "; give 8$"),
        ([EXACT, "train.global_batch_size=100"], 1, "virtual_shards=8; give 96 or 104"),
        ([EXACT], 3, "virtual_shards=8: does not divide by 3 ranks; start 1 or 2 or 4 or 8 ranks, or"),
        ([EXACT, "distributed.virtual_shards=4"], 8, "start 1 or 2 or 4 ranks, or"),
        ([EXACT, "train.accumulation_steps=2"], 1, "raise distributed.virtual_shards"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(overrides, ranks, message):
    with pytest.raises(UserError, match=message):
        micro_batch_size(load_config([], overrides), ranks)


def test_sizes_that_divide():
    assert micro_batch_size(load_config([], [EXACT]), 4) == 16
    ddp = load_config([], [DDP, "train.global_batch_size=96", "train.accumulation_steps=3"])
    assert micro_batch_size(ddp, 4) == 8


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("name", "kind"), [(EXACT, ExactReducer), (DDP, DdpReducer)])
def test_the_configured_one_is_made(name, kind):
    assert re.fullmatch(kind.__name__, type(make_reducer(load_config([], [name]), Net(), ALONE, True)).__name__)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 1, 0), (3, 0, 2, 1)])
def test_the_order_of_shards_does_not_matter(order):
    """Chosen so that it matters in plain float64: 1 + 2**-24 is half way between two float32, and whether the
    two 2**-53 are added to each other first or lost one by one decides which of them is nearer."""
    shards = [1.0, 2.0**-24, 2.0**-53, 2.0**-53]
    layer = nn.Linear(1, 1, bias=False)
    reduction = ExactReducer(layer, ALONE, 4, 1, watch=True)
    for number in order:
        with reduction.accumulate(last=number == order[-1]):
            layer.weight.grad = torch.full((1, 1), shards[number])
    reduction.finish()
    assert layer.weight.grad.item() == 1.0


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "reduction", [lambda n: DdpReducer(n, ALONE, 2, 8), lambda n: ExactReducer(n, ALONE, 8, 2, True)]
)
def test_who_is_asked_to_stop_is_heard_and_the_gradient_stays(reduction):
    x, y = batch(16)
    gradients = []
    for asked in (False, True):
        torch.manual_seed(0)
        net = Net()
        made = reduction(net)
        made.begin(asked=asked)
        for shard, (images, labels) in (parts := made.micro_batches(x, y)):
            with made.accumulate(last=shard == parts[-1][0]):
                made.backward(F.cross_entropy(made.model(images), labels, reduction="sum") / 16)
        made.finish()
        made.hear()
        assert made.heard.yes == asked
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("group")
def test_fewer_ranks_take_no_larger_micro_batches():
    reduction = DdpReducer(Net(), ALONE, 1, 64)
    reduction.limit_micro_batch(24)
    assert [len(part) for _, (part,) in reduction.micro_batches(torch.zeros(64, 1))] == [24, 24, 16]
    assert reduction.micro_batches_per_rank == 3
    reduction.limit_micro_batch(100)
    assert reduction.micro_batch_size == 24


@pytest.mark.parametrize(("settings", "size"), [([], 43), (["distributed.reduction=exact"], 16)])
def test_uneven_ranks_must_be_asked_for(settings, size):
    with pytest.raises(UserError, match="does not divide by 3 ranks"):
        micro_batch_size(load_config([], settings), 3)
    assert micro_batch_size(load_config([], [*settings, "distributed.allow_uneven_batches=true"]), 3) == size
    with pytest.raises(UserError, match="does not divide by 9 ranks"):
        micro_batch_size(load_config([], ["distributed.reduction=exact", "distributed.allow_uneven_batches=true"]), 9)


def test_exact_sums_and_rounded_gradients_exclude_each_other():
    with pytest.raises(UserError, match=r"distributed\.gradient_compression=bf16: rounds"):
        make_reducer(load_config([], [EXACT, "distributed.gradient_compression=bf16"]), Net(), ALONE, watch=True)
