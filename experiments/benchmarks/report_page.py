"""A report in a terminal, as a page of its own and as a picture. All three show every row."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.report import Report, Row
from experiments.benchmarks.timing import check_output, write_text
from experiments.errors import ConfigError
from experiments.terminal import print_table

HEADINGS = ("", "dense", "sparse", "ratio", "middle half", "ideal", "of ideal")
EXPLAINED = (
    "Ratio is sparse over dense; of times, which are taken in alternation, it is the median over the pairs, and the "
    "middle half of the pairs lies within the range beside it. Ideal is what it would be if only the arithmetic "
    "counted (of a file: only its live values); of ideal is 100 % where all of that is gained. MACs of live weights "
    "only count where kernels skip dead weights (--kernels auto); a dense kernel computes with them as well."
)
_LABELS, _BARS, _VALUES, _LINE = 250, 390, 120, 30
"""Pixels of the chart: width of its three columns, height of a row."""


def check_page(path: str | None) -> None:
    """Find out before the measuring whether the page can be made.

    Raises:
        ConfigError: its place, its kind, or that a library is missing.
    """
    check_output("output", path)
    if path is None:
        return
    if Path(path).suffix.lower() not in (".html", ".png"):
        raise ConfigError(f"output: {path} is neither a page nor a picture; end it in .html or .png")
    if Path(path).suffix.lower() == ".png" and find_spec("matplotlib") is None:
        raise ConfigError(
            "output: a .png needs matplotlib: pip install 'sparse-trainer[plot]'; an .html needs nothing more"
        )


def write_page(report: Report, machine: Mapping[str, Any], path: str) -> None:
    """The report as .html or .png.

    Raises:
        ConfigError: it cannot be written.
    """
    if Path(path).suffix.lower() == ".html":
        write_text("output", path, to_html(report, machine))
        return
    try:
        draw(report, machine, path)
    except OSError as error:
        raise ConfigError(f"output: cannot write {path}: {error.strerror or error}") from error


def number(value: float) -> str:
    """At least three digits, and no more than help."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{1 if abs(value) >= 100 else 2}f}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as texts, under :data:`HEADINGS`."""
    return (
        f"{row.name} ({row.unit})",
        number(row.dense),
        number(row.sparse),
        f"{row.ratio:.2f}",
        f"{row.quartiles[0]:.2f}–{row.quartiles[1]:.2f}" if row.quartiles else "",
        "" if row.ideal is None else f"{row.ideal:.2f}",
        "" if row.of_ideal is None else f"{row.of_ideal:.0%}".replace("%", " %"),
    )


def print_report(console: Console, report: Report, machine: Mapping[str, Any]) -> None:
    """The facts, then a row for each property."""
    print_table(console, report.checkpoint, report.facts)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in HEADINGS:
        in_two = heading.replace(" ", "\n")
        table.add_column(in_two, justify="right" if heading else "left", no_wrap=bool(heading))
    for row in report.rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"{EXPLAINED}\n\nMeasured on: {_sentence(machine)}", markup=False)


