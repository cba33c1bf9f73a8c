"""A directory of JPEG images: loading and training, compared with ImageFolder and DataLoader.

``python benchmarks/images.py [--images 20000] [--train-images 2000] [--rounds 5] [--directory DIRECTORY]``. Writes
color images of about 100 KB into DIRECTORY, or into a temporary one, unless they are there. Both contestants run on the
same ranks, with one thread each, and return normalised batches of 64×64 pixels: torchvision's ``ImageFolder`` with
``Resize``, ``ToTensor`` and ``Normalize`` in two ``DataLoader`` workers per rank; ``data.name=folder`` with an empty
cache, then again with the cache of the first job. Training is ResNet-18 with DistributedDataParallel, on the first
``--train-images`` images. In each round, every contestant runs once, in alternating order; ratios are computed within a
round. A first epoch contains the opening of the data set and, with distlenet, the writing of the cache. Prints
Markdown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any

CLASSES, SIZE, BATCH = 10, 64, 32  # images of a rank's batch
TEST_IMAGES = 64
EPOCHS = 2
Seconds = dict[str, list[float]]
"""The duration of each epoch, by contestant."""


def write_image(words: tuple[Path, int]) -> None:
    """Write a smooth color image with noise, 500×375 pixels and about 100 KB."""
    import numpy as np
    from PIL import Image

    path, seed = words
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(smooth).astype(np.int16) + rng.integers(-34, 35, (375, 500, 3), dtype=np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=88)


def write_images(root: Path, images: int) -> float:
    """Write the training and test images, and return the mean size of a file in KB."""
    files = [(root / f"train/c{number % CLASSES}/{number:06d}.jpg", number) for number in range(images)]
    files += [
        (root / f"test/c{number % CLASSES}/{number:06d}.jpg", -1 - number + 2**32) for number in range(TEST_IMAGES)
    ]
    with Pool(os.cpu_count()) as pool:
        pool.map(write_image, files, chunksize=50)
    return statistics.mean(path.stat().st_size for path, _ in files) / 1000


def link_subset(root: Path, subset: Path, images: int) -> None:
    """Link the test images and the first training images into another directory."""
    for path in [*root.glob("test/*/*"), *(root / f"train/c{n % CLASSES}/{n:06d}.jpg" for n in range(images))]:
        target = subset / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)


def plain(root: Path, train: bool) -> list[float]:
    """Return the seconds of each epoch of ImageFolder and DataLoader on this rank."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.models import resnet18

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(resnet18(num_classes=CLASSES).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dist.barrier()
    seconds, started = [], time.perf_counter()
    normalize = transforms.Normalize((0.5,) * 3, (0.25,) * 3)
    dataset = ImageFolder(
        str(root / "train"), transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), normalize])
    )
    sampler: DistributedSampler[Any] = DistributedSampler(dataset)
    loader: DataLoader[Any] = DataLoader(dataset, BATCH, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            if train:
                optimizer.zero_grad()
                cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
                optimizer.step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    dist.destroy_process_group()
    return seconds


def settings(root: Path, cache: Path, ranks: int) -> list[str]:
    """Return the settings of distlenet."""
    model = ("model.name=torchvision.models:resnet18", f"model.args.num_classes={CLASSES}", "optim.lr=0.01")
    data = ("data.name=folder", f"data.root={root}", f"data.size={SIZE}", f"data.cache={cache}")
    return [*model, *data, f"train.global_batch_size={BATCH * ranks}", f"train.epochs={EPOCHS}", "device=cpu"]


def ours_loading(words: Sequence[str]) -> list[float]:
    """Return the seconds of each epoch of distlenet's loader and transform on this rank."""
    import torch.distributed as dist

    from distlenet import ImageClassification, load_config
    from distlenet.data.loader import make_loaders
    from distlenet.distributed.context import init_distributed

    config = load_config([], list(words))
    with init_distributed(config) as context:
        dist.barrier()
        seconds, started = [], time.perf_counter()
        task = ImageClassification(config)
        loader, _ = make_loaders(config, context, task.datasets(), task)
        for epoch in range(EPOCHS):
            for batch in loader.epoch(epoch):
                task.transform(batch.data, batch.keys)
            dist.barrier()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return seconds


def ours_training(words: Sequence[str]) -> list[float]:
    """Return the seconds of each epoch of distlenet's training on this rank, without the evaluations."""
    from distlenet import ImageClassification, load_config
    from distlenet.train import train
    from distlenet.training.trainer import Trainer

    first, last = [0.0] * EPOCHS, [0.0] * EPOCHS
    opening = [0.0]

    class TimedTask(ImageClassification):
        def datasets(self) -> Any:
            started = time.perf_counter()
            result = super().datasets()
            opening[0] += time.perf_counter() - started
            return result

    class TimedTrainer(Trainer):
        def step(self, batch: Any) -> Any:
            first[batch.epoch] = first[batch.epoch] or time.perf_counter()
            result = super().step(batch)
            last[batch.epoch] = time.perf_counter()
            return result

    train(load_config([], list(words)), TimedTask, TimedTrainer)
    seconds = [end - start for start, end in zip(first, last, strict=True)]
    return [opening[0] + seconds[0], *seconds[1:]]


def run(ranks: int, *words: object) -> list[float]:
    """Run this program as a contestant on all ranks, and return the seconds of rank 0."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [*launcher, __file__, *map(str, words)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}")
    seconds: list[float] = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("[")))
    return seconds


def one_round(kind: str, root: Path, ranks: int, plain_first: bool) -> Seconds:
    """Run every contestant once, the second job after the first."""
    result: Seconds = {}
    with tempfile.TemporaryDirectory(dir=root.parent) as directory:
        cache = Path(directory) / "cache"

        def measure_ours() -> None:
            for name in ("distlenet", "distlenet, second job"):
                more = [f"run.dir={directory}", f"run.name={name[-3:]}"]
                result[name] = run(ranks, f"ours-{kind}", *settings(root, cache, ranks), *more)

        if not plain_first:
            measure_ours()
        result["ImageFolder"] = run(ranks, f"plain-{kind}", root)
        if plain_first:
            measure_ours()
    return result


def table(rounds: Sequence[Seconds], images: int) -> list[str]:
    """Return the lines of a table: images per second, and their ratios to ImageFolder in the same round."""
    lines = ["| | first epoch | speed compared with ImageFolder | second epoch | speed compared with ImageFolder |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name in ("ImageFolder", "distlenet", "distlenet, second job"):
        cells = [name]
        for epoch in range(EPOCHS):
            speeds = [images / each[name][epoch] for each in rounds]
            ratios = [each["ImageFolder"][epoch] / each[name][epoch] for each in rounds]
            cells.append(f"{statistics.median(speeds):,.0f} images/s ({min(speeds):,.0f} to {max(speeds):,.0f})")
            cells.append(f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Write the images, measure all contestants, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("images", 20000, "training images for loading"),
        ("train-images", 2000, "training images for training; 0: no training"),
        ("rounds", 5, "runs of each contestant"),
        ("ranks", 2, "ranks"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--directory", type=Path, help="where the images are written and kept (a temporary directory)")
    arguments = parser.parse_args()
    ranks = arguments.ranks
    with tempfile.TemporaryDirectory(dir=arguments.directory and arguments.directory.parent) as temporary:
        root = (arguments.directory or Path(temporary) / "images").resolve()
        kilobytes = write_images(root, arguments.images)
        subset = Path(temporary) / "subset"
        link_subset(root, subset, min(arguments.train_images, arguments.images))
        print(f"{ranks} ranks, {kilobytes:.0f} KB per image, {SIZE}×{SIZE} pixels, batches of {BATCH} per rank.")
        for kind, directory, images in (
            ("loading", root, arguments.images),
            ("training", subset, min(arguments.train_images, arguments.images)),
        ):
            if images:
                rounds = [one_round(kind, directory, ranks, number % 2 == 0) for number in range(arguments.rounds)]
                print(f"\n{kind.capitalize()}, {images:,} images:\n", *table(rounds, images), sep="\n", flush=True)
        shutil.rmtree(subset, ignore_errors=True)


def contestant(words: Sequence[str]) -> None:
    """Run one contestant as a rank, and print its seconds on rank 0."""
    who, kind = words[0].split("-")
    if who == "plain":
        seconds = plain(Path(words[1]), kind == "training")
    else:
        seconds = ours_training(words[1:]) if kind == "training" else ours_loading(words[1:])
    if os.environ["RANK"] == "0":
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ and len(sys.argv) > 1 and sys.argv[1].startswith(("plain-", "ours-")):
        contestant(sys.argv[1:])
    else:
        main()
