"""``python -m distlenet.predict checkpoint=RUN IMAGE...``: say what pictures show."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlenet.config.arguments import Parser, positive_int
from distlenet.distributed.entry_point import run_entry
from distlenet.serving.predictor import Predictor, answer, read_all
from distlenet.utils.errors import UserError, printable


def main() -> None:
    """Predict as the arguments say. Raises UserError at the end where a picture could not be read."""
    parser = Parser(
        "python -m distlenet.predict",
        usage="%(prog)s checkpoint=RUN_OR_FILE IMAGE_OR_FOLDER... [--top K] [--invert ...] [--json] [--save FILE.png]",
        description="Say what pictures show: of any size, grey or in colour, light or dark.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", metavar="checkpoint=RUN IMAGE", nargs="+", help="a run or file; pictures or folders")
    parser.add_argument("--top", metavar="K", type=positive_int, default=3, help="classes to name for each picture (3)")
    parser.add_argument(
        "--invert",
        choices=("auto", "yes", "no"),
        default="auto",
        help="turn light and dark round; auto: where the border is light, since the training set's is dark",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--save", metavar="FILE.png", type=Path, help="write one picture with all of them, annotated")
    arguments = parser.parse_intermixed_args()
    settings = [word for word in arguments.words if word.startswith("checkpoint=")]
    names = [word for word in arguments.words if not word.startswith("checkpoint=")]
    if len(settings) != 1 or not names:
        raise UserError("expected checkpoint=RUN_OR_FILE once, and pictures, folders or patterns; --help shows more")
    if arguments.save and (arguments.save.suffix.lower() != ".png" or not arguments.save.parent.is_dir()):
        raise UserError(f"--save {arguments.save}: expected a name that ends in .png, in a folder that is there")
    predictor = Predictor(Path(settings[0].partition("=")[2]))
    if not 1 <= arguments.top <= len(predictor.classes):
        raise UserError(f"--top {arguments.top}: expected a whole number, 1 to {len(predictor.classes)}")
    images, paths, failures = read_all(names, arguments.invert, predictor.size)
    answers = []
    if images:
        probabilities = predictor(torch.stack(images))
        answers = [answer(p, predictor.classes, arguments.top) for p in probabilities]
        tell(paths, answers, as_json=arguments.json)
        if arguments.save:
            save(arguments.save, images, paths, answers)
    if failures:
        raise UserError("; ".join(failures))


def tell(paths: list[Path], answers: list[list[dict[str, Any]]], as_json: bool) -> None:
    """Print the answers: JSON lines for programs, a table on a terminal, else plain lines."""
    if as_json:
        for path, top in zip(paths, answers, strict=True):
            print(json.dumps({"image": str(path), "top": top}))
        return
    texts = [[f"{found['class']} {found['probability']:.1%}" for found in top] for top in answers]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("image", *(f"{place}." for place in range(1, len(texts[0]) + 1)))
        for path, text in zip(paths, texts, strict=True):
            table.add_row(Text(printable(str(path))), *text)
        Console().print(table)
    else:
        names = [printable(str(path)) for path in paths]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for name, text in zip(names, texts, strict=True):
            cells = [cell.ljust(width) for cell, width in zip(text, widths, strict=True)]
            print(f"{name.ljust(max(map(len, names)))}  {'  '.join(cells)}".rstrip())


def save(target: Path, images: list[Tensor], paths: list[Path], answers: list[list[dict[str, Any]]]) -> None:
    """Write one picture that shows what the network saw, and what it said. Raises UserError."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    across = min(6, len(images))
    down = -(-len(images) // across)
    with mpl.rc_context({"text.parse_math": False}):
        figure, panels = pyplot.subplots(down, across, figsize=(1.9 * across, 2.3 * down), squeeze=False)
        for panel in panels.flat:
            panel.axis("off")
        for panel, image, path, top in zip(panels.flat, images, paths, answers, strict=False):
            panel.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set_title(f"{printable(path.name)[:24]}\n{top[0]['class']} {top[0]['probability']:.0%}", fontsize=8)
        try:
            figure.savefig(target, dpi=110, bbox_inches="tight")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--save {target}: cannot be written: {getattr(error, 'strerror', None) or error}"
            ) from error
        finally:
            pyplot.close(figure)
    print(f"Picture: {target}", file=sys.stderr)


if __name__ == "__main__":
    run_entry(main)
