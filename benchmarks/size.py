"""Memory, speed and the start of an epoch, by size of the dataset and number of ranks.

``python benchmarks/size.py [--only sampler training cache] [--no-large] [--smoke]``: each measurement runs in new
processes. ``--no-large`` omits ten million images, which take 7.9 GB in a temporary directory; ``--smoke`` uses small
data sets, to try the program.

``cache`` writes a file of decoded 28×28 grey images, as ``data.cache`` does, and opens it as a job does: local rank 0
verifies it (of a large file, 512 MiB), and all ranks map it. Then each rank loads batches of 256 in an epoch's random
order without the transform, twice for five seconds: at first, the kernel has to map the pages that the rank reads.
Except in the rows "on disk", the file is in the kernel's memory. A rank's own memory is anonymous; its PSS and RSS
include the pages of the file that it has read.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import chain, count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import default_collate

from distlenet.config.loading import load_config
from distlenet.data.cache_file import CHUNK_IMAGES, CacheFile
from distlenet.data.loader import Loader
from distlenet.data.sampler import GlobalBatchSampler
from distlenet.data.sources.opened import StoredImages
from distlenet.distributed.collectives import all_gather_object, broadcast_from_local_rank_0
from distlenet.distributed.context import init_distributed
from distlenet.utils.mapped_file import TensorRef, open_shared, share_tensors

PARTS = ("sampler", "training", "cache")
SHAPE, BATCH = (28, 28), 256  # of the cached images; images of a rank's batch

SAMPLER = """
import resource, sys, time, torch
from torch.utils.data import DistributedSampler
from distlenet.data.sampler import GlobalBatchSampler
class Sized:
    def __len__(self): return int(sys.argv[2])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
next(iter(GlobalBatchSampler(Sized(), 8, 0, 2, 0, drop_last=False, virtual_shards=None)))  # warm up
if sys.argv[1] == "ours": sampler = GlobalBatchSampler(Sized(), 4096 * 64, 17, 4096, 0, False, None)
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
    def fit(self, *arguments):
        summary = super().fit(*arguments)
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


