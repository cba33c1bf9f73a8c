import inspect
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typing_extensions import get_protocol_members

from distlenet.config.loading import load_config
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.models.lenet import Net
from distlenet.reduction import exact
from distlenet.reduction.batch_size import micro_batch_size
from distlenet.reduction.ddp import DdpReducer
from distlenet.reduction.exact import ExactReducer
from distlenet.reduction.factory import make_reducer
from distlenet.reduction.flat import FlatReducer, fits_flat_buffer
from distlenet.reduction.gradients import group_by_size
from distlenet.reduction.reducer import Reducer, ReductionResult
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

ONE_RANK = DistributedEnvironment()


def make_ddp(
    model: nn.Module,
    accumulation_steps: int = 4,
    size: int = 4,
    compress: bool = False,
    weighted: bool = False,
    find_unused: bool = False,
) -> DdpReducer:
    return DdpReducer(model, ONE_RANK, accumulation_steps, size, dist.all_reduce, compress, weighted, find_unused)


def make_exact(model: nn.Module, virtual_shards: int = 4, size: int = 4, check_finite: bool = True) -> ExactReducer:
    return ExactReducer(model, ONE_RANK, virtual_shards, size, check_finite)


def make_flat(
    model: nn.Module, accumulation_steps: int = 4, size: int = 4, weighted: bool = False, find_unused: bool = False
) -> FlatReducer:
    return FlatReducer(model, ONE_RANK, accumulation_steps, size, dist.all_reduce, weighted, find_unused)


ALL = pytest.mark.parametrize("make", [make_exact, make_ddp, make_flat])


def make_batch(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def reduce_step(
    reducer: Reducer, batch: tuple[Tensor, Tensor], stop: bool = False, factors: dict[int, float] | None = None
) -> ReductionResult:
    """Reduce the gradient of the mean loss; ``factors`` multiply the losses of micro-batches, by number."""
    reducer.model.zero_grad()
    with reducer.step(len(batch[0]), torch.tensor(float(stop))) as step:
        for micro_batch in step.micro_batches(batch):
            images, labels = micro_batch.data
            loss = F.cross_entropy(reducer.model(images), labels, reduction="sum")
            step.backward(loss * (factors or {}).get(micro_batch.number, 1.0))
    return step.result


def reduce_gradients(layer: nn.Linear, reducer: Reducer, gradients: list[float]) -> ReductionResult:
    """Reduce one step in which micro-batch k has the k-th of ``gradients`` for the only weight of ``layer``."""
    layer.zero_grad()
    with reducer.step(1, torch.tensor(0.0)) as step:
        for (gradient,) in (micro_batch.data for micro_batch in step.micro_batches(torch.tensor(gradients))):
            step.backward((layer.weight * gradient).sum())
    return step.result


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("n", [16, 13, 3])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_exact_gradient_equals_the_gradient_in_float64(n, memory_format):
    model = make_net().to(memory_format=memory_format)
    images, labels = make_batch(n)
    double = Net().double()
    double.load_state_dict(model.state_dict())
    F.cross_entropy(double(images.double()), labels).backward()
    result = reduce_step(make_exact(model, virtual_shards=8, size=2), (images, labels))
    assert not result.flag.isnan()
    for parameter, reference in zip(model.parameters(), double.parameters(), strict=True):
        # Float32 kernels: sums of up to 900 × 16 products of values near 1e-2, at 6e-8 relative each, well below
        # 1e-5; the grid of 2**-40 in each of 8 shards adds 4e-12.
        torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)
        assert parameter.grad.stride() == parameter.stride()  # as fused optimizers require


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_in_any_memory_order_is_reduced_and_not_changed(memory_format):
    weight = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    gradient = torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=memory_format)
    reducer = make_exact(nn.ParameterList([weight]), virtual_shards=1)
    with reducer.step(1, torch.tensor(0.0)) as step:
        for _ in step.micro_batches(torch.zeros(1)):
            step.backward(weight.sum())
            weight.grad = gradient
    assert torch.equal(weight.grad, gradient)
    assert weight.grad.stride() == weight.stride()


