"""Image files in color, with the random transforms of torchvision in ``__getitem__``."""

from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from distlenet import Datasets


def datasets(root: str, size: int = 28) -> Datasets:
    """Return the images of ``root``/train, val and test, a directory per class; augment the training images.

    distlenet seeds torch for each sample by (seed, epoch, index): an image is transformed in the same way on any
    number of ranks and workers, and after a restart.
    """
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.9, 1.1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
        ]
    )
    train, validation, test = (
        ImageFolder(str(Path(root, split)), transform)
        for split, transform in (("train", augment), ("val", None), ("test", None))
    )
    return Datasets(train, test, source=root, validation=validation, classes=train.classes)