def launch(ranks: int, *words: object) -> str:
    """Run a program on all ranks, and return its output."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [*launcher, *map(str, words)]
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


def training(ranks: int, *settings: str) -> str:
    """Train for some steps; return the memory of a rank, of all ranks, and the speed, as three table cells."""
    with tempfile.TemporaryDirectory(prefix="size-") as directory:
        script = Path(directory) / "measure.py"
        script.write_text(TRAINING)
        if "data.name=synthetic" in settings:
            settings += (f"data.root={directory}",)  # removed afterwards
        words = ("device=cpu", f"run.dir={directory}", "run.name=run", "train.global_batch_size=256", *settings)
        launch(ranks, script, *words)
        memory = [json.loads(path.read_text()) for path in (Path(directory) / "run").glob("memory-*")]
        speed = json.loads((Path(directory) / "run/summary.json").read_text())["train_images_per_s"]
    private = max(rank["private"] for rank in memory)
    return f"{private:,} MiB | {sum(rank['pss'] for rank in memory):,} MiB | {speed:,.0f}"


def write_cache(file: CacheFile) -> None:
    """Write random images, the same ones in each chunk."""
    samples = [(image, 0) for image in torch.randint(256, (CHUNK_IMAGES, *SHAPE), dtype=torch.uint8)]
    file.create()
    for chunk in range(file.chunks):
        file.write_chunk(chunk, "stamp", samples[: len(file.rows(chunk))])
    file.finish()


def cached(path: Path, images: int, seconds: float) -> None:
    """Open a cache file as one rank, and load batches; rank 0 prints eight table cells."""
    with init_distributed(load_config([], ["device=cpu"])) as context, ExitStack() as stack:
        env, stored = context.env, None
        dist.barrier()
        started = time.perf_counter()
        if env.local_rank == 0:
            if not CacheFile(path, path, images, SHAPE).is_intact():
                raise RuntimeError(f"{path} is damaged")
            shared = stack.enter_context(closing(open_shared(path)))
            zeros = torch.zeros(1, dtype=torch.int64).expand(images)
            label_file, labels = share_tensors(zeros.split(2**16), images)
            stack.enter_context(closing(label_file))
            stored = StoredImages(TensorRef(shared.ref, 0, (images, *SHAPE), torch.uint8), labels)
        dataset = broadcast_from_local_rank_0(stored, env).map()
        dist.barrier()
        opened = time.perf_counter()
        order = GlobalBatchSampler(dataset, BATCH * env.world_size, env.rank, env.world_size, 0, False, None)
        loader = Loader(dataset, order, 0, context.device, default_collate, partners=False)
        batches = chain.from_iterable(map(loader.epoch, count()))
        next(batches)
        first, speeds = time.perf_counter(), list[float]()
        for _ in range(2):
            dist.barrier()
            begun, loaded = time.perf_counter(), 0
            while (now := time.perf_counter()) < begun + seconds:
                loaded += len(next(batches).indices)
            speeds.append(loaded / (now - begun))
        dist.barrier()  # no rank has ended, which would change the PSS of the others
        smaps = Path("/proc/self/smaps_rollup").read_text()
        memory = [int(re.findall(rf"^{key}: +(\d+) kB", smaps, re.M)[0]) / 1024 for key in ("Anonymous", "Pss", "Rss")]
        columns = list(zip(*all_gather_object((first - opened, *speeds, *memory)), strict=True))
        if env.rank == 0:
            own, pss, rss = (f"{max(column):,.0f} MiB" for column in columns[3:])
            times = f"{opened - started:.3f} s | {1000 * max(columns[0]):,.1f} ms"
            times += f" | {sum(columns[1]):,.0f} | {sum(columns[2]):,.0f}"
            print(f"{times} | {own} | {pss} | {rss} | {sum(columns[4]):,.0f} MiB", flush=True)


def print_cached(images: int, ranks: Sequence[int], seconds: float) -> None:
    """Write a cache file and print a row for each number of ranks; then one without the file in memory."""
    with tempfile.TemporaryDirectory(prefix="size-") as directory:
        path = Path(directory) / "cache.images"
        write_cache(CacheFile(path, path, images, SHAPE))
        for place, number in (*(("in memory", number) for number in ranks), ("on disk", ranks[0])):
            if place == "on disk":
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cells = launch(number, __file__, "--cached", path, images, seconds).strip()
            print(f"| {format_count(images)} | {place} | {number} | {cells} |", flush=True)


def format_count(number: int) -> str:
    """Format 1,000,000,000 as 1 000 M."""
    return re.sub(r"(?<=\d)(?=(\d{3})+$)", " ", str(number // 10**6)) + " M" if number >= 10**6 else f"{number:,}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (all)")
    parser.add_argument("--no-large", action="store_true", help="omit the data sets of 10 M images")
    parser.add_argument("--smoke", action="store_true", help="small data sets, few steps, at most 2 ranks")
    parser.add_argument("--cached", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cached:
        path, images, seconds = arguments.cached
        cached(Path(path), int(images), float(seconds))
        return
    smoke = arguments.smoke
    sizes = [10**3, 10**4] if smoke else [60_000, 10**6, 10**7][: 2 if arguments.no_large else 3]
    all_ranks = (1, 2) if smoke else (1, 2, 4, 8)
    if "sampler" in arguments.only:
        print("The first batch of an epoch on one of 4,096 ranks, 64 images each:\n")
        print("| samples | sampler | time | memory |\n| ---: | --- | ---: | ---: |")
        for kind, samples in (("torch's", 10**6), ("torch's", 10**7), ("ours", 10**6), ("ours", 10**9)):
            cells = sampler("ours" if kind == "ours" else "torch", samples)
            name = "DistributedSampler" if kind == "torch's" else "GlobalBatchSampler"
            print(f"| {format_count(samples)} | {name} | {cells} |", flush=True)
    if "training" in arguments.only:
        print("\nTraining, global batch 256; memory at the end. The sum over ranks counts each page once (Pss):\n")
        print("| images | ranks | private to a rank | all ranks | images/s |\n| ---: | ---: | ---: | ---: | ---: |")
        steps = f"train.max_steps={4 if smoke else 400}"
        for ranks in all_ranks:
            print(f"| 60,000 | {ranks} | {training(ranks, steps, 'train.epochs=2')} |", flush=True)
        for images in sizes[1:]:
            settings = ("data.name=synthetic", f"data.synthetic_train={images}", "optim.lr=0.001", steps)
            print(f"| {format_count(images)} | 2 | {training(2, *settings)} |", flush=True)
    if "cache" in arguments.only:
        print("\nBatches of 256 from a cache file of 28×28 grey images; memory of the rank that has the most:\n")
        print("| images | file | ranks | opening | first batch | images/s, first | then | own | PSS | RSS | all PSS |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for images in sizes:
            print_cached(images, all_ranks, 0.2 if smoke else 5)


if __name__ == "__main__":
    main()
