"""Write images of Fashion-MNIST as PNG files in color: ``python make_folder.py IMAGES``.

Each image is tinted by a color that depends only on its index, so that the color does not reveal the class.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distlenet import ImageClassification, load_config


def tint(grey: np.ndarray, key: str) -> np.ndarray:
    """Return a grey image (H, W) in shades of a color that is a hash of ``key``: uint8 (H, W, 3)."""
    color = 96 + np.frombuffer(hashlib.sha256(key.encode()).digest()[:3], np.uint8).astype(np.uint32) % 160
    return (grey[:, :, None] * color // 255).astype(np.uint8)


def write_split(directory: Path, images: Any, classes: Sequence[str], indices: range) -> None:
    """Write images to ``directory``/CLASS/INDEX.png."""
    for index in indices:
        image, label = images[index]
        path = directory / classes[label].replace("/", "-") / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tint(np.asarray(image), path.name)).save(path)


def read_split(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels, (n, values), and the class names of the images in ``directory``."""
    paths = sorted(directory.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path), np.float32).ravel() / 255 for path in paths])
    return pixels, np.array([path.parent.name for path in paths])


def baseline(root: Path) -> None:
    """Print the test accuracy of logistic regression on the pixels."""
    from sklearn.linear_model import LogisticRegression

    train, *others = (read_split(root / split) for split in ("train", "val", "test"))
    for strength in (0.03, 0.1, 0.3):
        model = LogisticRegression(C=strength, max_iter=300).fit(*train)
        accuracies = [model.score(*split) for split in others]
        print(f"C={strength}: validation accuracy {accuracies[0]:.4f}, test accuracy {accuracies[1]:.4f}", flush=True)


def main() -> None:
    """Write the three splits, and with --baseline compare with logistic regression."""
    parser = argparse.ArgumentParser(description="Write images of Fashion-MNIST as PNG files in color.")
    parser.add_argument("images", type=Path, help="directory to write")
    parser.add_argument("--source", default="data", help="directory of Fashion-MNIST, see docs/data.md")
    parser.add_argument("--train", type=int, default=10_000, help="training images (10,000)")
    parser.add_argument("--validation", type=int, default=2_000, help="validation images (2,000)")
    parser.add_argument("--test", type=int, default=5_000, help="test images (5,000)")
    parser.add_argument("--baseline", action="store_true", help="fit scikit-learn's logistic regression to the images")
    arguments = parser.parse_args()
    data = ImageClassification(load_config([], ["data.name=fashion_mnist", f"data.root={arguments.source}"])).datasets()
    classes = data.classes or ()
    validation = range(arguments.train, arguments.train + arguments.validation)
    write_split(arguments.images / "train", data.train, classes, range(arguments.train))
    write_split(arguments.images / "val", data.train, classes, validation)
    write_split(arguments.images / "test", data.test, classes, range(arguments.test))
    if arguments.baseline:
        baseline(arguments.images)


if __name__ == "__main__":
    main()