@pytest.mark.usefixtures("group")
def test_chunks_of_an_exact_sum_do_not_change_the_bits(monkeypatch):
    """Chunks of 500 elements: some parameters of LeNet share one, and the largest has 97."""
    gradients = []
    for chunk in (1 << 18, 500):
        monkeypatch.setitem(exact.CHUNK, "cpu", chunk)
        model = make_net().to(memory_format=torch.channels_last)
        reduce_step(make_exact(model), make_batch(13))
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_parameters_are_grouped_up_to_a_size():
    sizes = (3, 4, 1, 9, 0, 8)
    groups = group_by_size([nn.Parameter(torch.zeros(size)) for size in sizes], limit=8)
    assert [[parameter.numel() for parameter in group] for group in groups] == [[3, 4, 1], [9], [0, 8]]


@pytest.mark.usefixtures("group")
def test_reducers_agree():
    gradients = []
    for make in (
        partial(make_exact, virtual_shards=8, size=2),
        partial(make_ddp, accumulation_steps=1, size=16),
        partial(make_ddp, accumulation_steps=3, size=6),  # micro-batches of 6, 6 and 4
        partial(make_flat, accumulation_steps=3, size=6),
        partial(make_flat, accumulation_steps=1, size=16),
    ):
        model = make_net()
        reduce_step(make(model), make_batch(16))
        gradients.append([p.grad.clone() for p in model.parameters()])
    for summed_exactly, whole, accumulated, flat_accumulated, flat in zip(*gradients, strict=True):
        torch.testing.assert_close(summed_exactly, whole, rtol=1e-4, atol=1e-5)  # as above
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(flat, whole)
        assert torch.equal(flat_accumulated, accumulated)


@pytest.mark.usefixtures("group")
def test_parameter_that_a_flat_gradient_leaves_out():
    layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    for find_unused in (True, False):
        reducer = make_flat(layers, find_unused=find_unused)
        with nullcontext() if find_unused else pytest.raises(UserError, match=r"loss does not depend on 1\.weight,"):
            with reducer.step(1, torch.tensor(0.0)) as step:
                for _ in step.micro_batches(torch.zeros(1)):
                    step.backward(layers[0](torch.ones(1)).sum())
            assert layers[0].weight.grad.item() == 1
            assert layers[1].weight.grad.item() == 0
        layers.zero_grad()


@pytest.mark.usefixtures("group")
def test_flat_gradient_of_weighted_losses_is_divided_by_the_weights():
    layer = nn.Linear(1, 1, bias=False)
    reducer = make_flat(layer, size=1, weighted=True)
    with reducer.step(2, torch.tensor(0.0)) as step:
        for micro_batch in step.micro_batches(torch.tensor([3.0, 5.0])):
            step.backward((layer.weight * micro_batch.data).sum(), micro_batch.data.double().sum() * 2)
    assert layer.weight.grad.item() == 0.5
    layer.zero_grad()
    with reducer.step(2, torch.tensor(0.0)) as step:
        for _ in step.micro_batches(torch.zeros(1)):
            step.backward((layer.weight * 0).sum(), torch.zeros(()).double())
    assert step.result.flag.isnan()  # no weight


@pytest.mark.parametrize(
    ("model", "all_reduce", "fits"),
    [
        (nn.Linear(512, 512), abs, True),  # as in shared memory
        (nn.Linear(512, 512), dist.all_reduce, False),
        (nn.Linear(1, 1).double(), abs, False),
    ],
)
def test_cpu_networks_are_reduced_flat_in_shared_memory(model, all_reduce, fits):
    assert fits_flat_buffer(model, all_reduce) == fits


@pytest.mark.parametrize(("width", "fits"), [(511, True), (512, False)])  # 2**20 bytes, and more
def test_gpu_networks_up_to_one_mebibyte_are_reduced_flat(monkeypatch, width, fits):
    layer = nn.Linear(width, 512)
    monkeypatch.setattr("distlenet.reduction.flat.on_gpu", lambda _: True)
    assert fits_flat_buffer(layer, dist.all_reduce) == fits


@given(st.integers(0, 100), st.sampled_from([(1, 8), (2, 8), (4, 8), (8, 8), (3, 6), (2, 12), (1, 1)]))
def test_shards_do_not_depend_on_the_world_size(n, sizes):
    world_size, shards = sizes
    positions = torch.arange(n)
    split = {}
    for rank in range(world_size):
        env = DistributedEnvironment(rank, 0, world_size)
        reducer = ExactReducer(nn.Linear(1, 1), env, shards, 99, check_finite=True)
        for micro_batch in reducer.split(positions[rank::world_size]):
            assert micro_batch.number not in split
            split[micro_batch.number] = micro_batch.data.tolist()
    assert split == {shard: positions[shard::shards].tolist() for shard in range(min(n, shards))}


