"""``python -m experiments.grids.speed_picture GRID=TITLE:ENTRY=LABEL,... --output FILE``: accuracy over measured
throughput.

Of the grids after ``--kernels`` the throughput is that with kernels that skip dead weights, and a line stands where the
dense network runs in onnxruntime, if that was measured. It reads the reports in ``experiments/results``; nothing is
trained or timed. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
BASELINE, OTHERS = "black", "#1f6fb4"


def points_of(
    report: Mapping[str, Any], entries: Sequence[str], speed: str = "throughput_ratio"
) -> list[tuple[str, float, float, float]]:
    """(label, throughput over that of dense, top-1, its standard deviation over the seeds) of each entry, in order.

    Args:
        entries: names, or ``name=label``. The first is the one whose top-1 is drawn as a line.
        speed: which of the ratios is the throughput: ``throughput_ratio`` or ``kernels_ratio``.

    Raises:
        ValueError: an entry was not run, or not timed.
    """
    rows = {row["entry"]: row for row in report["rows"]}
    speeds = report["speeds"].get("entries", {})
    found = []
    for text in entries:
        entry, _, label = text.partition("=")
        is_base = entry == report["baseline"]
        if entry not in rows or not (is_base or entry in speeds):
            timed = ", ".join(name for name in rows if name in speeds)
            raise ValueError(f"{entry} was not run and timed in this grid; these were: {timed}")
        ratio = 1.0 if is_base else speeds[entry][speed]
        found.append((label or entry, ratio, rows[entry]["top1_mean"], rows[entry]["top1_spread"] or 0.0))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a panel for each grid; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.grids.speed_picture", description=__doc__)
    parser.add_argument("grids", nargs="+", metavar="GRID=TITLE:ENTRY=LABEL,...")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=[],
        metavar="GRID",
        help="of these, the throughput with kernels that skip dead weights",
    )
    options = parser.parse_args(arguments)
    panels: dict[str, tuple[Sequence[tuple[str, float, float, float]], float | None]] = {}
    for argument in options.grids:
        grid, _, entries = argument.partition(":")
        name, _, title = grid.partition("=")
        try:
            report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            with_kernels = name in options.kernels
            points = points_of(report, entries.split(","), "kernels_ratio" if with_kernels else "throughput_ratio")
            in_onnxruntime = report["speeds"]["baseline"].get("onnxruntime_ratio") if with_kernels else None
            panels[title or name] = points, in_onnxruntime
        except (OSError, ValueError) as error:
            parser.error(f"{argument}: {error}")
        except KeyError as error:
            parser.error(f"{argument}: the report has no {error}")
    _draw(panels, options.output)
    return 0


def _draw(panels: Mapping[str, tuple[Sequence[tuple[str, float, float, float]], float | None]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8, 5.5 * len(panels)), 3.9), facecolor="white", layout="constrained")
    for axes, (name, (points, in_onnxruntime)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for index, (label, ratio, top1, spread) in enumerate(points):
            colour = BASELINE if index == 0 else OTHERS
            axes.errorbar(ratio, top1, yerr=spread, fmt="s" if index == 0 else "o", color=colour, ecolor="#b9cfe4")
            axes.annotate(label, (ratio, top1), (7, 5), textcoords="offset points", fontsize=8.5, color=colour)
        axes.axhline(points[0][2], color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ratios = [ratio for _, ratio, _, _ in points]
        if in_onnxruntime is not None:
            ratios.append(in_onnxruntime)
            axes.axvline(in_onnxruntime, color="#b4571f", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            place = axes.get_xaxis_transform()
            axes.annotate("dense in onnxruntime", (in_onnxruntime, 0.02), (4, 0), place, "offset points", fontsize=8.5)
        axes.set_xlim(min(ratios) - 0.06, max(ratios) + 0.3)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("images per second in inference, dense = 1")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.figure.axes[0].set_ylabel("top-1, %: mean of the seeds,\nbar: standard deviation")
    figure.savefig(file, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
