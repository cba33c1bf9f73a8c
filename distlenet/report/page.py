"""One page that needs nothing else: charts and pictures are in it, and it asks no network."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distlenet.report.charts import draw_charts
from distlenet.report.runs import Run, differences, number
from distlenet.utils.files import replace_text, told


def write_report(runs: list[Run], page: Path) -> None:
    """Write the page, and its charts as PNGs into a folder beside it. Raises UserError where that cannot be."""
    pictures = page.with_suffix("")
    with told(page.parent):
        pictures.mkdir(parents=True, exist_ok=True)
        # Markup: matplotlib's SVG, in which it has escaped all text. All else is escaped by the template.
        charts = [(title, Markup(svg)) for title, svg in draw_charts(runs, pictures)]
        environment = Environment(
            loader=PackageLoader("distlenet.report", "."), autoescape=True, undefined=StrictUndefined
        )
        content = environment.get_template("page.html").render(
            title=" and ".join(run.name for run in runs),
            runs=runs,
            charts=charts,
            numbers=[(name, value) for name, value in results(runs[0]) if value is not None],
            compared=[
                (row[0][0], [value if value is not None else "–" for _, value in row])
                for row in zip(*(results(run) for run in runs), strict=True)
            ],
            differing=differences(runs),
        )
        replace_text(page, content.encode(errors="replace").decode())  # JSON may name half of a surrogate pair


def results(run: Run) -> list[tuple[str, str | None]]:
    """Return a run's chief numbers, each with its name; None where there is none."""
    tests, train = run.of("test"), run.of("train")
    last: dict[str, Any] = tests[-1] if tests else {}
    best = max((accuracy for record in tests if (accuracy := number(record.get("accuracy"))) is not None), default=None)
    summary = run.summary
    speed = number(summary.get("train_images_per_s")) or (train[-1].get("images_per_s") if train else None)
    rows: list[tuple[str, Any, str]] = [
        ("test accuracy, last", last.get("accuracy"), "{:.2%}"),
        ("test accuracy, best", best, "{:.2%}"),
        ("test loss, last", last.get("loss"), "{:.4f}"),
        ("epoch", last.get("epoch"), "{}"),
        ("optimizer steps", run.records[-1]["step"] if run.records else None, "{:,}"),
        ("images/s", speed, "{:,.0f}"),
        ("seconds of training", summary.get("train_s"), "{:,.1f}"),
        ("ranks", run.starts[-1].get("world_size") if run.starts else None, "{}"),
        ("restarts", len(run.restarts) if run.starts else None, "{}"),
    ]
    numbers = [(name, None if (known := number(value)) is None else form.format(known)) for name, value, form in rows]
    return [*numbers, ("state", "complete" if summary else "not complete")]
