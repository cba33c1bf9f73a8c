"""``python -m distlenet.export RUN_OR_FILE --to FORMAT... --out DIR``: write a trained network for other programs."""

from distlenet.utils.startup import exit_on_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c()  # before the imports that take seconds

import argparse
import re
from pathlib import Path

from distlenet.config.fields import FIELDS, split_mapping_key
from distlenet.distributed.entry_point import run_entry
from distlenet.export.export_formats import BUNDLES, NETWORK_FORMATS
from distlenet.export.exporter import Exported, ExportOptions, export
from distlenet.export.web import DEFAULT_RUNTIME
from distlenet.utils.errors import UserError
from distlenet.utils.exported_model import INT8
from distlenet.utils.parser import Parser


def main() -> None:
    """Export, and print what was written and how it compares."""
    checkpoint, options = options_of(make_parser().parse_intermixed_args())
    print_table(export(checkpoint, options))


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "python -m distlenet.export",
        usage="%(prog)s RUN_OR_FILE --to FORMAT... --out DIR [--config FILE]... [key=value]... [options]",
        description="Export a trained network, with its transform, to a new version DIR/1, DIR/2, ...",
    )
    formats = [*NETWORK_FORMATS, *BUNDLES]
    parser.add_argument("inputs", metavar="RUN", nargs="+", help="a run, a checkpoint file or a URL of one; settings")
    parser.add_argument("--to", metavar="FORMAT", nargs="+", required=True, choices=formats, help=", ".join(formats))
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the directory of the model's versions")
    parser.add_argument(
        "--weights",
        choices=("ema", "best", "last"),
        help="ema: the average of the last checkpoint; best: those of best.pt; last: without average (ema if there is "
        "one, else last)",
    )
    parser.add_argument("--quantize", choices=("int8",), help=f"also write {INT8}")
    parser.add_argument(
        "--max-drop", metavar="POINTS", type=_points, default=0.5, help="accuracy that int8 may lose, in points (0.5)"
    )
    parser.add_argument(
        "--split", action="store_true", help="also write the transform and the network as separate files"
    )
    parser.add_argument("--name", type=_name, help="the name of the model (that of the run)")
    parser.add_argument(
        "--check", choices=("test", "random"), default="test", help="compare on the test set, or on random samples"
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML file that names your task and network"
    )
    parser.add_argument(
        "--onnxruntime-web",
        metavar="DIR",
        type=Path,
        default=DEFAULT_RUNTIME,
        help=f"the npm package that --to web includes ({DEFAULT_RUNTIME})",
    )
    return parser


def options_of(arguments: argparse.Namespace) -> tuple[str, ExportOptions]:
    """Return the checkpoint and the options. Raise UserError unless one checkpoint is named."""
    overrides = [text for text in arguments.inputs if split_mapping_key(text.partition("=")[0])[0] in FIELDS]
    checkpoints = [text.removeprefix("checkpoint=") for text in arguments.inputs if text not in overrides]
    if len(checkpoints) != 1:
        raise UserError(f"expected one run or checkpoint file, not {len(checkpoints)}; see --help")
    return checkpoints[0], ExportOptions(
        formats=arguments.to,
        out=arguments.out,
        weights=arguments.weights,
        quantize=arguments.quantize is not None,
        split=arguments.split,
        name=arguments.name,
        check=arguments.check,
        max_drop=arguments.max_drop,
        overrides=overrides,
        files=arguments.config,
        onnxruntime_web=arguments.onnxruntime_web,
    )


def print_table(exported: Exported) -> None:
    """Print one line per file, in aligned columns, and the path of the version."""
    files = exported.metadata["files"]
    metrics = sorted({name for entry in files.values() for name in entry["metrics"]})
    rows = [["file", "size", "samples", "same class", "difference", "tolerance", *metrics]]
    for name, entry in files.items():
        same = entry["same_classes"]
        classes = (
            "-" if same is None else f"{same}" + f" ({entry['within_rounding']} close)" * (entry["within_rounding"] > 0)
        )
        tolerance = "-" if entry["tolerance"] is None else f"{entry['tolerance']:.1e}"
        numbers = [f"{entry['largest_difference']:.1e}", tolerance]
        values = [f"{entry['metrics'][each]:.4f}" if each in entry["metrics"] else "-" for each in metrics]
        rows.append([name, _size(entry["bytes"]), str(entry["samples"]), classes, *numbers, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"Version: {exported.path}")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _points(text: str) -> float:
    if re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text) and float(text) <= 100:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected percentage points, from 0 to 100")


def _name(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text[:100]}: expected the characters a-z, A-Z, 0-9, '.', '_' and '-', starting with one of a-z, A-Z or 0-9"
    )


if __name__ == "__main__":
    run_entry(main)
