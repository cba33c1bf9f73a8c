"""What a rank is fed: its share of each global batch of the training set, and of the test set."""

from distlenet.config.schema import Config
from distlenet.data.loader import Batch, Loader, place_dataset
from distlenet.data.sampler import GlobalBatchSampler, ShardSampler
from distlenet.data.sources import ImageData
from distlenet.data.transforms import Prepare, measure
from distlenet.distributed.collectives import raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.tracking.base import Record
from distlenet.training.evaluation import EVAL_BATCH


class Feed:
    """Both sets of images, which of them come when, and how they become the network's inputs."""

    def __init__(self, config: Config, context: DistributedContext, data: ImageData) -> None:
        """Put ``data`` where ``data.device`` says. A collective. Raises UserError where it does not fit there."""
        env, self.device = context.env, context.device
        self.prepare = Prepare(*measure(data.train.images), config.data.augment, config.seed, config.data.shift)
        self.sampler = GlobalBatchSampler(
            data.train,
            config.train.global_batch_size,
            env.rank,
            env.world_size,
            config.seed,
            config.data.drop_last,
            config.distributed.virtual_shards if config.distributed.reduction == "exact" else None,
        )
        with raise_on_all_ranks():  # a GPU may be fuller than the others
            self.data = place_dataset(data, config.data.device, config.data.num_workers, self.device)
        self.train = Loader(self.data.train, self.sampler, config.data.num_workers, self.device)
        shard = ShardSampler(len(data.test), EVAL_BATCH, env.rank, env.world_size)
        self.test = Loader(self.data.test, shard, 0, self.device)
        self.test_count = len(data.test)
        self.no_images = self.data.train.images[:0].to(self.device)

    def again(self, epoch: int, place: int) -> Batch:
        """Load this rank's share of global batch ``place`` of an epoch once more."""
        self.sampler.set_position(epoch, place, most=1)
        (batch,) = Loader(self.data.train, self.sampler, 0, self.device)
        return batch

    def describe(self) -> Record:
        """Return what a tracker tells of it."""
        return {
            "train_count": self.sampler.samples,
            "data_source": self.data.source,
            "steps_per_epoch": self.sampler.steps,
        }
