"""Draw the flowcharts of the pages as SVG: Mermaid itself would be loaded from another host, or be 3 MB of script."""

import re
from html import escape
from typing import Any

WIDTH, HEIGHT, GAP_X, GAP_Y = 104, 30, 18, 46


def draw(source: str, _language: str, class_name: str, *_: Any, **__: Any) -> str:
    """Return a flowchart of lines ``A --> B`` as SVG: a row of boxes for each longest distance from the top."""
    edges = [(a, b) for a, b in re.findall(r"^\s*(\w+) --> (\w+)$", source, re.MULTILINE)]
    rows = layers(edges)
    order_rows(rows, edges)
    width = max(len(row) for row in rows) * (WIDTH + GAP_X) - GAP_X
    height = len(rows) * (HEIGHT + GAP_Y) - GAP_Y
    places = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (WIDTH + GAP_X) + GAP_X) / 2
        places |= {name: (left + i * (WIDTH + GAP_X), number * (HEIGHT + GAP_Y)) for i, name in enumerate(row)}
    lines = "".join(line(places[a], places[b]) for a, b in edges)
    boxes = "".join(box(name, x, y) for name, (x, y) in places.items())
    marker = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return (
        f'<div class="{class_name}"><svg role="img" aria-label="{escape("; ".join(" to ".join(e) for e in edges))}" '
        f'viewBox="-1 -1 {width + 2} {height + 2}" width="{width}">'
        f'<defs>{marker}<path d="M0 0 8 4 0 8z"/></marker></defs>{lines}{boxes}</svg></div>'
    )


def layers(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Return the nodes in rows, so that each edge leads down."""
    depth = {name: 0 for edge in edges for name in edge}
    for _ in depth:
        for upper, lower in edges:
            depth[lower] = max(depth[lower], depth[upper] + 1)
    for upper in depth:  # a node without a predecessor stands just above its uppermost successor
        if all(lower != upper for _, lower in edges):
            depth[upper] = min(depth[lower] for start, lower in edges if start == upper) - 1
    return [[name for name in depth if depth[name] == row] for row in range(max(depth.values()) + 1)]


def order_rows(rows: list[list[str]], edges: list[tuple[str, str]]) -> None:
    """Sort each row by the mean place of its neighbors, which removes most crossings."""
    for _ in range(8):
        place = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
        near: dict[str, list[float]] = {name: [] for name in place}
        for a, b in edges:
            near[a].append(place[b])
            near[b].append(place[a])
        for row in rows:
            row.sort(key=lambda name: sum(near[name]) / len(near[name]))


def line(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return a curve from the bottom of one box to the top of another."""
    x, y, to_x, to_y = start[0] + WIDTH / 2, start[1] + HEIGHT, end[0] + WIDTH / 2, end[1]
    bend = GAP_Y * 0.8
    return f'<path class="edge" d="M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"/>'


def box(name: str, x: float, y: float) -> str:
    """Return a box with a name."""
    text = f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2:g}">{escape(name)}</text>'
    return f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>{text}'
