"""The images of the documentation: the terminal during training, W&B's viewer of the run, and its report.

``python benchmarks/screenshots.py DIRECTORY``: needs tmux, Chromium and the dataset in data/; writes console.svg,
wandb.svg and report.png.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

sys.path.append(str(Path(__file__).parents[1] / "tests/browser"))
from browser import Browser

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distlenet.train"]


def terminal(command: list[str], directory: Path, size: tuple[int, int], until: str, limit_s: float = 300) -> str:
    """Run a command in tmux until its screen contains a text; return the screen with escape codes."""
    server = ["tmux", "-L", f"screenshots-{os.getpid()}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    columns, rows = map(str, size)
    shell = f"{shlex.join(command)}; sleep 1000"
    subprocess.run(
        [*server, "new-session", "-d", "-c", directory, "-x", columns, "-y", rows, shell], check=True, env=environ
    )
    try:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            screen = subprocess.run([*server, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True)
            if until in screen.stdout:
                return screen.stdout
            time.sleep(0.2)
        raise SystemExit(f"{until!r} did not appear:\n{screen.stdout}")
    finally:
        subprocess.run([*server, "kill-server"], check=True)


def draw(screen: str, columns: int, title: str, file: Path) -> None:
    """Write a screen as SVG."""
    with Path(os.devnull).open("w") as null:
        console = Console(record=True, width=columns, file=null, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi(screen.rstrip()), soft_wrap=True)
        console.save_svg(str(file), title=title)


def main() -> None:
    """Train, and write the three images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory of the images")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work_dir, runs = Path(scratch), Path(scratch) / "runs"
        (work_dir / "data").symlink_to(Path("data").resolve())
        words = ["train.epochs=4", "run.name=run", "wandb.mode=offline", "run.report=always"]
        screen = terminal([*LAUNCH, *words], work_dir, (118, 12), "epoch 3/4")
        draw(screen, 118, "torchrun --nproc_per_node=2 -m distlenet.train", directory / "console.svg")
        ended = subprocess.run(
            [*LAUNCH, *words], check=True, capture_output=True, text=True, cwd=work_dir
        )  # resume to the end
        print(ended.stdout)
        (offline,) = (runs / "run/wandb").glob("offline-run-*")
        leet = [sys.executable, "-m", "wandb", "leet", "run", str(offline)]
        draw(terminal(leet, work_dir, (170, 44), "test/accuracy"), 170, "wandb leet", directory / "wandb.svg")
        browser = Browser(work_dir / "profile")
        browser.open((runs / "run/report.html").as_uri(), 1400, 1400)
        (directory / "report.png").write_bytes(browser.screenshot())
        browser.close()


if __name__ == "__main__":
    main()
