"""Capture each kind of random numbers in a CUDA graph, without a host sync; compare its replays with the CPU's bits."""

import torch

from distlenet.task import SampleKeys

DRAWS = {
    "uniform": lambda keys: keys.uniform("a", (4, 4)),
    "normal": lambda keys: keys.normal("a", (4, 4)),
    "integers": lambda keys: keys.integers("a", 2**31, (4, 4)),
    "choice": lambda keys: keys.choice("a", [1, 2, 5], (4, 4), [0.5, 0.25, 0.25]),
    "bernoulli": lambda keys: keys.bernoulli("a", 0.5, (4, 4)),
}
INDICES = torch.arange(2**13)

for name, draw in DRAWS.items():
    epoch = torch.tensor(3, device="cuda")
    keys = SampleKeys(7, epoch, INDICES.cuda())
    draw(keys)  # the first call may copy constants to the GPU
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw(keys)
    torch.cuda.set_sync_debug_mode("default")
    for number in (3, 4):
        epoch.fill_(number)
        graph.replay()
        assert torch.equal(captured.cpu(), draw(SampleKeys(7, number, INDICES))), name
    print(name)
