"""The cache of a user's datasets that declare ``deterministic = True``: a sample is the same at each read."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.cache_build import Workers, build_cache, is_built
from distlenet.data.cache_file import CacheFile
from distlenet.data.sources.image_cache import cache_paths, is_usable
from distlenet.data.sources.joined import Joined
from distlenet.data.sources.labels import digest_of
from distlenet.data.sources.opened import StoredImages
from distlenet.distributed.collectives import (
    all_gather_object,
    broadcast_from_local_rank_0,
    has_process_group,
    raise_on_all_ranks,
)
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.watchdog import restart_time_limit
from distlenet.task import MapDataset
from distlenet.utils.errors import UserError, warn
from distlenet.utils.mapped_file import TensorRef, open_shared

DIGEST_SAMPLES = 64  # of each split, evenly spaced
REPEATED_SAMPLES = 8  # of the training set, read again: a random transform is found


class Samples(MapDataset, Protocol):
    """Samples (image, label) of one shape; messages call them by the ``name`` of the split."""

    @property
    def name(self) -> str:
        """How messages call the split."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label."""


@dataclass(frozen=True)
class JoinedSamples(Joined[Samples]):
    """The samples of all splits; ``identity`` is another text if they have changed."""

    identity: str
    thread_safe = False  # elsewhere, a process reads a dataset in one thread

    def name(self, index: int) -> str:
        """Return how messages call a sample."""
        split, own_index = self.locate(index)
        return f"{split.name}, sample {own_index}"

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return what identifies the samples."""
        return [f"{index} {self.identity}" for index in range(start, stop)]


def cache_samples(
    splits: Mapping[str, Samples],
    fingerprint: Mapping[str, str] | None,
    config: DataConfig,
    env: DistributedEnvironment,
) -> Mapping[str, Any]:
    """Return ``splits`` with their samples in a mapped file. A collective, if there is a group.

    They are identified by ``fingerprint`` and some samples. Raise UserError if ``data.cache`` is a directory that
    cannot hold them.
    """
    distributed = has_process_group()
    exchange: Callable[[Any], list[Any]] = all_gather_object if distributed else lambda value: [value]
    together = raise_on_all_ranks if distributed else nullcontext
    workers = Workers(env.local_rank, env.local_world_size, env.node_rank, env.rank == 0, exchange)

    def of_node(value: Any) -> Any:
        """Return the value of the first rank of this node. A collective."""
        return broadcast_from_local_rank_0(value, env) if distributed else value

    with ExitStack() as stack:
        plan: tuple[str, CacheFile | None, bool] | None = None
        with together():
            if env.local_rank == 0:
                plan = _plan(splits, fingerprint, config)
        identity, file, wanted = of_node(plan)
        problem = ""
        if any(exchange(wanted)):
            dataset = JoinedSamples(list(splits.values()), identity) if wanted else None
            problem = build_cache(file if wanted else None, dataset, workers, keep=config.cache != "auto")
        stored: dict[str, StoredImages] = {}
        with together():
            if env.local_rank == 0 and file is not None and is_usable(file, problem, config):
                stored = _open(file, splits, stack)
        stored = of_node(stored)
        with together():  # no rank closes the file before all have mapped it
            try:
                return {**splits, **{name: images.map() for name, images in stored.items()}}
            except OSError as error:
                warn(f"rank {env.rank}: cannot map the cached images ({error}) and decodes them")
                return splits


def _plan(
    splits: Mapping[str, Samples], fingerprint: Mapping[str, str] | None, config: DataConfig
) -> tuple[str, CacheFile | None, bool]:
    """Return what identifies the samples, the file for them if one is used, and whether they have to be decoded.

    Raise UserError if samples differ between two reads.
    """
    _check_deterministic(splits["train"])
    shape = tuple(splits["train"][0][0].shape)
    lengths = {name: len(split) for name, split in splits.items()}
    digests = {name: _digest(split) for name, split in splits.items()}
    contents = [lengths, digests, dict(fingerprint or {})]
    settings = [config.args, shape, str(torch.__version__)]  # the dataset may decode or transform with torch
    path, part = cache_paths(config, config.name.replace(":", "-"), settings, contents)
    file = CacheFile(path, part, sum(lengths.values()), shape, labels=True)
    wanted = not is_built(file)
    return path.name, None if wanted and not config.build_cache else file, wanted and config.build_cache


def _check_deterministic(split: Samples) -> None:
    for row in _rows(split)[:REPEATED_SAMPLES]:
        (image, label), (image_again, label_again) = split[row], split[row]
        if label != label_again or not torch.equal(image, image_again):
            raise UserError(
                f"{split.name}, sample {row}: differs at each read, but the dataset declares deterministic = True; "
                "remove that line, or the random transform"
            )


def _digest(split: Samples) -> str:
    """Return a digest of evenly spaced samples."""
    samples = []
    for row in _rows(split):
        samples.append(split[row])
        restart_time_limit()
    return digest_of(*(image for image, _ in samples), torch.tensor([label for _, label in samples]))


def _rows(split: Samples) -> list[int]:
    """Return the numbers of the samples that identify a split."""
    if not len(split):
        return []
    return sorted({number * (len(split) - 1) // (DIGEST_SAMPLES - 1) for number in range(DIGEST_SAMPLES)})


def _open(file: CacheFile, splits: Mapping[str, Samples], stack: ExitStack) -> dict[str, StoredImages]:
    """Return the images and labels of the complete file."""
    shared = stack.enter_context(closing(open_shared(file.path)))
    first, stored = 0, {}
    for name, split in splits.items():
        images = TensorRef(shared.ref, first * file.image_bytes, (len(split), *file.shape), torch.uint8)
        labels = TensorRef(shared.ref, file.labels_start + 8 * first, (len(split),), torch.int64)
        stored[name] = StoredImages(images, labels, sampled=True)  # the statistics are those without the cache
        first += len(split)
    return stored
