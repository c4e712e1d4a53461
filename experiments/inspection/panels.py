"""The panels of a run's figure, each drawn on one pair of axes, and which of them a run has data for.

Lines differ in dash and marker as well as in colour, and the colours in lightness, so a print in grey says as much.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import PercentFormatter

from experiments.inspection.run import Run
from sparse_trainer.mask_log import MaskRecord
from sparse_trainer.report import MaskUpdate

HEIGHT = 2.15  #: of a panel, inches
TEXT = 8.5  #: points

LINES: tuple[tuple[str, Any, str], ...] = (
    ("#0b2545", "-", "o"),
    ("#a4243b", "--", "s"),
    ("#4b9cc4", "-.", "^"),
    ("#e09f3e", (0, (1, 1.2)), "D"),
    ("#5f8f4e", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
    ("#8d6a9f", (0, (3, 1.5)), "P"),
)
"""Colour, dash and marker of the first, second, ... line of a panel."""
LINE: dict[str, Any] = {"linewidth": 1.4, "markersize": 3.5, "clip_on": False}
KINDS = {"weights": LINES[0], "heads": LINES[1], "neurons": LINES[2]}
DORMANT, LIVE = "#d8dce3", "#16446b"

End = tuple[str, float, str]
"""Name of a line, where it ends, and its colour."""
Draw = Callable[[Axes], Sequence[End]]
"""Draws a panel; returns the ends of lines that are to be named at the right, once the scale is settled."""

ACCURACY, LOSS, MACS = "Accuracy", "Loss", "MACs of one image"
DENSITY, CHURN, EXPLORATION = "Density by layer", "Churn of each update", "Exploration rate"
TOKENS, HEADS = "Patches kept", "Live heads"
ORDER = (ACCURACY, LOSS, DENSITY, CHURN, EXPLORATION, TOKENS, MACS, HEADS)


def panels(run: Run) -> dict[str, Draw]:
    """What there is to draw of a run, by title; panels without data are left out."""
    series = run.series
    updates = [record for record in run.timeline if record.update is not None]
    found: dict[str, Draw] = {}
    if series.get("eval/top1"):
        found[ACCURACY] = partial(_accuracy, run)
    if series.get("train/loss") or series.get("eval/loss"):
        found[LOSS] = partial(_loss, run)
    if any(record.update is not None and record.update.layers for record in updates):
        found[DENSITY] = partial(_density, run)
    churn, exploration = _churn(updates), _exploration(updates)
    if churn:
        found[CHURN] = partial(_draw_churn, churn, updates)
    if exploration:
        found[EXPLORATION] = partial(_draw_exploration, exploration, run.step)
    if any(tag.startswith(("tokens/kept/", "eval/tokens_kept/")) for tag in series):
        found[TOKENS] = partial(_tokens, run)
    macs = [value for _, value in series.get("budget/macs", [])]
    if macs and max(macs) > 1.005 * min(macs):
        found[MACS] = partial(_macs, run)
    if lanes_of(run):
        found[HEADS] = partial(_heads, run)
    return found


def _accuracy(run: Run, axes: Axes) -> Sequence[End]:
    curves = {"top-1": run.series["eval/top1"]}
    if run.series.get("eval/ema_top1"):
        curves = {"average": run.series["eval/ema_top1"], "weights": curves["top-1"]}
    ends = []
    for (name, points), (colour, dash, marker) in zip(curves.items(), LINES, strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, linestyle=dash, marker=marker, **LINE)
        ends.append((f"{name} {values[-1]:.2f}" if len(curves) > 1 else f"{values[-1]:.2f}", values[-1], colour))
    axes.set_ylabel("top-1, %")
    _grid(axes)
    return ends


def _loss(run: Run, axes: Axes) -> Sequence[End]:
    ends = []
    for name, tag, (colour, dash, marker) in (
        ("training", "train/loss", LINES[0]),
        ("evaluation", "eval/ema_loss" if run.score == "eval/ema_top1" else "eval/loss", LINES[1]),
    ):
        if run.series.get(tag):
            steps, values = zip(*run.series[tag], strict=True)
            dots = marker if tag.startswith("eval") or len(steps) == 1 else ""
            axes.plot(steps, values, color=colour, linestyle=dash, marker=dots, **LINE)
            ends.append((f"{name} {values[-1]:.2f}", values[-1], colour))
    axes.set_ylabel("loss")
    _grid(axes)
    return ends


def _density(run: Run, axes: Axes) -> Sequence[End]:
    """A thick line per kind of layer, the mean of its blocks, which are the thin ones."""
    found = [(record.step, shares) for record in run.timeline if (shares := _densities(record))]
    steps = [step for step, _ in found]
    kinds: dict[str, list[list[float]]] = {}
    for name in found[-1][1]:
        values = [shares.get(name, 0.0) for _, shares in found]
        kinds.setdefault(kind_of(name), []).append([*values, values[-1]])
    steps.append(max(run.step, steps[-1]))
    ends = []
    for index, (kind, layers) in enumerate(kinds.items()):
        colour, dash, _ = LINES[index % len(LINES)]
        mean = np.mean(layers, axis=0)
        for block in layers if len(layers) > 1 else ():
            axes.plot(steps, block, color=colour, linewidth=0.6, alpha=0.45, drawstyle="steps-post")
        axes.plot(steps, mean, color=colour, linestyle=dash, linewidth=1.6, drawstyle="steps-post")
        ends.append((kind, float(mean[-1]), colour))
    structured = any(record.live_heads or record.live_neurons for record in run.timeline)
    axes.set_ylabel("live / weights of live units" if structured else "live / all weights")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _grid(axes)
    return ends


def _densities(record: MaskRecord) -> dict[str, float]:
    """By weight: from the report of the update, or counted on the first masks."""
    if record.update is not None:
        return {name: layer.density for name, layer in record.update.layers.items()}
    return {name: float(mask.count_nonzero()) / max(mask.numel(), 1) for name, mask in record.masks().items()}


def kind_of(name: str) -> str:
    """What a weight is called in every block: ``attn.qkv`` for ``blocks.3.attn.qkv.weight``."""
    return re.sub(r"^(?:\w+\.)*?\w+\.\d+\.", "", name.removesuffix(".weight"))


Points = list[tuple[int, float]]


def _churn(updates: Sequence[MaskRecord]) -> dict[str, Points]:
    """Weights, heads and neurons that changed sides over those that are live, at each update.

    One that dies and one that takes its place are two, as in :attr:`MaskUpdate.churn`.
    """
    found: dict[str, Points] = {}
    for record in updates:
        update = record.update
        assert update is not None
        if update.layers:
            found.setdefault("weights", []).append((record.step, update.churn))
        for units in _units(update):
            changed = 2 * sum(units.added) / sum(units.live)
            found.setdefault(units.kind, []).append((record.step, changed))
    return found


def _exploration(updates: Sequence[MaskRecord]) -> dict[str, Points]:
    """Share of weights, heads and neurons that were live at any time so far."""
    found: dict[str, Points] = {}
    for record in updates:
        update = record.update
        assert update is not None
        if update.layers:
            found.setdefault("weights", []).append((record.step, update.exploration_rate))
        for units in _units(update):
            found.setdefault(units.kind, []).append((record.step, sum(units.explored) / sum(units.all)))
    return found


@dataclass(frozen=True)
class _Units:
    """Heads or neurons, a number per block."""

    kind: str
    all: list[int]
    live: list[int]
    added: list[int]
    explored: list[int]


def _units(update: MaskUpdate) -> list[_Units]:
    """Those kinds of which some are dormant."""
    blocks = list(update.blocks.values())
    found = [
        _Units(
            "heads",
            [block.heads for block in blocks],
            [len(block.live_heads) for block in blocks],
            [len(block.heads_added) for block in blocks],
            [block.explored_heads for block in blocks],
        ),
        _Units(
            "neurons",
            [block.neurons for block in blocks],
            [block.live_neurons for block in blocks],
            [len(block.neurons_added) for block in blocks],
            [block.explored_neurons for block in blocks],
        ),
    ]
    return [units for units in found if sum(units.live) < sum(units.all)]


def _draw_churn(curves: Mapping[str, Points], updates: Sequence[MaskRecord], axes: Axes) -> Sequence[End]:
    """Heads are few and change by leaps, so theirs are spikes."""
    for name, points in curves.items():
        (colour, dash, marker), (steps, values) = KINDS[name], zip(*points, strict=True)
        if name == "heads":
            dash = ""
            if any(values):
                steps, values = zip(*(point for point in points if point[1]), strict=True)
            axes.vlines(steps, 0, values, color=colour, linewidth=1.0)
        every = _some_markers(steps)
        axes.plot(steps, values, color=colour, linestyle=dash, marker=marker, markevery=every, label=name, **LINE)
    allowed = [2 * record.update.drop_fraction for record in updates if record.update is not None]
    axes.plot([record.step for record in updates], allowed, color="#777777", linestyle=":", label="2 x drop fraction")
    axes.set_ylabel("changed sides / live")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper right", fontsize=TEXT, frameon=False, handlelength=2.8)
    _grid(axes)
    return []


def _draw_exploration(curves: Mapping[str, Points], step: int, axes: Axes) -> Sequence[End]:
    ends = []
    for name, points in curves.items():
        (colour, dash, marker), (steps, values) = KINDS[name], zip(*points, strict=True)
        axes.plot(steps, values, color=colour, linestyle=dash, marker=marker, markevery=_some_markers(steps), **LINE)
        axes.plot([steps[-1], max(step, steps[-1])], [values[-1]] * 2, color=colour, linestyle=dash, linewidth=1.4)
        ends.append((f"{name} {values[-1]:.0%}", values[-1], colour))
    axes.set_ylabel("ever live / all")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _grid(axes)
    return ends


def _tokens(run: Run, axes: Axes) -> Sequence[End]:
    """A line per stage: mean patches kept in training, and dots where it was evaluated."""
    ends = []
    stages = sorted({int(tag.rsplit("/", 1)[1]) for tag in run.series if re.fullmatch(r".*tokens.kept/\d+", tag)})
    most = 0.0
    for index, stage in enumerate(stages):
        colour, dash, marker = LINES[index % len(LINES)]
        training = run.series.get(f"tokens/kept/{stage}", [])
        evaluated = run.series.get(f"eval/tokens_kept/{stage}", [])
        for points, look in ((training, {"linestyle": dash}), (evaluated, {"linestyle": "", "marker": marker})):
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, **look, **LINE)
                most = max(most, *(value for _, value in points))
        last = (evaluated or training)[-1][1]
        ends.append((f"before block {stage}: {last:.1f}", last, colour))
    axes.set_ylabel("mean of an image")
    axes.set_ylim(0, 1.08 * max(most, 1.0))
    _grid(axes)
    return ends


def _macs(run: Run, axes: Axes) -> Sequence[End]:
    steps, values = zip(*run.series["budget/macs"], strict=True)
    millions = [value / 1e6 for value in values]
    axes.plot([*steps, max(run.step, steps[-1])], [*millions, millions[-1]], color=LINES[0][0], linewidth=1.4)
    axes.set_ylabel("live, millions")
    axes.set_ylim(bottom=0, top=1.08 * max(millions))
    _grid(axes)
    return [(f"{millions[-1]:,.2f}", millions[-1], LINES[0][0])]


def lanes_of(run: Run) -> list[tuple[str, int]]:
    """(block, head) of the head map from the top; empty where no head is dormant or nothing was updated."""
    last = next((record.update for record in reversed(run.timeline) if record.update is not None), None)
    if last is None or not any(len(block.live_heads) < block.heads for block in last.blocks.values()):
        return []
    return [(name, head) for name, block in last.blocks.items() for head in range(block.heads)]


def _heads(run: Run, axes: Axes) -> Sequence[End]:
    """A lane per head, from left to right over the run: dark while it is live."""
    lanes = lanes_of(run)
    records = [record for record in run.timeline if record.live_heads]
    live = np.array([[head in record.live_heads.get(name, ()) for record in records] for name, head in lanes])
    edges = [record.step for record in records]
    end = max(run.step, edges[-1] + 1)
    axes.pcolormesh(
        [*edges, end],
        np.arange(len(lanes) + 1),
        live.astype(float),
        cmap=ListedColormap([DORMANT, LIVE]),
        vmin=0,
        vmax=1,
        edgecolors="none",
        rasterized=True,
    )
    for lane in range(1, len(lanes)):
        border = lanes[lane][0] != lanes[lane - 1][0]
        axes.axhline(lane, color="white", linewidth=3.5 if border else 0.5)
    names = list(dict.fromkeys(name for name, _ in lanes))
    rows = [np.mean([row + 0.5 for row, (block, _) in enumerate(lanes) if block == name]) for name in names]
    axes.set_yticks(rows, [plain(name.rsplit(".", 1)[-1]) for name in names])
    axes.set_ylim(len(lanes), 0)
    axes.set_ylabel("block, a lane per head")
    axes.annotate(
        "dark: live    light: dormant",
        (1, 1),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        fontsize=TEXT,
        color="#444444",
    )
    return []


def _some_markers(points: Sequence[object]) -> int:
    """Of how many points one gets a marker, so that a long run's do not hide its line."""
    return 1 + len(points) // 30


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Name lines at their right ends, apart from each other where they end together."""
    low, high = axes.get_ylim()
    gap = (TEXT + 1.5) / (72 * (HEIGHT - 0.55))
    order = sorted(ends, key=lambda end: end[1])
    for (name, _, colour), place in zip(
        order, spread([(value - low) / (high - low) for _, value, _ in order], gap), strict=True
    ):
        axes.annotate(
            plain(name),
            (1, place),
            xytext=(7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=TEXT,
            color=colour,
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in 0..1, moved apart to at least ``gap``, and kept below 1 where there is room."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else place)
    limit = 1.0
    for index in reversed(range(len(found))):
        found[index] = min(found[index], limit)
        limit = found[index] - gap
    return found


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return "".join(character for character in text if character.isprintable() or character == "\n").replace("$", r"\$")