@pytest.mark.parametrize("kind", [DdpReducer, ExactReducer, FlatReducer])
def test_reducers_implement_the_protocol(kind):
    """The type checker compares the types; here, members and parameters."""
    model = nn.Linear(1, 1)
    attributes = {"model", "buffers", "capture_after", "micro_batch_size", "micro_batches_per_rank"}
    methods = get_protocol_members(Reducer) - attributes
    assert methods == {"warm_up", "reset", "cap_micro_batch_size", "split", "map", "step"}
    for name in methods:
        expected = inspect.signature(getattr(Reducer, name)).parameters
        assert list(inspect.signature(getattr(kind, name)).parameters.values()) == list(expected.values())
    if kind is ExactReducer:
        reducer = make_exact(model)
        assert all(hasattr(reducer, name) for name in attributes)


@pytest.mark.usefixtures("group")
@ALL
def test_reducer_goes_through_the_calls_of_a_run(make):
    """Warm up, cap the micro-batches, fail in a step, reset: the gradient is that of a new reducer."""
    model = make_net()
    reducer: Reducer = make(model)
    weights = [p.clone() for p in model.parameters()]
    batch = make_batch(16)

    def example_loss(wrapped):
        return wrapped(batch[0][:1]).sum()

    reducer.warm_up(example_loss)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    reducer.cap_micro_batch_size(4)
    calls = []

    def fail_in_last_backward(_):
        calls.append(1)
        if len(calls) == 4:  # most gradients of the last micro-batch are complete
            raise ArithmeticError

    hook = model.conv2.weight.register_hook(fail_in_last_backward)
    with pytest.raises(ArithmeticError):
        reduce_step(reducer, batch)
    hook.remove()
    model.zero_grad()
    reducer.reset(example_loss)
    result = reduce_step(reducer, batch)
    assert (bool(result.flag > 0), bool(result.flag.isnan())) == (False, False)
    assert result.gradient_ready.host_s <= result.reduced.host_s
    fresh = make_net()
    reduce_step(make(fresh), batch)
    for parameter, expected, before in zip(model.parameters(), fresh.parameters(), weights, strict=True):
        assert torch.equal(parameter.grad, expected.grad)
        assert torch.equal(parameter, before)


@pytest.mark.usefixtures("group")
@ALL
def test_result_is_not_available_within_the_step(make):
    reducer = make(make_net())
    images, labels = make_batch(16)
    with reducer.step(16, torch.tensor(0.0)) as step:
        for micro_batch in step.micro_batches((images, labels)):
            step.backward(reducer.model(micro_batch.data[0]).sum())
            with pytest.raises(RuntimeError, match="no result before its with block ends"):
                _ = step.result
    assert not step.result.flag.isnan()


@pytest.mark.usefixtures("group")
@ALL
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_loss_is_detected(make, factor):
    reducer = make(make_net())
    assert not reduce_step(reducer, make_batch(16)).flag.isnan()
    assert reduce_step(reducer, make_batch(16), factors={2: factor}).flag.isnan()
    assert not reduce_step(reducer, make_batch(16)).flag.isnan()


@pytest.mark.usefixtures("group")
def test_gradient_too_large_for_the_exact_sum_is_detected():
    assert reduce_step(make_exact(make_net()), make_batch(16), factors={2: 1e30}).flag.isnan()


@pytest.mark.usefixtures("group")
def test_bound_of_the_exact_sum():
    """A gradient just below the bound is summed without rounding; one at the bound is detected."""
    layer = nn.Linear(1, 1, bias=False)
    reducer = make_exact(layer, virtual_shards=8, size=1)
    assert reducer.limit == 512
    below = torch.nextafter(torch.tensor(512.0), torch.tensor(0.0)).item()
    for value in (below, -below):
        assert not reduce_gradients(layer, reducer, [value] * 8).flag.isnan()
        assert layer.weight.grad.item() == 8 * value
    assert reduce_gradients(layer, reducer, [512.0] * 8).flag.isnan()


@pytest.mark.usefixtures("group")
def test_loss_scaling_expects_overflows_and_passes_them_to_the_scaler():
    layer = nn.Linear(1, 1, bias=False)
    reducer = make_exact(layer, virtual_shards=1, size=1, check_finite=False)
    layer.weight.register_hook(lambda _: torch.full((1, 1), float("inf")))
    assert not reduce_gradients(layer, reducer, [1.0]).flag.isnan()
    assert not layer.weight.grad.isfinite().all()


