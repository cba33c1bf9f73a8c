"""ResNet-18 at 224×224 on images in GPU memory: the loop that a user would write."""

import torch
import torch.nn.functional as F
from peers import SGD, Compute
from torchvision.models import resnet18

from gpu.turns import TurnClock

IMAGES, CLASSES, SIZE = 2048, 10, 224


def train(batch: int, compute: Compute, clock: TurnClock, graph: bool) -> None:
    """Train on random images, chosen at random for each step; with ``graph``, replay a captured step."""
    device = compute.device
    torch.backends.cudnn.deterministic = True  # as distlenet
    torch.manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (IMAGES,), device=device)
    net = resnet18(num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    optim = torch.optim.SGD(net.parameters(), **SGD, fused=device.type == "cuda")
    chosen = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        x = images[chosen].to(memory_format=torch.channels_last).float().div_(255).sub_(0.5).div_(0.25)
        with compute.autocast():
            loss = F.cross_entropy(net(x), labels[chosen], label_smoothing=0.05)
        optim.zero_grad()
        loss.backward()
        optim.step()

    run = capture(step) if graph else step
    while True:
        chosen.copy_(torch.randint(0, IMAGES, (batch,)), non_blocking=True)
        run()
        if clock.tick():
            break


def capture(step):  # type: ignore[no-untyped-def]
    """Return the replay of a captured step."""
    torch.cuda.set_stream(torch.cuda.Stream())
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay
