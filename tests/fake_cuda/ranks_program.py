"""Collectives of two ranks with NCCL, ``FILE numbers|order|one_captures``: correct ones, and ranks that disagree."""

import os
import sys

import torch
import torch.distributed as dist


def numbers(rank: int) -> None:
    """Check each collective in each type, eager and in a graph."""
    device = torch.device("cuda", rank)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64):
        x = torch.tensor([1, 2, 3], dtype=dtype, device=device) + rank
        expected = {dist.ReduceOp.SUM: [3, 5, 7], dist.ReduceOp.MAX: [2, 3, 4], dist.ReduceOp.MIN: [1, 2, 3]}
        for operation, result in expected.items():
            y = x.clone()
            dist.all_reduce(y, operation)
            assert y.tolist() == result
        gathered = torch.empty(6, dtype=dtype, device=device)
        dist.all_gather_into_tensor(gathered, x)
        assert gathered.tolist() == [1, 2, 3, 2, 3, 4]
        half = torch.empty(3, dtype=dtype, device=device)
        dist.reduce_scatter_tensor(half, gathered)
        assert half.tolist() == ([2, 4, 6] if rank == 0 else [4, 6, 8])
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x)
        assert torch.stack(parts).tolist() == [[1, 2, 3], [2, 3, 4]]
        dist.broadcast(x, src=1)
        assert x.tolist() == [2, 3, 4]
    mean = torch.full((1 << 20,), float(rank), device=device)  # several chunks
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.eq(0.5).all()
    fixed = torch.zeros(3, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        dist.all_reduce(fixed)
        fixed.mul_(2)
    for step in range(3):
        fixed.fill_(step + rank)
        graph.replay()
        assert fixed.tolist() == [2.0 * (2 * step + 1)] * 3
    torch.cuda.synchronize()
    graph.reset()


def order(rank: int) -> None:
    """Call two collectives in another order on each rank."""
    tensors = [torch.ones(n, device=torch.device("cuda", rank)) for n in (3, 4)]
    for tensor in tensors if rank == 0 else reversed(tensors):
        dist.all_reduce(tensor)


def one_captures(rank: int) -> None:
    """Replay on one rank what the other runs eagerly."""
    x = torch.ones(3, device=torch.device("cuda", rank))
    dist.all_reduce(x)
    if rank:
        dist.all_reduce(x)
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        dist.all_reduce(x)
    graph.replay()


if __name__ == "__main__":
    number = int(os.environ["RANK"])
    torch.cuda.set_device(number)
    dist.init_process_group("nccl", device_id=torch.device("cuda", number))
    {"numbers": numbers, "order": order, "one_captures": one_captures}[sys.argv[1]](number)
    print("as expected\n", end="", flush=True)
    dist.destroy_process_group()
