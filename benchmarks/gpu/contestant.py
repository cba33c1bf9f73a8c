"""A training program that takes steps in turns; see ``gpu.turns``.

``contestant.py NAME --batch 1024 --precision bf16 [key=value]...``: ``ours`` is this package with the given settings;
plain, lightning and limit are those of ``benchmarks/peers.py``; resnet and resnet-graph are in ``gpu.resnet_by_hand``.
"""

import argparse
import functools
import os
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gpu.turns import TurnClock


def ours(settings: list[str], clock: TurnClock) -> None:
    """Train with this package; the ends of epochs, with evaluation and written checkpoint, are not measured."""
    from distlenet.distributed.entry_point import run_entry
    from distlenet.training.trainer import Trainer

    class InTurns(Trainer):
        def step(self, batch: Any) -> Any:
            result = super().step(batch)
            clock.tick()
            return result

        def finish_epoch(self) -> str | None:
            with clock.paused():
                not_saved = super().finish_epoch()
                self.checkpoints.close()  # waits for the write
            return not_saved

    sys.argv[1:] = settings
    run_entry(functools.partial(import_module("distlenet.train").main, trainer_class=InTurns))


def be_the_only_rank() -> None:
    """Set the variables of a launcher, for programs that need one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def main() -> None:
    """Train until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("ours", "plain", "lightning", "limit", "resnet", "resnet-graph"))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", choices=("torchvision", "tensors"), default="torchvision")
    parser.add_argument("--directory", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    clock = TurnClock(torch.device(arguments.device))
    if arguments.name == "ours":
        more = [f"device={arguments.device}", f"precision={arguments.precision}"]
        ours([f"train.global_batch_size={arguments.batch}", *more, *arguments.settings], clock)
        return
    be_the_only_rank()
    import peers

    from gpu import resnet_by_hand

    device = torch.device(arguments.device, 0 if arguments.device == "cuda" else None)
    compute: Any = peers.Compute(device, arguments.precision)
    if arguments.name.startswith("resnet"):
        resnet_by_hand.train(arguments.batch, compute, clock, graph=arguments.name == "resnet-graph")
        return
    data: Any = None  # the limit makes its own
    if arguments.name == "limit":  # the same kernels as distlenet's, to see what is around the step
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    else:
        data = peers.make_dataset(arguments.data, arguments.directory)
    torch.manual_seed(0)
    peers.PEERS[arguments.name](data, arguments.batch, arguments.workers, compute, clock)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
