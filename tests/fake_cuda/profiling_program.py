"""Profile steps 1 and 2 of five, ``FILE DIRECTORY``; step i allocates i + 1 pages of 4 KiB."""

import json
import sys
from pathlib import Path

import torch

from distlenet.training.profiling import StepProfiler


def allocated(snapshot: dict) -> list[int]:
    return [event["size"] // 4096 for event in snapshot["device_traces"][0] if event["action"] == "alloc"]


if __name__ == "__main__":
    profiler = StepProfiler(range(1, 3), 5, 0, torch.device("cuda"), Path(sys.argv[1]))
    for step in profiler.follow(range(5), 0):
        torch.empty(4096 * (step + 1), dtype=torch.uint8, device="cuda")
    profiler.close()
    recorded = torch.cuda.memory._snapshot()  # of the process, now
    sys.stdout.write(json.dumps(allocated(recorded)) + "\n")
