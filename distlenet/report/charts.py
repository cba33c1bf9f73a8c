"""The charts of a report, drawn by matplotlib: each as SVG for the page, and as a PNG for elsewhere."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from distlenet.report.runs import Run, class_accuracies, column

POINTS = 400
"""Points of a line: a longer one is averaged over neighbours, which the page is too narrow to show."""

FULL = 8
"""Runs side by side whose lines have all their points; so a page of a hundred runs stays below 2 MB."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and sharp on a phone
    "svg.hashsalt": "distlenet",  # the same page for the same run
    "text.parse_math": False,  # a run may have a dollar in its name
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.figsize": (4.6, 2.9),
    "savefig.bbox": "tight",
}


def draw_charts(runs: list[Run], folder: Path | None) -> Iterator[tuple[str, str]]:
    """Yield title and SVG of each chart for which there are numbers; with ``folder``, write PNGs there too."""
    makers: list[tuple[str, Callable[[list[Run], Any], bool]]] = [
        ("Loss", lambda runs, axes: _over_steps(runs, axes, "loss", "nats per image")),
        ("Accuracy", lambda runs, axes: _over_steps(runs, axes, "accuracy", "share of images", percent=True)),
        ("Learning rate", lambda runs, axes: _line(runs, axes, "lr")),
        ("Throughput", _throughput),
        ("Gradient norm", lambda runs, axes: _line(runs, axes, "grad_norm")),
        ("Steps over time, and restarts", _over_time),
    ]
    if len(runs) == 1:
        makers += [("Where the time goes", _split), ("Confusion", _confusion), ("Accuracy of each class", _classes)]
    for title, make in makers:
        with _figure() as figure:
            if not make(runs, figure.gca()):
                continue
            yield title, _svg(figure, title)
            if folder is not None:
                name = "-".join(re.findall("[a-z]+", title.lower()))
                figure.savefig(folder / f"{name}.png", dpi=150)


@contextmanager
def _figure() -> Iterator[Figure]:
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = pyplot.figure()
        try:
            yield figure
        finally:
            pyplot.close(figure)


def _svg(figure: Figure, title: str) -> str:
    """Write a figure as an SVG element that takes the width it is given, with ids of its own on the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    prefix = "-".join(re.findall("[a-z]+", title.lower()))
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    return text


def _thin(xs: list[Any], ys: list[Any], lines: int = 1) -> tuple[list[float], list[float]]:
    """Average neighbours until at most POINTS are left; where a chart has many ``lines``, fewer of each."""
    size = -(-len(xs) // (POINTS * FULL // max(FULL, lines)))
    if size <= 1:
        return xs, ys
    parts = range(0, len(xs), size)
    return (
        [sum(xs[i : i + size]) / len(xs[i : i + size]) for i in parts],
        [sum(ys[i : i + size]) / len(ys[i : i + size]) for i in parts],
    )


def _over_steps(runs: list[Run], axes: Any, key: str, unit: str, percent: bool = False) -> bool:
    drawn = False
    for number, run in enumerate(runs):
        color = f"C{number}"
        name = f"{run.name} " if len(runs) > 1 else ""
        for split, line, label in (("train", "-", "training"), ("test", "o-", "test")):
            steps, values = column(run.of(split), "step", key)
            if not steps:
                continue
            drawn = True
            faint = {"alpha": 0.45, "linewidth": 1} if split == "train" else {"markersize": 3}
            if split == "test" and len(runs) == 1:
                color = "C1"
            axes.plot(*_thin(steps, values, len(runs)), line, color=color, label=f"{name}{label}", **faint)
    if drawn:
        axes.set(xlabel="optimizer step", ylabel=unit)
        if percent:
            axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
            axes.set_ylim(top=1.0)
        axes.legend(fontsize=7, frameon=False)
    return drawn


def _line(runs: list[Run], axes: Any, key: str) -> bool:
    drawn = False
    for run in runs:
        steps, values = column(run.of("train"), "step", key)
        if steps:
            drawn = True
            axes.plot(*_thin(steps, values, len(runs)), label=run.name)
    axes.set(xlabel="optimizer step")
    if drawn and len(runs) > 1:
        axes.legend(fontsize=7, frameon=False)
    return drawn


def _throughput(runs: list[Run], axes: Any) -> bool:
    drawn = _line(runs, axes, "images_per_s")
    axes.set(ylabel="images/s of all ranks")
    axes.set_ylim(bottom=0)
    return drawn


def _over_time(runs: list[Run], axes: Any) -> bool:
    drawn = False
    for number, run in enumerate(runs):
        times, steps = column(run.records, "time", "step")
        if not times:
            continue
        drawn = True
        minutes = [(time - times[0]) / 60 for time in times]
        axes.plot(*_thin(minutes, steps, len(runs)), color=f"C{number}", label=run.name)
        for start in run.restarts:
            axes.axvline((start["at"] - times[0]) / 60, color=f"C{number}", linestyle=":", linewidth=1)
    axes.set(xlabel="minutes since the first record (dotted: the run was started again)", ylabel="optimizer step")
    if drawn and len(runs) > 1:
        axes.legend(fontsize=7, frameon=False)
    return drawn


def _split(runs: list[Run], axes: Any) -> bool:
    steps, *shares = column(runs[0].of("train"), "step", "load", "compute", "wait")
    if not steps:
        return False
    thinned = [_thin(steps, values) for values in shares]
    labels = ["loading", "computing", "waiting for other ranks"]
    axes.stackplot(thinned[0][0], *[ys for _, ys in thinned], labels=labels, colors=["C2", "C0", "C3"], alpha=0.75)
    axes.set(xlabel="optimizer step", ylabel="share of the time", ylim=(0, 1))
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.legend(fontsize=7, frameon=False, loc="lower left")
    return True


def _confusion(runs: list[Run], axes: Any) -> bool:
    details = runs[0].details
    if not details:
        return False
    counts, names = details["confusion"], details["classes"]
    wrong = [count for label, row in enumerate(counts) for i, count in enumerate(row) if i != label]
    most = max(wrong, default=0) or 1
    axes.grid(visible=False)
    axes.imshow([[min(count, most) for count in row] for row in counts], cmap="Blues", vmin=0, vmax=1.6 * most)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, count, ha="center", va="center", fontsize=6)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="predicted", ylabel="label")
    axes.figure.set_size_inches(4.6, 4.2)
    return True


def _classes(runs: list[Run], axes: Any) -> bool:
    if not runs[0].details:
        return False
    rows = [(name, accuracy) for name, accuracy in class_accuracies(runs[0].details) if accuracy is not None][::-1]
    bars = axes.barh([name for name, _ in rows], [accuracy for _, accuracy in rows], color="C0", alpha=0.8)
    axes.bar_label(bars, [f"{accuracy:.1%}" for _, accuracy in rows], padding=2, fontsize=7)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    return True