def _sentence(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def to_html(report: Report, machine: Mapping[str, Any]) -> str:
    """One page that needs no other file and no network."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.facts)
    head = "".join(f"<th scope='col'>{escape(heading)}</th>" for heading in HEADINGS)
    body = ""
    for row in report.rows:
        name, *rest = map(escape, cells(row))
        body += f"<tr><th scope='row'>{name}</th>{''.join(f'<td>{text}</td>' for text in rest)}</tr>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(Path(report.checkpoint).name)}: sparse against dense</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Sparse against dense</h1>
<p class="path">{escape(report.checkpoint)}</p>
<dl>{facts}</dl>
<h2>Sparse over dense</h2>
{_chart(report.rows)}
<p class="legend"><span class="key better"></span>better than dense
<span class="key worse"></span>no better <span class="key tick"></span>ideal
<span class="key half"></span>middle half of the pairs</p>
<h2>All numbers</h2>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<p>{escape(EXPLAINED)}</p>
<p class="machine">Measured on: {escape(_sentence(machine))}.</p>
</main>
</body>
</html>
"""


def is_better(row: Row) -> bool:
    """Whether the sparse network is ahead."""
    return row.ratio > 1 if row.more_is_better else row.ratio < 1


def _reach(rows: tuple[Row, ...]) -> float:
    """The greatest ratio that a chart shows."""
    return 1.05 * max(1.0, *(max(row.ratio, row.ideal or 0.0, *(row.quartiles or ())) for row in rows))


def _chart(rows: tuple[Row, ...]) -> str:
    """A bar for each row as SVG: its ratio, the quartiles of it, and its ideal."""
    scale = _BARS / _reach(rows)
    height = _LINE * len(rows) + 24
    parts = [f'<line class="dense" x1="{_LABELS + scale:.1f}" x2="{_LABELS + scale:.1f}" y1="0" y2="{height - 20}"/>']
    for index, row in enumerate(rows):
        top = index * _LINE
        middle = top + _LINE / 2
        kind = "better" if is_better(row) else "worse"
        parts.append(f'<text class="label" x="{_LABELS - 10}" y="{middle + 4:.1f}">{escape(row.name)}</text>')
        parts.append(
            f'<rect class="{kind}" x="{_LABELS}" y="{top + 6}" width="{row.ratio * scale:.1f}" height="{_LINE - 12}"/>'
        )
        right = row.ratio
        if row.quartiles is not None:
            right = max(right, row.quartiles[1])
            left, end = (_LABELS + value * scale for value in row.quartiles)
            parts.append(f'<path class="quartiles" d="M{left:.1f} {middle - 4}v8m0 -4H{end:.1f}m0 -4v8" fill="none"/>')
        if row.ideal is not None:
            right = max(right, row.ideal)
            place = _LABELS + row.ideal * scale
            parts.append(
                f'<line class="ideal" x1="{place:.1f}" x2="{place:.1f}" y1="{top + 2}" y2="{top + _LINE - 2}"/>'
            )
        parts.append(f'<text x="{_LABELS + right * scale + 8:.1f}" y="{middle + 4:.1f}">{escape(_value(row))}</text>')
    parts.append(f'<text class="axis" x="{_LABELS + scale:.1f}" y="{height - 4}">dense</text>')
    return (
        f'<svg viewBox="0 0 {_LABELS + _BARS + _VALUES} {height}" role="img" '
        f'aria-label="Sparse over dense, beside the ideal">{"".join(parts)}</svg>'
    )


def _value(row: Row) -> str:
    ideal = "" if row.ideal is None else f" (ideal {row.ideal:.2f})"
    return f"{row.ratio:.2f}{ideal}"


_STYLE = """
:root { --back: #ffffff; --text: #1b1f24; --soft: #5c6670; --rule: #d9dee3; --better: #2a7f78; --worse: #c2702b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --text: #e6e9ec; --soft: #9aa5af; --rule: #333b43; --better: #4db6ac; --worse: #e0955a; }
}
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 800px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { margin: 0; font-size: 28px; } h2 { margin: 32px 0 8px; font-size: 19px; }
.path { margin: 4px 0 20px; color: var(--soft); font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; font-size: 13px; }
svg text { fill: var(--text); } svg .label { text-anchor: end; } svg .axis { text-anchor: middle; fill: var(--soft); }
svg .better { fill: var(--better); } svg .worse { fill: var(--worse); }
svg .dense { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .ideal { stroke: var(--text); stroke-width: 2.5; } svg .quartiles { stroke: var(--text); }
.legend { color: var(--soft); font-size: 14px; }
.key { display: inline-block; width: 14px; height: 12px; margin: 0 6px 0 16px; vertical-align: -1px; }
.key:first-child { margin-left: 0; }
.key.better { background: var(--better); } .key.worse { background: var(--worse); }
.key.tick { width: 3px; height: 15px; background: var(--text); vertical-align: -3px; }
.key.half { height: 0; border-top: 1px solid var(--text); vertical-align: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 5px 0 5px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-weight: 400; }
.machine { color: var(--soft); font-size: 14px; }
"""


def draw(report: Report, machine: Mapping[str, Any], path: str) -> None:
    """The chart and the numbers as a picture; needs matplotlib."""
    from matplotlib.figure import Figure as Canvas

    rows = report.rows
    figure = Canvas(figsize=(11, 2.6 + 0.36 * len(rows) + 0.2 * len(report.facts)), layout="constrained")
    figure.suptitle(f"{Path(report.checkpoint).name}: sparse over dense", fontsize=15)
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(
        places,
        [row.ratio for row in rows],
        color=["#2a7f78" if is_better(row) else "#c2702b" for row in rows],
        height=0.6,
    )
    axes.axvline(1.0, color="#5c6670", linestyle=":", zorder=0)
    for place, row in zip(places, rows, strict=True):
        right = max(row.ratio, row.ideal or 0.0, *(row.quartiles or (0.0,)))
        if row.quartiles is not None:
            axes.plot(row.quartiles, (place, place), color="#1b1f24", linewidth=1, marker="|", markersize=8)
        if row.ideal is not None:
            axes.plot((row.ideal, row.ideal), (place - 0.4, place + 0.4), color="#1b1f24", linewidth=2.5)
        _, dense, sparse, *_ = cells(row)
        note = f"{_value(row)}   {sparse} against {dense} {row.unit}"
        box_of_text = {"color": "white", "pad": 1}
        axes.annotate(
            note, (right, place), (8, 0), textcoords="offset points", va="center", fontsize=9, bbox=box_of_text
        )
    axes.set_yticks(places, [row.name for row in rows])
    axes.set_xlim(0, _reach(rows) * 1.45)  # room for the numbers
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("dotted: the dense network; thick: ideal, by the arithmetic; thin: middle half of the pairs")
    lines = [f"{name}: {text}" for name, text in report.facts]
    figure.text(0.01, -0.01, "\n".join([*lines, "", _sentence(machine)]), fontsize=9, va="top", color="#5c6670")
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
