"""``python -m distlenet.predict checkpoint=RUN IMAGE...``: classify image files."""

from distlenet.utils.startup import exit_on_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c()  # before the imports that take seconds

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distlenet.config.fields import FIELDS, split_mapping_key
from distlenet.distributed.entry_point import run_entry
from distlenet.images.image_files import read_images
from distlenet.inference.predictor import Predictor
from distlenet.report.optional import require_report_packages
from distlenet.utils.errors import UserError, printable
from distlenet.utils.parser import Parser, positive_int

Prediction = list[dict[str, Any]]
"""The most probable classes of one image, in descending order."""


def main() -> None:
    """Predict, then raise UserError if an image could not be read."""
    arguments = make_parser().parse_intermixed_args()
    checkpoints = [text for text in arguments.inputs if text.startswith("checkpoint=")]
    overrides = [text for text in arguments.inputs if split_mapping_key(text.partition("=")[0])[0] in FIELDS]
    names = [text for text in arguments.inputs if text not in (*checkpoints, *overrides)]
    if len(checkpoints) != 1 or not names:
        raise UserError("expected checkpoint=RUN_OR_FILE once, and images, directories or patterns; see --help")
    if arguments.save:
        require_report_packages()
        if arguments.save.suffix.lower() != ".png" or not arguments.save.parent.is_dir():
            raise UserError(f"--save {arguments.save}: expected a name that ends in .png, in an existing directory")
    predictor = Predictor(checkpoints[0].partition("=")[2], overrides, arguments.config)
    if arguments.top > len(predictor.classes):
        raise UserError(f"--top {arguments.top}: expected an integer from 1 to {len(predictor.classes)}")
    arrays, paths, failures = read_images(names, arguments.invert, predictor.images)
    if arrays:
        images = torch.from_numpy(np.stack(arrays))
        probabilities = predictor(images)
        predictions = [top_classes(row, predictor.classes, arguments.top) for row in probabilities]
        if arguments.json:
            for path, prediction in zip(paths, predictions, strict=True):
                print(json.dumps({"image": str(path), "top": prediction}))
        else:
            print_table(paths, predictions)
        if arguments.save:
            save_figure(arguments.save, images, paths, predictions)
    if failures:
        raise UserError("; ".join(failures))


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        "python -m distlenet.predict",
        usage="%(prog)s checkpoint=RUN_OR_FILE [--config FILE]... [key=value]... IMAGE_OR_DIRECTORY... [--top K] "
        "[--invert ...] [--json] [--save FILE]",
        description="Classify images of any size, grey or color, light or dark.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs",
        metavar="checkpoint=RUN IMAGE",
        nargs="+",
        help="a run or checkpoint file; images, directories; settings",
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML file that names your task and network"
    )
    parser.add_argument("--top", metavar="K", type=positive_int, default=3, help="classes to show per image (3)")
    parser.add_argument(
        "--invert",
        choices=("auto", "yes", "no"),
        default="auto",
        help="invert light and dark; auto: if the border is light, because the training images have dark borders",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--save", metavar="FILE.png", type=Path, help="write a figure of all images with predictions")
    return parser


def top_classes(probabilities: Tensor, classes: Sequence[str], count: int) -> Prediction:
    """Return the ``count`` most probable classes of one image."""
    top = zip(*(tensor.tolist() for tensor in probabilities.topk(count)), strict=True)
    return [{"class": classes[label], "label": label, "probability": value} for value, label in top]


def print_table(paths: list[Path], predictions: list[Prediction]) -> None:
    """Print one line per image, in aligned columns."""
    rows = [
        [printable(str(path)), *(f"{top['class']} {top['probability']:.1%}" for top in prediction)]
        for path, prediction in zip(paths, predictions, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def save_figure(file: Path, images: Tensor, paths: list[Path], predictions: list[Prediction]) -> None:
    """Write a figure of the network's inputs with their predictions. Raise UserError if it cannot be written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    with mpl.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(1.9 * columns, 2.3 * rows))
        panels = figure.subplots(rows, columns, squeeze=False)
        for panel in panels.flat:
            panel.axis("off")
        for panel, image, path, prediction in zip(panels.flat, images, paths, predictions, strict=False):
            top = prediction[0]
            panel.imshow(image.movedim(0, -1) if image.dim() == 3 else image, cmap="gray", vmin=0, vmax=255)
            panel.set_title(f"{printable(path.name)[:24]}\n{top['class']} {top['probability']:.0%}", fontsize=8)
        try:
            figure.savefig(file, dpi=110, bbox_inches="tight")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--save {file}: cannot be written: {reason}; give another file") from error
    print(f"Figure: {file}", file=sys.stderr)


if __name__ == "__main__":
    run_entry(main)
