"""Loss and accuracy over samples: summed on the device, added over ranks when they are read."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet.data.loader import Batch
from distlenet.training.error_analysis import Details
from distlenet.training.meter import Meter, Metrics

EVAL_BATCH = 250
"""Images that are evaluated together; fixed, so that results do not depend on the number of ranks."""


@torch.no_grad()
def evaluate(
    net: nn.Module,
    loader: Iterable[Batch],
    prepare: Callable[[Tensor], Tensor],
    autocast: torch.autocast,
    device: torch.device,
    expected: int,
    each: Callable[[int], bool] | None = None,
    details: Details | None = None,
) -> Metrics | None:
    """Measure ``net`` over a set of ``expected`` images, of which each rank's loader gives its shard.

    ``net`` is the bare module, not its DDP wrapper: ranks may have different numbers of batches. ``each`` is asked
    before each batch k that every rank has; where it says true, on every rank, there is no result: None.
    ``details`` takes what there is beyond the metrics. A collective, then a host sync. Raises RuntimeError where the
    shards are not the set, once each.
    """
    net.eval()
    meter = Meter(device)
    every_rank_has = -(-expected // EVAL_BATCH) // dist.get_world_size()
    for k, (images, labels, indices) in enumerate(loader):
        if each is not None and k < every_rank_has and each(k):
            net.train()
            return None
        with autocast:
            logits = net(prepare(images))
            loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
        meter.update(loss_sum.view(1), logits, labels)
        if details is not None:
            details.update(logits, labels, indices)
    net.train()
    metrics = meter.total()
    if metrics.count != expected:
        raise RuntimeError(f"evaluation counted {metrics.count} images of a set of {expected}")
    return metrics
