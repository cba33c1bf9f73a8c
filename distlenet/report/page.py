"""The report's page: one HTML file with charts and images inline, which loads nothing from a network."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distlenet.report.charts import draw_charts
from distlenet.report.runs import Run, differences, key_figures
from distlenet.utils.files import convert_io_errors, replace_text


def write_report(runs: list[Run], page: Path) -> None:
    """Write the page, and its charts as PNG files into a directory of the same name. Raise UserError on failure."""
    png_directory = page.with_suffix("")
    with convert_io_errors(page.parent, "check its disk and permissions, or give --output FILE.html"):
        png_directory.mkdir(parents=True, exist_ok=True)
        # Markup: matplotlib escapes all text in its SVG. The template escapes everything else.
        charts = [(title, Markup(svg)) for title, svg in draw_charts(runs, png_directory)]
        loader = PackageLoader("distlenet.report", ".")
        template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")
        content = template.render(
            title=" and ".join(run.name for run in runs),
            runs=runs,
            charts=charts,
            figures=[row for row in key_figures(runs) if any(value is not None for value in row[1])],
            differences=differences(runs),
        )
        content = content.encode(errors="replace").decode()  # JSON strings may hold lone surrogates
        replace_text(page, content, durable=False)
