"""Join the job as behind a wrapper that lets each rank see some GPUs, ``FILE 0,1/1,0``; print the device."""

import os
import sys
from pathlib import Path

import torch

from distlenet.config.loading import load_config
from distlenet.distributed.collectives import sum_over_ranks
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[1].split("/")[int(os.environ["LOCAL_RANK"])]  # CUDA reads it later
    with init_distributed(load_config(), run_dir=Path("unused")) as context:
        ranks = sum_over_ranks(torch.ones((), device=context.device))  # collective
        sys.stdout.write(f"rank {context.env.rank} of {int(ranks)}: {context.device}, {context.backend}\n")


run_entry(main)
