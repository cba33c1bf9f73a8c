"""What exported files compute, compared with the network over the whole test set, and the accuracy of int8.

``python benchmarks/exports.py [--spam DIRECTORY]``: LeNet on Fashion-MNIST with the default recipe, ResNet-18 with
BatchNorm on color images (examples/resnet_folder, one epoch), and, with the directory of the corpus, examples/spam.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FORMATS = ["onnx", "pt2", "safetensors"]
QUIET = ["device=cpu", "wandb.mode=disabled", "run.report=never", "run.name=run"]


def run(directory: Path, *words: str) -> None:
    """Run Python in a directory. Exit if it fails."""
    paths = os.pathsep.join([str(REPO), str(REPO / "examples/spam")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *words], cwd=directory, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stdout + ended.stderr)


def rows(title: str, directory: Path, *settings: str) -> list[str]:
    """Train, export in all formats, and return the lines of the table."""
    launch = ["-m", "distlenet.launch", "--standalone", "--nproc-per-node=2", "-m", "distlenet.train"]
    run(directory, *launch, *QUIET, *settings)
    names = [word for word in settings if not word.startswith(("train.", "optim."))]
    run(
        directory,
        "-m",
        "distlenet.export",
        "runs/run",
        *names,
        "--to",
        *FORMATS,
        "--quantize",
        "int8",
        "--out",
        "models",
    )
    files = json.loads((directory / "models/1/model.json").read_text())["files"]
    lines = []
    for name, entry in files.items():
        tolerance = "" if entry["tolerance"] is None else f"{entry['tolerance']:.1e}"
        cells = [f"{entry['bytes'] / 1000:,.0f} kB", f"{entry['same_classes']:,} of {entry['samples']:,}"]
        cells += [f"{entry['largest_difference']:.1e}", tolerance, f"{entry['metrics']['accuracy']:.2%}"]
        lines.append(f"| {' | '.join([title, name, *cells])} |")
    return lines


def main() -> None:
    """Export the networks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPO / "data", help="the directory of Fashion-MNIST (data)")
    parser.add_argument("--spam", type=Path, help="the directory package/data of examples/spam")
    arguments = parser.parse_args()
    lines = ["| network | file | size | same class | largest difference | tolerance | accuracy |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        lenet, resnet, spam = (Path(temporary, name) for name in ("lenet", "resnet", "spam"))
        for directory in (lenet, resnet, spam):
            directory.mkdir()
        lines += rows("LeNet", lenet, f"data.root={arguments.data.resolve()}")
        example = REPO / "examples/resnet_folder"
        run(resnet, str(example / "make_folder.py"), "images", "--source", str(arguments.data.resolve()))
        lines += rows("ResNet-18", resnet, "--config", str(example / "folder.yaml"), "train.epochs=1")
        if arguments.spam is not None:
            config = ["--config", str(REPO / "examples/spam/config.yaml")]
            lines += rows("spam", spam, *config, f"data.root={arguments.spam.resolve()}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
