"""Preflight, in which the last rank tells lies: ``lying_preflight.py LIE ...``, a machine's fault that is not there.

In ``gpu`` all ranks lie, in ``pair`` the first two: a message between them takes 0.1 s.
"""

import os
import sys
import time

from distlenet.distributed.entry_point import run_entry
from distlenet.preflight import __main__ as preflight
from distlenet.preflight import allreduce
from distlenet.preflight import rank_info as facts

lie = sys.argv.pop(1)
rank, world_size = (int(os.environ.get(name) or os.environ[slurm]) for name, slurm in
                    (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS")))  # fmt: skip
if lie == "gpu":  # every rank: the same card under different numbers
    facts.gpu_id = lambda _: "GPU-8d2f"
elif lie == "pair" and rank < 2:
    to_and_fro = allreduce._to_and_fro
    allreduce._to_and_fro = lambda buffer, there, first: (
        time.sleep(0.1 if there < 2 else 0), to_and_fro(buffer, there, first))  # fmt: skip
elif rank == world_size - 1:
    versions, now = facts.versions, facts.now
    if lie == "torch":
        facts.versions = lambda: {**versions(), "torch": "2.0.1"}
    elif lie == "clock":
        facts.now = lambda: now() + 300
    elif lie == "settings":
        sys.argv.append("optim.lr=0.3")
run_entry(preflight.main)
