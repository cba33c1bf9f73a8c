"""Break each rule of CUDA that the fake keeps, and compare replayed operators with eager ones."""

import contextlib
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from fake_cuda import runtime
from fake_cuda.mode import paused


def capture(work: Callable[[], object], mode: str = "thread_local") -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode=mode):
        work()
    return graph


def error_of(work: Callable[[], object], mode: str = "thread_local") -> str:
    """Return the messages of a capture that fails, the cause first; check that the next capture works."""
    try:
        capture(work, mode)
    except RuntimeError as error:
        texts = []
        while error is not None:
            texts.insert(0, str(error).splitlines()[0])
            error = error.__context__
        x = torch.zeros(2, device="cuda")
        capture(lambda: x.add_(1)).replay()
        assert x.tolist() == [1.0, 1.0]
        return "; ".join(texts)
    return "no error"


def reading_a_value() -> None:
    x = torch.ones(2, device="cuda")
    error = error_of(lambda: x.sum().item())
    assert "operation not permitted when stream is capturing" in error, error


def a_sync_of_the_device() -> None:
    assert "not permitted when stream is capturing" in error_of(torch.cuda.synchronize)


def a_copy_from_pageable_memory() -> None:
    x, y = torch.ones(2, device="cuda"), torch.ones(2)
    assert "pinned" in error_of(lambda: x.copy_(y, non_blocking=True))


def an_unjoined_stream() -> None:
    x, side = torch.ones(2, device="cuda"), torch.cuda.Stream()

    def work() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)

    assert "unjoined work" in error_of(work)


def a_wait_for_work_outside() -> None:
    x, side = torch.ones(2, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.add_(1)
        event = side.record_event()

    def work() -> None:
        torch.cuda.current_stream().wait_event(event)
        x.add_(1)

    assert "dependency created on uncaptured work" in error_of(work)


def a_query_of_a_captured_event() -> None:
    x = torch.ones(2, device="cuda")

    def work() -> None:
        x.add_(1)
        torch.cuda.current_stream().record_event().query()

    assert "event last recorded in a capturing stream" in error_of(work)


def another_thread_allocates_pinned_memory() -> None:
    x = torch.ones(2, device="cuda")
    sizes = iter((1 << 16, 1 << 20))  # not from the allocator's cache

    def pin() -> None:
        with contextlib.suppress(RuntimeError):
            torch.empty(next(sizes), pin_memory=True)

    def work() -> None:
        x.add_(1)
        thread = threading.Thread(target=pin)
        thread.start()
        thread.join()
        x.add_(1)

    capture(work)
    assert "previous error during capture" in error_of(work, "global")


def a_graph_computes_on_fixed_memory() -> None:
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    runtime.reset()
    graph = capture(lambda: y.copy_(x * 2 + 1))
    assert y.tolist() == [0.0, 0.0, 0.0]
    assert len(runtime.nodes()) == 3
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11.0, 11.0, 11.0]
    x = torch.full((3,), 7.0, device="cuda")  # other memory, which the graph does not read
    graph.replay()
    assert y.tolist() == [11.0, 11.0, 11.0]


def training_step(dropout: torch.nn.Module, x: Tensor, weight: Tensor, out: Tensor) -> None:
    noise = torch.empty_like(x).normal_()
    (gradient,) = torch.autograd.grad((dropout(dropout(x) @ weight) + noise).square().sum(), weight)
    out.copy_(gradient + torch.rand_like(gradient))


def random_numbers_of_a_replay() -> None:
    dropout, x = torch.nn.Dropout(0.5), torch.randn(64, 8, device="cuda")
    weight, out = torch.randn(8, 8, device="cuda", requires_grad=True), torch.zeros(8, 8, device="cuda")

    def run(step: Callable[[], object], reseed: bool) -> list[Tensor]:
        torch.cuda.manual_seed(3)
        results = []
        for i in range(3):
            if reseed:
                torch.cuda.manual_seed(10 + i)
            step()
            results.append(out.cpu())
        return results

    for reseed in (False, True):
        eager = run(lambda: training_step(dropout, x, weight, out), reseed)
        assert not torch.equal(eager[0], eager[1])
        graph = capture(lambda: training_step(dropout, x, weight, out))
        replayed = run(graph.replay, reseed)
        assert all(map(torch.equal, eager, replayed)), f"reseed {reseed}"


def random_numbers_of_two_states() -> None:
    """Each part of a step has a generator, which takes the place of the default one."""
    default, out = torch.cuda.default_generators[0], torch.zeros(2, 2, 8, device="cuda")
    states = [torch.Generator("cuda"), torch.Generator("cuda")]

    def step() -> None:
        before = default.graphsafe_get_state()
        for part, state in zip(out, states, strict=True):
            default.graphsafe_set_state(state)
            for row in part:
                row.uniform_()
        default.graphsafe_set_state(before)

    def run(work: Callable[[], object]) -> list[Tensor]:
        results = []
        for number in range(3):
            for i, state in enumerate(states):
                state.manual_seed(10 * number + i)
            work()
            results.append(out.cpu())
        return results

    eager = run(step)
    assert len(torch.cat(eager).unique()) == 3 * 2 * 2 * 8
    graph = torch.cuda.CUDAGraph()
    for state in states if torch.__version__ < "2.14" else ():
        graph.register_generator_state(state)
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        step()
    assert all(map(torch.equal, eager, run(graph.replay)))


def batch_norm_of_an_evaluation() -> None:
    norm, x = torch.nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 3, 3)
    assert norm.running_mean is not None
    norm.running_mean.fill_(0.5)
    expected = norm(x)
    torch.testing.assert_close(norm.cuda()(x.cuda()).cpu(), expected)


def launches_are_those_without_numbers() -> None:
    net, x = torch.nn.Conv2d(1, 2, 3).cuda(), torch.randn(4, 1, 8, 8, device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.dropout(net(x)).square().mean().backward()
        optimizer.step()

    def nodes() -> list[str]:
        with torch.cuda.stream(torch.cuda.Stream()):
            step()
            capture(step)
        return runtime.nodes()

    with paused():
        expected = nodes()
    assert "kernel cudnn::convolution_backward_weight" in expected
    assert nodes() == expected


def memory_is_counted() -> None:
    torch.cuda.empty_cache()
    before = runtime.device_bytes()
    x = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    assert runtime.device_bytes() - before == x.nbytes
    del x
    torch.cuda.empty_cache()
    assert runtime.device_bytes() == before


CHECKS = (
    reading_a_value,
    a_sync_of_the_device,
    a_copy_from_pageable_memory,
    an_unjoined_stream,
    a_wait_for_work_outside,
    a_query_of_a_captured_event,
    another_thread_allocates_pinned_memory,
    a_graph_computes_on_fixed_memory,
    random_numbers_of_a_replay,
    random_numbers_of_two_states,
    batch_norm_of_an_evaluation,
    launches_are_those_without_numbers,
    memory_is_counted,
)

if __name__ == "__main__":
    for check in CHECKS:
        print(check.__name__, flush=True)
        check()
    print("all as on a GPU")
