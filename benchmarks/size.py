"""Memory and the start of an epoch, by size of the dataset and number of ranks.

``python benchmarks/size.py [--no-large]``: each measurement runs in new processes; ``--no-large`` omits the
dataset of ten million images, which takes 7.9 GB below ``data/``.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLER = """
import resource, sys, time, torch
from torch.utils.data import DistributedSampler
from distlenet.data.sampler import GlobalBatchSampler
class Sized:
    def __len__(self): return int(sys.argv[2])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
next(iter(GlobalBatchSampler(Sized(), 8, 0, 2, 0)))  # warm up
if sys.argv[1] == "ours": sampler = GlobalBatchSampler(Sized(), 4096 * 64, 17, 4096, 0)
else: sampler = DistributedSampler(Sized(), 4096, 17)
before, started = peak(), time.perf_counter()
next(iter(sampler))
print(f"{1000 * (time.perf_counter() - started):,.1f} ms | {peak() - before:,.1f} MiB")
"""

TRAINING = """
import json, re, sys
from distlenet.train import train
from distlenet.training.trainer import Trainer
from distlenet.config.loading import load_config
class MeasuringTrainer(Trainer):
    def fit(self):
        summary = super().fit()
        smaps = open("/proc/self/smaps_rollup").read()
        kilobytes = {key: int(value) for key, value in re.findall(r"^(\\w+): +(\\d+) kB", smaps, re.M)}
        private = (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) // 1024
        with open(f"{self.run_dir}/memory-{self.env.rank}", "w") as file:
            json.dump({"private": private, "pss": kilobytes["Pss"] // 1024}, file)
        return summary
train(load_config([], sys.argv[1:]), trainer_class=MeasuringTrainer)
"""


def sampler(kind: str, samples: int) -> str:
    """Return time and peak memory of the first batch of an epoch, as two table cells."""
    command = [sys.executable, "-c", SAMPLER, kind, str(samples)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def training(ranks: int, *settings: str) -> str:
    """Train for some steps; return the memory of a rank, of all ranks, and the speed, as three table cells."""
    with tempfile.TemporaryDirectory(prefix="size-") as directory:
        script = Path(directory) / "measure.py"
        script.write_text(TRAINING)
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        words = ("device=cpu", f"run.dir={directory}", "run.name=run", "train.global_batch_size=256", *settings)
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        subprocess.run([*launcher, script, *words], env=environ, check=True, stdout=subprocess.DEVNULL)
        memory = [json.loads(path.read_text()) for path in (Path(directory) / "run").glob("memory-*")]
        speed = json.loads((Path(directory) / "run/summary.json").read_text())["train_images_per_s"]
    private = max(rank["private"] for rank in memory)
    return f"{private:,} MiB | {sum(rank['pss'] for rank in memory):,} MiB | {speed:,.0f}"


def format_count(number: int) -> str:
    """Format 1,000,000,000 as 1 000 M."""
    return re.sub(r"(?<=\d)(?=(\d{3})+$)", " ", str(number // 10**6)) + " M" if number >= 10**6 else f"{number:,}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-large", action="store_true", help="omit the dataset of 10 M images")
    large = not parser.parse_args().no_large
    print("The first batch of an epoch on one of 4,096 ranks, 64 images each:\n")
    print("| samples | sampler | time | memory |\n| ---: | --- | ---: | ---: |")
    for kind, samples in (("torch's", 10**6), ("torch's", 10**7), ("ours", 10**6), ("ours", 10**9)):
        cells = sampler("ours" if kind == "ours" else "torch", samples)
        name = "DistributedSampler" if kind == "torch's" else "GlobalBatchSampler"
        print(f"| {format_count(samples)} | {name} | {cells} |", flush=True)
    print("\nTraining, global batch 256; memory at the end. The sum over ranks counts each page once (Pss):\n")
    print("| images | ranks | private to a rank | all ranks | images/s |\n| ---: | ---: | ---: | ---: | ---: |")
    steps = "train.max_steps=400"
    for ranks in (1, 2, 4, 8):
        print(f"| 60,000 | {ranks} | {training(ranks, steps, 'train.epochs=2')} |", flush=True)
    for images in (10**6, *([10**7] if large else [])):
        settings = ("data.name=synthetic", f"data.synthetic_train={images}", "optim.lr=0.001", steps)
        print(f"| {format_count(images)} | 2 | {training(2, *settings)} |", flush=True)


if __name__ == "__main__":
    main()