@pytest.mark.usefixtures("group")
def test_parameter_without_gradient_gets_zeros():
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "unused": nn.Linear(1, 1)})
    reducer = make_exact(model, virtual_shards=1, size=1)
    with reducer.step(1, torch.tensor(0.0)) as step:
        for micro_batch in step.micro_batches(torch.ones(1, 1)):
            step.backward(model["used"](micro_batch.data).sum())
    assert torch.equal(model["unused"].weight.grad, torch.zeros(1, 1))
    assert torch.equal(model["used"].weight.grad, torch.ones(1, 1))


class Branches(nn.Module):
    """Uses one of two layers, by the sign of the first sample."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.unused = (nn.Linear(1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.positive if x[0] > 0 else self.negative)(x)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1)])
def test_other_parameters_in_each_micro_batch(signs, compress, weighted):
    model, plain = Branches(), Branches()
    plain.load_state_dict(model.state_dict())
    reducer = make_ddp(model, 2, 2, compress, weighted, find_unused=True)
    reducer.warm_up(lambda wrapped: wrapped(torch.ones(1, 1)).sum())
    data = torch.tensor([[1.0], [2.0], [3.0], [4.0]]) * torch.tensor(signs).repeat_interleave(2).unsqueeze(1)
    for stop in (0.0, 1.0):
        model.zero_grad()
        with reducer.step(4, torch.tensor(stop)) as step:
            for micro_batch in step.micro_batches(data):
                step.backward(reducer.model(micro_batch.data).sum(), torch.tensor(6.0).double() if weighted else None)
        assert (bool(step.result.flag > 0), bool(step.result.flag.isnan())) == (stop > 0, False)
        plain.zero_grad()
        for part in data.split(2):
            (plain(part).sum() / (12 if weighted else 4)).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(ours.grad, expected, rtol=2**-7 if compress else 1e-6, atol=0, msg=name)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("signs", "message"), [((1, 1), "negative.weight, negative.bias"), ((1, -1), "all parameters")]
)
def test_unused_parameters_are_refused(signs, message):
    """Also if an earlier micro-batch uses them, which only the next forward pass finds."""
    model = Branches()
    model.unused.requires_grad_(False)
    reducer = make_ddp(model, accumulation_steps=2, size=2)
    reducer.warm_up(lambda wrapped: wrapped(torch.ones(1, 1)).sum())
    data = torch.ones(4, 1) * torch.tensor(signs).repeat_interleave(2).unsqueeze(1)

    def take_steps():
        for _ in range(2):
            model.zero_grad()
            with reducer.step(4, torch.tensor(0.0)) as step:
                for micro_batch in step.micro_batches(data):
                    step.backward(reducer.model(micro_batch.data).sum())

    with pytest.raises(UserError, match=rf"does not depend on {message}: .*distributed\.find_unused_parameters=true"):
        take_steps()


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
def test_sync_batchnorm_is_refused(reduction):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SyncBatchNorm(4))
    with pytest.raises(UserError, match=r"1 \(SyncBatchNorm\): waits for all ranks .*; give model.sync_batchnorm=true"):
        make_reducer(load_config([], [f"distributed.reduction={reduction}"]), model, ONE_RANK, True, weighted=False)


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match="needs dense float32 parameters, but weight"):
        make_exact(nn.Linear(1, 1).double())


EXACT, DDP = "distributed.reduction=exact", "distributed.reduction=ddp"
SHARDS = "distributed.virtual_shards=8"


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (
            [DDP, "train.global_batch_size=64"],
            3,
            "64: is not divisible by 3 ranks × 1 accumulation steps; give 63 or 66 or distributed.allow_uneven",
        ),
        ([DDP, "train.global_batch_size=10", "train.accumulation_steps=4"], 2, "give 8 or 16"),
        ([DDP, "train.global_batch_size=5"], 8, "; give 8 or distributed"),
        ([EXACT, SHARDS, "train.global_batch_size=100"], 1, "virtual_shards=8; give 96 or 104"),
        ([EXACT, SHARDS], 3, "virtual_shards=8: is not divisible by 3 ranks; start 1 or 2 or 4 or 8 ranks, or"),
        ([EXACT, SHARDS], 3, "another value"),
        ([EXACT], 4, r"start 1 or 2 ranks, or give distributed.virtual_shards=4, which changes the result"),
        ([EXACT, "train.global_batch_size=32"], 2, r"=1 \(auto, for train.global_batch_size=32\): .*start 1 rank, or"),
        ([EXACT, "train.accumulation_steps=2"], 1, "raise distributed.virtual_shards"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_and_others_suggested(overrides, ranks, message):
    with pytest.raises(UserError, match=message):
        micro_batch_size(load_config([], overrides), ranks)


def test_sizes_that_divide():
    assert micro_batch_size(load_config([], [EXACT]), 2) == 64
    assert micro_batch_size(load_config([], [EXACT, SHARDS]), 4) == 16
    ddp = load_config([], [DDP, "train.global_batch_size=96", "train.accumulation_steps=3"])
    assert micro_batch_size(ddp, 4) == 8


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ([EXACT], ExactReducer),
        ([DDP], FlatReducer),
        ([DDP, "distributed.shared_memory=off"], DdpReducer),
        ([DDP, "distributed.gradient_compression=bf16"], DdpReducer),
    ],
)
def test_configured_reducer_is_made(settings, kind):
    assert type(make_reducer(load_config([], settings), Net(), ONE_RANK, True, weighted=False)) is kind


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 1, 0), (3, 0, 2, 1)])
def test_order_of_shards_does_not_matter(order):
    """The values are chosen so that it matters in plain float64.

    1 + 2**-24 is half way between two float32. Whether the two 2**-53 are added to each other first, or lost one by
    one, decides which of the two is nearer.
    """
    shards = [1.0, 2.0**-24, 2.0**-53, 2.0**-53]
    layer = nn.Linear(1, 1, bias=False)
    reduce_gradients(layer, make_exact(layer, size=1), [shards[number] for number in order])
    assert layer.weight.grad.item() == 1.0


@pytest.mark.usefixtures("group")
@ALL
def test_stop_request_reaches_the_result_and_does_not_change_the_gradient(make):
    gradients = []
    for stop in (False, True):
        model = make_net()
        result = reduce_step(make(model), make_batch(16), stop=stop)
        assert bool(result.flag > 0) == stop
        assert not result.flag.isnan()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("group")
def test_capped_micro_batches_are_smaller_and_more():
    reducer = make_ddp(Net(), accumulation_steps=1, size=64)
    reducer.cap_micro_batch_size(24)
    assert [len(micro_batch.data) for micro_batch in reducer.split(torch.zeros(64, 1))] == [24, 24, 16]
    assert reducer.micro_batches_per_rank == 3
    reducer.cap_micro_batch_size(100)
    assert reducer.micro_batch_size == 24


@pytest.mark.usefixtures("group")
@ALL
def test_rank_without_samples_takes_part(make):
    """In a short last batch, a rank may have no sample: it has no micro-batch, and its gradient is zero."""
    model = make_net()
    reducer = make(model)
    reduce_step(reducer, make_batch(16))  # leaves sums behind
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model received a batch without samples"))
    for no_samples in ((), (torch.zeros(0, 1, 32, 32), torch.zeros(0))):
        model.zero_grad()
        with reducer.step(3, torch.tensor(1.0)) as step:
            assert list(step.micro_batches(no_samples)) == []
        assert (bool(step.result.flag > 0), bool(step.result.flag.isnan())) == (True, False)
        assert all(bool((p.grad == 0).all()) for p in model.parameters())


@pytest.mark.parametrize(("overrides", "size"), [([], 43), ([EXACT, SHARDS], 16)])
def test_uneven_batches_need_a_setting(overrides, size):
    with pytest.raises(UserError, match="is not divisible by 3 ranks"):
        micro_batch_size(load_config([], overrides), 3)
    assert micro_batch_size(load_config([], [*overrides, "distributed.allow_uneven_batches=true"]), 3) == size
    with pytest.raises(UserError, match="is not divisible by 9 ranks"):
        micro_batch_size(load_config([], [EXACT, "distributed.allow_uneven_batches=true"]), 9)


def test_exact_sums_of_compressed_gradients_are_refused():
    with pytest.raises(UserError, match=r"distributed\.gradient_compression=bf16: rounds"):
        make_reducer(
            load_config([], [EXACT, "distributed.gradient_compression=bf16"]), Net(), ONE_RANK, True, weighted=False
        )
