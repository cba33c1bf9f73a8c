"""The drawing of a confusion matrix, for a report and for TensorBoard. Needs matplotlib."""

from collections.abc import Sequence

from matplotlib.axes import Axes

MAX_CLASSES_WITH_TEXT = 50  # with more, numbers and names would overlap


def draw_confusion(axes: Axes, counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Draw the counts by label and predicted class, (C, C), as colored cells with their numbers."""
    errors = [count for label, row in enumerate(counts) for predicted, count in enumerate(row) if predicted != label]
    max_error = max(errors, default=0) or 1  # the color scale is for the errors
    clipped = [[min(count, max_error) for count in row] for row in counts]
    axes.grid(visible=False)
    axes.imshow(clipped, cmap="Blues", vmin=0, vmax=1.6 * max_error)
    if len(names) <= MAX_CLASSES_WITH_TEXT:
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                if count:
                    axes.text(x, y, str(count), ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="predicted", ylabel="label")
    axes.figure.set_size_inches(4.6, 4.2)  # type: ignore[union-attr]
