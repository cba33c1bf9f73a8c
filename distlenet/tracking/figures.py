"""The confusion matrix and the most confident mistakes of a run's last test, as PNG. Needs matplotlib."""

import base64
import io
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from distlenet.tracking.base import Record
from distlenet.utils.confusion_chart import draw_confusion

COLUMNS = 6


def confusion_figure(details: Record) -> Figure:
    """Draw the confusion matrix of ``details``, the content of TEST_FILE."""
    figure = Figure(layout="constrained")
    draw_confusion(figure.subplots(), details["confusion"], details["classes"])
    return figure


def mistakes_figure(details: Record) -> Figure:
    """Draw the images of the mistakes in ``details``, each with its label, its prediction and its confidence."""
    mistakes, classes = details["mistakes"], details["classes"]
    rows = -(-len(mistakes) // COLUMNS)
    figure = Figure(figsize=(1.5 * COLUMNS, 1.9 * rows), layout="constrained")
    for axes, mistake in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, mistakes, strict=False):
        axes.imshow(Image.open(io.BytesIO(base64.b64decode(mistake["png"]))), cmap="gray")
        label, predicted = classes[mistake["label"]], classes[mistake["predicted"]]
        axes.set_title(f"{label} → {predicted}\n{mistake['confidence']:.0%}, {mistake['index']}", fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def to_png(draw: Callable[[Record], Figure], details: Record) -> tuple[int, int, bytes]:
    """Draw a figure of ``details``; return its width and height in pixels, and its PNG."""
    file = io.BytesIO()
    with mpl.rc_context({"text.parse_math": False}):  # names of classes may contain dollar signs
        draw(details).savefig(file, format="png", dpi=150)
    return *Image.open(file).size, file.getvalue()
