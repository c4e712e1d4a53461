"""What two runs share, as one panel: of each layer the weights that are live in both."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from experiments.inspection.compare import Comparison
from experiments.inspection.panels import LINES, TEXT, plain

TITLE = "Weights live in both runs"
MOST_NAMES = 60
"""Layers that are named one by one; of more, every so many."""


def draw(comparison: Comparison, axes: Axes) -> None:
    """Bars by layer: live in both over live in either, and a line where two random masks would be."""
    layers = list(comparison.layers.items())
    places = range(len(layers))
    axes.bar(places, [found.iou for _, found in layers], color=LINES[2][0], width=0.72, label="these two")
    axes.hlines(
        [found.random_iou for _, found in layers],
        [place - 0.42 for place in places],
        [place + 0.42 for place in places],
        color=LINES[1][0],
        linewidth=1.6,
        label="two random masks",
    )
    every = -(-len(layers) // MOST_NAMES)
    axes.set_xticks(
        list(places)[::every],
        [plain(name.removesuffix(".weight")) for name, _ in layers][::every],
        rotation=90,
        fontsize=TEXT - 1.5,
    )
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("live in both / in either", fontsize=TEXT)
    total = comparison.total
    axes.set_title(
        f"all layers {total.iou:.1%}, at random {total.random_iou:.1%}", loc="right", fontsize=TEXT, color="#333333"
    )
    axes.legend(loc="upper right", fontsize=TEXT, frameon=True, framealpha=0.9, edgecolor="none", ncols=2)
