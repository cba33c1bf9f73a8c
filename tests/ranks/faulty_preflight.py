"""Run preflight with a simulated fault, ``faulty_preflight.py FAULT ...``, on the last rank.

``gpu`` and ``cuda`` apply to all ranks, and ``pair`` to the first two: a message between them takes 0.5 s.
"""

import os
import socket
import sys
import time
from types import SimpleNamespace

import torch

from distlenet.distributed.device import VisibleGpus
from distlenet.distributed.entry_point import run_entry
from distlenet.preflight import __main__ as preflight
from distlenet.preflight import allreduce, exchange, rank_info

fault = sys.argv.pop(1)
rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
world_size = int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"])
if fault == "gpu":  # all ranks see the same one
    sys.argv[sys.argv.index("device=cpu")] = "device=cuda"
    exchange.visible_gpus = lambda _: VisibleGpus(socket.gethostname(), ["GPU-8d2f"], [True])
elif fault == "cuda":  # there is a GPU, but CUDA must not be initialized
    torch.cuda.device_count, torch.cuda.is_available = lambda: 1, lambda: True
    torch.cuda._lazy_init = lambda: os.abort()
elif fault == "pair" and rank < 2:
    ping_pong = allreduce._ping_pong

    def slow_ping_pong(buffer, peer, first):
        time.sleep(0.5 if peer < 2 else 0)
        ping_pong(buffer, peer, first)

    allreduce._ping_pong = slow_ping_pong
elif rank == world_size - 1:
    versions = rank_info.versions
    if fault == "torch":
        rank_info.versions = lambda backend: {**versions(backend), "torch": "2.0.1"}
    elif fault == "clock":
        exchange.time = SimpleNamespace(time=lambda: time.time() + 300)
    elif fault == "settings":
        sys.argv.append("optim.lr=0.3")
run_entry(preflight.main)
