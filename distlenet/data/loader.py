"""Batches for one rank, on its device: a sampler says which samples, one gather fetches them."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distlenet.data.sources import ImageData, ImageDataset
from distlenet.distributed.preemption import block_signals, worker_init_fn
from distlenet.utils.errors import UserError

Batch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 (n, H, W), labels int64 (n,), and the samples' indices int64 (n,)."""

SHARE_OF_GPU = 0.25
"""How much of a GPU's free memory a data set may take to stay there (``data.device=auto``)."""


class BatchedDataset(Dataset[Batch]):
    """A data set whose item is a whole batch: it is asked with a tensor of indices, not with one index."""

    def __init__(self, split: ImageDataset) -> None:
        """Serve the samples of ``split``."""
        self.split = split

    def __getitem__(self, indices: Tensor) -> Batch:
        """Fetch the samples at ``indices``, int64 (n,), from where the set lies; n may be 0."""
        images, labels = self.split.images, self.split.labels
        if images.is_cuda:
            indices = indices.pin_memory().to(images.device, non_blocking=True)
        return images.index_select(0, indices), labels.index_select(0, indices).long(), indices


class Loader:
    """A DataLoader whose batches come on the rank's device, and whose workers no signal to stop ends."""

    def __init__(self, split: ImageDataset, sampler: Iterable[Tensor], workers: int, device: torch.device) -> None:
        """Load what ``sampler`` names, a tensor of indices at a time.

        ``batch_size=None`` turns the DataLoader's own batching off: the sampler's tensors arrive at the data
        set whole (https://docs.pytorch.org/docs/stable/data.html#disable-automatic-batching).
        """
        self.device = device
        self.copies = device.type == "cuda" and not split.images.is_cuda
        self.loader = DataLoader(
            BatchedDataset(split),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.copies,
            worker_init_fn=worker_init_fn,
            generator=torch.Generator(),  # the loader draws a seed per epoch: not from the global generator
        )

    def __iter__(self) -> Iterator[Batch]:
        """Begin an epoch; the first one starts the workers."""
        with block_signals():
            batches = iter(self.loader)
        return ahead(batches, self.device) if self.copies else batches


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to a GPU while the one before it is computed, on a stream of its own.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
    """
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    under_way: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for images, labels, indices in batches:
        with torch.cuda.stream(copying):
            images, labels, indices = (part.to(device, non_blocking=True) for part in (images, labels, indices))
            under_way.append(((images, labels, indices), copying.record_event()))
        if len(under_way) == 2:
            yield _arrived(*under_way.popleft(), computing)
    while under_way:
        yield _arrived(*under_way.popleft(), computing)


def _arrived(batch: Batch, event: torch.cuda.Event, stream: torch.cuda.Stream) -> Batch:
    """Have ``stream`` wait for a batch, and its memory not be used again before ``stream`` is done with it."""
    stream.wait_event(event)
    for part in batch:
        part.record_stream(stream)
    return batch


def place_dataset(data: ImageData, wanted: str, workers: int, device: torch.device) -> ImageData:
    """Put a data set where batches are gathered from: on the GPU, where one is used and it fits, or left as it is.

    ``wanted`` is auto, cpu or cuda. Raises UserError for cuda where that cannot be.
    """
    if wanted == "cuda" and (device.type != "cuda" or workers):
        reason = (
            f"data.num_workers={workers}: they have no GPU; give data.num_workers=0"
            if workers
            else "this rank has no GPU"
        )
        raise UserError(f"data.device=cuda: {reason}, or give data.device=auto")
    if wanted == "cpu" or device.type == "cpu" or workers:
        return data
    needed, free = data.nbytes, torch.cuda.mem_get_info(device)[0]
    if needed <= free * SHARE_OF_GPU or (wanted == "cuda" and needed <= free):
        return data.to(device)
    if wanted == "cuda":
        raise UserError(f"data.device=cuda: the images take {needed:,} bytes of {free:,} free; give data.device=auto")
    return data
