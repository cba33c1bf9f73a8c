"""Images that are kept on a GPU, and batches that are copied to it."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distlenet.data.batched_dataset import Fetched, TransformedDataset
from distlenet.data.sources import ImageDataset
from distlenet.task import Data, Datasets, Task
from distlenet.utils.errors import UserError
from distlenet.utils.nested import map_tensors, tensors_in

GPU_SHARE = 0.25  # of a GPU's free memory, which a dataset may take to be kept there with data.device=auto

MAX_TRANSFORMED = 2**30  # bytes of datasets transformed once: with large samples, a step gains less than 1 %
TRANSFORMED_TOGETHER = 2**26  # bytes


def prefetch_to_device(batches: Iterator[Fetched], device: torch.device) -> Iterator[Fetched]:
    """Copy each batch to a GPU while the previous one is computed, on a separate stream.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
    """
    copy_stream, compute_stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    in_flight: deque[tuple[Fetched, torch.cuda.Event]] = deque()

    def wait(fetched: Fetched, copied: torch.cuda.Event) -> Fetched:
        compute_stream.wait_event(copied)
        for tensor in tensors_in((fetched.data, fetched.on_device)):
            tensor.record_stream(compute_stream)  # its memory is not reused before that stream is done with it
        return fetched

    for batch in batches:
        with torch.cuda.stream(copy_stream):
            source = batch.data, batch.indices
            data, on_device = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), source)
            in_flight.append((Fetched(data, batch.indices, on_device), copy_stream.record_event()))
        if len(in_flight) == 2:
            yield wait(*in_flight.popleft())
    while in_flight:
        yield wait(*in_flight.popleft())


def place_datasets(datasets: Datasets, wanted: str, num_workers: int, device: torch.device) -> Datasets:
    """Return ``datasets`` with their images on the GPU, if one is used and they fit, else unchanged.

    ``wanted`` is auto, cpu or cuda. Raise UserError if it is cuda and the images cannot be there.
    """
    if wanted == "cuda" and num_workers:
        raise UserError(f"data.device=cuda: data.num_workers={num_workers}: they have no GPU; give data.num_workers=0")
    if wanted == "cuda" and device.type != "cuda":
        raise UserError("data.device=cuda: this rank has no GPU; give data.device=auto")
    if wanted == "cpu" or device.type == "cpu" or num_workers:
        return datasets
    splits = {split: getattr(datasets, split) for split in ("train", "validation", "test")}
    images = {split: dataset for split, dataset in splits.items() if isinstance(dataset, ImageDataset)}
    if len(images) < len([dataset for dataset in splits.values() if dataset is not None]):
        if wanted == "cuda":
            raise UserError("data.device=cuda: these data sets are not images in memory; give data.device=auto")
        return datasets
    needed, free = sum(dataset.nbytes for dataset in images.values()), torch.cuda.mem_get_info(device)[0]
    if needed <= free * (1 if wanted == "cuda" else GPU_SHARE):
        placed: dict[str, Any] = {split: dataset.to(device) for split, dataset in images.items()}
        return replace(datasets, **placed)
    if wanted == "cuda":
        raise UserError(f"data.device=cuda: the images take {needed:,} bytes of {free:,} free; give data.device=auto")
    return datasets


@torch.no_grad()
def transform_once(datasets: Datasets, task: Task) -> Datasets:
    """Return ``datasets`` with those on the GPU transformed, if ``Task.transform`` is not random and if they are small.

    Then a step does not have to launch the kernels of the transform, which takes longer than they do.
    """
    placed = {
        split: dataset
        for split in ("train", "validation", "test")
        if isinstance(dataset := getattr(datasets, split), ImageDataset) and dataset.device.type == "cuda"
    }
    if task.random_transform or task.partners or not placed:
        return datasets
    device = next(iter(placed.values())).device
    example = task.transform(
        next(iter(placed.values())).get_batch(torch.zeros(1, dtype=torch.int64, device=device)), None
    )
    sample_bytes = sum(tensor.nbytes for tensor in tensors_in(example))
    limit = min(MAX_TRANSFORMED, torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    if sum(map(len, placed.values())) * sample_bytes > limit:
        return datasets
    transformed: dict[str, Any] = {split: _transform(dataset, task, example) for split, dataset in placed.items()}
    return replace(datasets, **transformed)


def _transform(dataset: ImageDataset, task: Task, example: Data) -> TransformedDataset:
    """Transform all samples, in parts: what is computed in between takes a multiple of their memory."""
    data = map_tensors(lambda tensor: tensor.new_empty(len(dataset), *tensor.shape[1:]), example)
    together = max(1, TRANSFORMED_TOGETHER // sum(tensor.nbytes for tensor in tensors_in(example)))
    for indices in torch.arange(len(dataset), device=dataset.device).split(together):
        part = task.transform(dataset.get_batch(indices), None)
        for target, source in zip(tensors_in(data), tensors_in(part), strict=True):
            target.index_copy_(0, indices, source)
    return TransformedDataset(data)
