"""Dynamic batching: requests that arrive while a batch is computed form the next batch."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from distlenet.serve.messages import HttpError, overloaded
from distlenet.serve.served_model import Arrays, CannotCompute, ServedModel

Outputs = dict[str, np.ndarray]
Key = tuple[ServedModel, tuple[tuple[int, ...], ...]]
"""Samples of one shape, for one version, can be computed together."""


@dataclass(frozen=True)
class Job:
    """Samples of one request, at most a batch."""

    inputs: Arrays
    rows: int
    answer: "asyncio.Future[Outputs]"


class Batcher:
    """Computes predictions in one thread. All other methods belong to the event loop."""

    def __init__(self, max_batch: int, max_wait_s: float, max_queue: int, observe: Callable[[int], object]) -> None:
        """``observe`` receives the number of samples of each batch."""
        self.max_batch, self.max_wait_s, self.max_queue, self.observe = max_batch, max_wait_s, max_queue, observe
        self.queues: dict[Key, deque[Job]] = {}  # the first one is next
        self.queued = 0  # samples
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()

    async def predict(self, model: ServedModel, inputs: Arrays) -> Outputs:
        """Return the outputs of all samples. Raise HttpError if the queue is full, or if they cannot be computed.

        A request with more samples than a batch is computed one batch after the other, so that others have their turn.
        """
        if self.queued >= self.max_queue:
            raise overloaded(f"{self.queued} samples are waiting; send this request again later")
        rows = len(next(iter(inputs.values())))
        if rows <= self.max_batch:
            return await self._add(model, inputs, rows)
        parts = []
        for start in range(0, rows, self.max_batch):
            part = {name: array[start : start + self.max_batch] for name, array in inputs.items()}
            parts.append(await self._add(model, part, min(self.max_batch, rows - start)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _add(self, model: ServedModel, inputs: Arrays, rows: int) -> "asyncio.Future[Outputs]":
        answer: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        key = (model, tuple(array.shape[1:] for array in inputs.values()))
        self.queues.setdefault(key, deque()).append(Job(inputs, rows, answer))
        self.queued += rows
        self._arrived.set()
        if self.queued >= self.max_batch:
            self._full.set()
        return answer

    async def run(self) -> None:
        """Compute batches until the task is cancelled."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, "inference")  # nothing waits for a batch at the end
        while True:
            if not self.queued:
                await self._arrived.wait()
                await self._wait_for_others()
            model, jobs = self._take()
            self.observe(sum(job.rows for job in jobs))
            results = await loop.run_in_executor(thread, compute, model, jobs)
            for job, result in zip(jobs, results, strict=True):
                if job.answer.done():  # cancelled
                    continue
                if isinstance(result, CannotCompute):
                    job.answer.set_exception(HttpError(400, f"the network cannot compute these inputs: {result}"))
                else:
                    job.answer.set_result(result)

    async def _wait_for_others(self) -> None:
        if self.max_wait_s > 0 and self.queued < self.max_batch:
            self._full.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.max_wait_s):
                    await self._full.wait()

    def _take(self) -> tuple[ServedModel, list[Job]]:
        """Remove the jobs of the next batch from the queue."""
        key, queue = next(iter(self.queues.items()))
        del self.queues[key]
        jobs = [queue.popleft()]
        rows = jobs[0].rows
        while queue and rows + queue[0].rows <= self.max_batch:
            jobs.append(queue.popleft())
            rows += jobs[-1].rows
        if queue:
            self.queues[key] = queue  # as the last one: other shapes have their turn
        self.queued -= rows
        if not self.queued:
            self._arrived.clear()
        return key[0], jobs


def compute(model: ServedModel, jobs: Sequence[Job]) -> list[Outputs | CannotCompute]:
    """Return the outputs of each job; if the batch fails, each job is computed alone, so that only bad ones fail."""
    if len(jobs) == 1:
        try:
            return [model.run(jobs[0].inputs)]
        except CannotCompute as error:
            return [error]
    inputs = {name: np.concatenate([job.inputs[name] for job in jobs]) for name in jobs[0].inputs}
    try:
        outputs = model.run(inputs)
    except CannotCompute:
        return [result for job in jobs for result in compute(model, [job])]
    results: list[Outputs | CannotCompute] = []
    start = 0
    for job in jobs:
        results.append({name: array[start : start + job.rows] for name, array in outputs.items()})
        start += job.rows
    return results
