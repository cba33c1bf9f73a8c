"""The charts of a report, drawn with matplotlib: SVG for the page, and PNG files."""

import html
import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distlenet.report.runs import Run, columns, metric_names
from distlenet.utils.confusion_chart import draw_confusion

MAX_POINTS = 400  # per line; longer lines are averaged, because the page is too narrow to show more
MAX_FULL_LINES = 8  # charts with more lines draw fewer points per line; a page of 60 runs stays below 2 MB

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: small files, sharp at any size
    "svg.hashsalt": "distlenet",  # the same bytes for the same run
    "text.parse_math": False,  # run names may contain dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.figsize": (4.6, 2.9),
    "savefig.bbox": "tight",
}


def draw_charts(runs: list[Run], png_directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the title and SVG of each chart that has data, and write it as PNG too."""
    metrics = {name: name.replace("_", " ").capitalize() for name in metric_names(runs)}
    charts: list[tuple[str, Callable[[list[Run], Axes], None]]] = [
        ("Loss", partial(_draw_metric, key="loss", ylabel="mean over samples")),
        *((title, partial(_draw_metric, key=name, ylabel=name)) for name, title in metrics.items()),
        ("Learning rate", partial(_draw_train, key="lr")),
        ("Throughput", partial(_draw_train, key="images_per_s", ylabel="samples/s of all ranks")),
        ("Gradient norm", partial(_draw_train, key="grad_norm")),
        ("Steps over time, and restarts", _draw_steps_over_time),
    ]
    if len(runs) == 1:
        charts.append(("Time per step", _draw_time_split))
    if len(runs) == 1 and "confusion" in runs[0].error_analysis:
        charts += [("Confusion", _draw_confusion), ("Accuracy of each class", _draw_class_accuracies)]
    slugs: set[str] = set()
    for title, draw in charts:
        with mpl.rc_context(STYLE):
            figure = Figure()
            axes = figure.subplots()
            draw(runs, axes)
            if not axes.has_data():
                continue
            slug = "-".join(re.findall("[a-z0-9]+", title.lower())) or "metric"
            slug += f"-{len(slugs)}" if slug in slugs else ""
            slugs.add(slug)
            if len(runs) > 1 or len(axes.get_legend_handles_labels()[0]) > 1:
                axes.legend()
            svg = _to_svg(figure, title, slug)
            figure.savefig(png_directory / f"{slug}.png", dpi=150)
        yield title, svg


def thin(xs: list[Any], ys: list[Any], lines: int = 1) -> tuple[list[float], list[float]]:
    """Average neighboring points until at most MAX_POINTS remain; fewer if the chart has many ``lines``."""
    size = -(-len(xs) // (MAX_POINTS * MAX_FULL_LINES // max(MAX_FULL_LINES, lines)))
    if size <= 1:
        return xs, ys
    thin_xs, thin_ys = (
        [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
        for values in (xs, ys)
    )
    return thin_xs, thin_ys


def _to_svg(figure: Figure, title: str, slug: str) -> str:
    """Return a figure as an SVG image that fills the available width, with ids that are unique on the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{slug}-", text)
    for attribute in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def _plot(axes: Axes, runs: list[Run], points: list[list[Any]], line_format: str = "-", **style: Any) -> None:
    """Plot one thinned line; draw nothing without data."""
    xs, ys = points
    if xs:
        axes.plot(*thin(xs, ys, len(runs)), line_format, **style)


def _draw_metric(runs: list[Run], axes: Axes, key: str, ylabel: str) -> None:
    for number, run in enumerate(runs):
        prefix, test_color = ("", "C1") if len(runs) == 1 else (f"{run.name} ", f"C{number}")
        train, val, test = (columns(run.of_split(split), "step", key) for split in ("train", "val", "test"))
        _plot(axes, runs, train, color=f"C{number}", label=f"{prefix}training", alpha=0.45, linewidth=1)
        val_color = "C2" if len(runs) == 1 else test_color
        _plot(axes, runs, val, "s--", color=val_color, label=f"{prefix}validation", markersize=3)
        _plot(axes, runs, test, "o-", color=test_color, label=f"{prefix}test", markersize=3)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    if key == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(top=1.0)


def _draw_train(runs: list[Run], axes: Axes, key: str, ylabel: str = "") -> None:
    for run in runs:
        _plot(axes, runs, columns(run.of_split("train"), "step", key), label=run.name)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.set_ylim(bottom=0)


def _draw_steps_over_time(runs: list[Run], axes: Axes) -> None:
    for number, run in enumerate(runs):
        times, steps = columns(run.records, "time", "step")
        if times:
            minutes = [(time - times[0]) / 60 for time in times]
            _plot(axes, runs, [minutes, steps], color=f"C{number}", label=run.name)
            for start in run.restarts:
                axes.axvline((start["timestamp"] - times[0]) / 60, color=f"C{number}", linestyle=":", linewidth=1)
    axes.set(xlabel="minutes since the first record (dotted: restarts)", ylabel="optimizer step")


def _draw_time_split(runs: list[Run], axes: Axes) -> None:
    steps, *shares = columns(runs[0].of_split("train"), "step", "load", "compute", "wait")
    if steps:
        labels = ["loading", "computing", "waiting for other ranks"]
        stack = [thin(steps, values)[1] for values in shares]
        axes.stackplot(thin(steps, steps)[0], *stack, labels=labels, colors=["C2", "C0", "C3"], alpha=0.75)
        axes.set(xlabel="optimizer step", ylabel="share of the time", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_confusion(runs: list[Run], axes: Axes) -> None:
    draw_confusion(axes, runs[0].error_analysis["confusion"], runs[0].error_analysis["classes"])


def _draw_class_accuracies(runs: list[Run], axes: Axes) -> None:
    """Draw each class's accuracy; omit classes without images."""
    counts, names = runs[0].error_analysis["confusion"], runs[0].error_analysis["classes"]
    rows = [(names[label], row[label] / sum(row)) for label, row in enumerate(counts) if sum(row)][::-1]
    bars = axes.barh(range(len(rows)), [accuracy for _, accuracy in rows], color="C0", alpha=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.bar_label(bars, [f"{accuracy:.1%}" for _, accuracy in rows], padding=2, fontsize=7)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
