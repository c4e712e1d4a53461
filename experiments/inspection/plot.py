"""One figure of how a run went: what it learned, and which weights, heads and tokens it lived on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.errors import ConfigError
from experiments.inspection import overlap_panel
from experiments.inspection.compare import Comparison
from experiments.inspection.panels import HEADS, HEIGHT, ORDER, TEXT, End, label_ends, lanes_of, panels, plain
from experiments.inspection.run import Run

SUFFIXES = (".png", ".svg", ".pdf")
DPI = 160
WIDTH = 11.0  #: inches
HEAD = (0.42, 0.6)  #: of the heading above one run and above several
LANE = 0.085  #: of one head


def save(runs: Sequence[Run], file: Path, shared: Comparison | None = None) -> list[str]:
    """Draw one run, or several side by side, and write the picture; returns the titles of its panels.

    Args:
        shared: what the masks of two runs have in common, for a panel below theirs.

    Raises:
        ConfigError: the file's suffix is none that can be drawn, it cannot be written, or a run has no history.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot: {file} is no name of a picture; end it in {', '.join(SUFFIXES)}")
    for run in runs:
        if not panels(run):
            raise ConfigError(f"--plot: {run.folder.path} has recorded nothing yet that could be drawn")
    figure = draw(runs, shared)
    # In memory first, so that no half of a picture is left where the disk is full.
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix[1:].lower(), dpi=DPI)
    try:
        file.write_bytes(content.getvalue())
    except OSError as error:
        raise ConfigError(f"--plot: cannot write {file}: {error.strerror or error}") from error
    own = [title for run in runs for title in panels(run)]
    return list(dict.fromkeys([*own, *([overlap_panel.TITLE] if shared is not None else [])]))


def draw(runs: Sequence[Run], shared: Comparison | None = None) -> Figure:
    """The figure: one run in two columns of panels, several runs in a column each, on the same scales."""
    found = [panels(run) for run in runs]
    titles = [title for title in ORDER if any(title in panel for panel in found)]
    small = [title for title in titles if title != HEADS]
    columns = 2 if len(runs) == 1 else 1
    if columns == 2 and len(small) % 2:  # the first takes the whole width
        rows = [[small[0]], *(list(pair) for pair in zip(small[1::2], small[2::2], strict=True))]
    else:
        rows = [small[index : index + columns] for index in range(0, len(small), columns)]
    heights = [HEAD[len(runs) > 1], *[HEIGHT] * len(rows)]
    if HEADS in titles:
        rows.append([HEADS])
        heights.append(min(7.0, max(1.3, 0.75 + LANE * max(len(lanes_of(run)) for run in runs))))
    if shared is not None:
        heights.append(HEIGHT * 1.4)
    figure = Figure(figsize=(WIDTH, sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.06, wspace=0.03, hspace=0.03)
    grid = figure.add_gridspec(len(heights), max(len(runs), *(len(row) for row in rows)), height_ratios=heights)
    ends: list[tuple[Axes, Sequence[End]]] = []
    scales: dict[str, Axes] = {}
    for number, (run, panel) in enumerate(zip(runs, found, strict=True)):
        own = slice(None) if len(runs) == 1 else number
        _write_heading(figure.add_subplot(grid[0, own]), run, lines=1 if len(runs) == 1 else 2)
        drawn = [row for row in rows if any(title in panel for title in row)]
        for line, row in enumerate(rows, start=1):
            for column, title in enumerate(row):
                if title in panel:
                    place = grid[line, column if len(row) > 1 else own]
                    axes = figure.add_subplot(place, sharey=scales.get(title) if title != HEADS else None)
                    scales.setdefault(title, axes)
                    axes.set_title(title, loc="left", fontsize=TEXT + 1, fontweight="bold")
                    axes.set_xlim(0, max(run.step, 1))
                    ends.append((axes, panel[title](axes)))
                    _finish(axes, last=row is drawn[-1])
    if shared is not None:
        axes = figure.add_subplot(grid[len(heights) - 1, :])
        axes.set_title(overlap_panel.TITLE, loc="left", fontsize=TEXT + 1, fontweight="bold")
        overlap_panel.draw(shared, axes)
        _finish_frame(axes)
    # Only now, because a later run may have changed the scale that it shares.
    for axes, lines in ends:
        label_ends(axes, lines)
    figure.align_ylabels()
    return figure


def _finish_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#888888")


def _finish(axes: Axes, *, last: bool) -> None:
    axes.tick_params(labelsize=TEXT, color="#888888", length=3)
    _finish_frame(axes)
    axes.yaxis.label.set_fontsize(TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if last:
        axes.set_xlabel("optimizer step", fontsize=TEXT)


def _write_heading(axes: Axes, run: Run, lines: int) -> None:
    """The run's name, and below it what it trains and how far it is, on so many lines."""
    config, series = run.config, run.series
    facts = [config.model.name] if config is not None else []
    live, total = (series.get(f"budget/{kind}_parameters") for kind in ("live", "total"))
    if live and total:
        facts.append(f"{live[-1][1]:,.0f} of {total[-1][1]:,.0f} prunable weights live")
    whole = f" of {run.total_steps:,}" if run.total_steps is not None and not run.finished else ""
    progress = [f"{run.step:,}{whole} steps"]
    if series.get(run.score):
        progress.append(f"top-1 {series[run.score][-1][1]:.2f} %")
    texts = [", ".join(facts + progress)] if lines == 1 else [", ".join(facts), ", ".join(progress)]
    axes.axis("off")
    name = plain(run.folder.path.resolve().name)
    axes.annotate(name, (0, 1), xytext=(-32, 0), textcoords="offset points", va="top", fontsize=TEXT + 5, weight="bold")
    axes.annotate(
        plain("\n".join(texts)),
        (0, 1),
        xytext=(-32, -2 * TEXT - 4),
        textcoords="offset points",
        va="top",
        fontsize=TEXT + 1,
        color="#333333",
        linespacing=1.35,
    )
