"""What a rank is fed: its share of each global batch of the training set, and of the test set."""

from distlenet.data.augment import Prepare, measure
from distlenet.data.loader import Batch, Loader, settle_data
from distlenet.data.sampler import GlobalBatchSampler, ShardSampler
from distlenet.data.sources import ImageData
from distlenet.distributed import all_or_none
from distlenet.metrics import EVAL_BATCH
from distlenet.schema import Config
from distlenet.session import Session
from distlenet.tracking import Record


class Feed:
    """Both sets of images, which of them come when, and how they become the network's inputs."""

    def __init__(self, config: Config, session: Session, data: ImageData) -> None:
        """Put ``data`` where ``data.device`` says. A collective. Raises UserError where it does not fit there."""
        world, self.device = session.world, session.device
        self.prepare = Prepare(*measure(data.train.images), config.data.augment, config.seed, config.data.shift)
        self.sampler = GlobalBatchSampler(
            data.train,
            config.train.global_batch_size,
            world.rank,
            world.world_size,
            config.seed,
            config.data.drop_last,
            config.distributed.virtual_shards if config.distributed.reduction == "exact" else None,
        )
        with all_or_none():  # a GPU may be fuller than the others
            self.data = settle_data(data, config.data.device, config.data.workers, self.device)
        self.train = Loader(self.data.train, self.sampler, config.data.workers, self.device)
        shard = ShardSampler(len(data.test), EVAL_BATCH, world.rank, world.world_size)
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
