"""Tables for a terminal: right-aligned numbers, no colour needed, and only as many columns as there is room for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from experiments.inspection.compare import BlockOverlap, Comparison, Overlap, accuracy_of
from experiments.inspection.contents import Contents, Layer, Part, versions
from experiments.terminal import print_table

PRODUCTS = "(qk, av): queries times keys and attention times values, which have no weights"
BAR = 12
"""Characters that a density of 1 takes."""


@dataclass(frozen=True)
class Column:
    """One column of a table: a heading and a text per row."""

    heading: str
    cells: Sequence[str]
    total: str = ""  #: under the line
    left: bool = False  #: names are, numbers are not
    rank: int = 0  #: where there is no room those of the greatest rank go first; 0 always stays


def print_columns(console: Console, title: str, columns: Iterable[Column]) -> None:
    """A table of those columns that fit side by side and say anything."""
    shown = [column for column in columns if column.rank == 0 or any(column.cells) or column.total]
    table = _table(title, shown)
    while _width(console, table) > console.width and any(column.rank for column in shown):
        last = max(column.rank for column in shown)
        shown = [column for column in shown if column.rank != last]
        table = _table(title, shown)
    console.print()
    console.print(table)


def _width(console: Console, table: Table) -> int:
    """What the table takes if no cell folds."""
    return Measurement.get(console, console.options.update(max_width=100_000), table).maximum


def _table(title: str, columns: Sequence[Column]) -> Table:
    footer = any(column.total for column in columns)
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_footer=footer,
        footer_style="bold",
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(
            Text(column.heading),
            Text(column.total) if footer else "",
            justify="left" if column.left else "right",
            no_wrap=not column.left,
            overflow="fold",
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    return table


def print_contents(console: Console, contents: Contents) -> None:
    """The layers, the blocks, then the totals and where they come from."""
    layers = contents.layers
    utf8 = console.encoding.lower().startswith("utf")
    print_columns(
        console,
        f"{contents.path}: layers",
        [
            Column("layer", [_layer_name(layer) for layer in layers], total="all", left=True),
            Column("shape", [_shape(layer.shape) for layer in layers], rank=2),
            Column("when dense", [_shape(layer.dense_shape) for layer in layers], rank=4),
            *_weights_and_macs(layers, utf8),
        ],
    )
    blocks = [part for part in contents.parts if part.heads is not None]
    if blocks:
        console.print(PRODUCTS, markup=False)
        print_columns(
            console,
            f"{contents.path}: blocks",
            [
                Column("block", [part.name for part in blocks], total="all blocks", left=True),
                Column("heads", [_of(part.heads) for part in blocks], total=_of(_sum(p.heads for p in blocks))),
                Column("neurons", [_of(part.neurons) for part in blocks], total=_of(_sum(p.neurons for p in blocks))),
                Column("tokens", ["" if part.tokens is None else f"{part.tokens:,.1f}" for part in blocks], rank=2),
                *_weights_and_macs(blocks, utf8),
            ],
        )
    print_facts(console, str(contents.path), [*_totals(contents), *_provenance(contents)])


def print_facts(console: Console, title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Names and values."""
    print_table(console, escape(title), [(escape(name), escape(value)) for name, value in facts if value])


def _weights_and_macs(items: Sequence[Layer] | Sequence[Part], utf8: bool) -> list[Column]:
    """Columns that layers and blocks share."""
    live, total = sum(item.live for item in items), sum(item.total for item in items)
    macs, dense_macs = sum(item.macs for item in items), sum(item.dense_macs for item in items)
    return [
        Column("live", [f"{item.live:,}" if item.total else "" for item in items], total=f"{live:,}"),
        Column("of", [f"{item.total:,}" if item.total else "" for item in items], total=f"{total:,}", rank=3),
        Column(
            "density",
            ["" if item.density is None else f"{item.density:.1%}" for item in items],
            total=f"{live / total:.1%}" if total else "",
        ),
        Column("", [bar(item.density, utf8) for item in items], left=True, rank=5),
        Column("MMACs", [_millions(item.macs, macs) for item in items], total=_millions(macs)),
        Column(
            "of dense",
            [_share(item.macs, item.dense_macs) for item in items],
            total=_share(macs, dense_macs),
            rank=1,
        ),
    ]


def _totals(contents: Contents) -> list[tuple[str, str]]:
    info, compact, dense = contents.info, contents.compact, contents.dense
    macs = compact.live_macs
    budget = f"{info.budget} prunable weights"
    if contents.counted is not None:
        met = contents.counted == info.budget.live
        budget += f"; {contents.counted:,} counted, {'exactly the budget' if met else 'NOT the budget'}"
    return [
        ("budget", budget),
        (
            "parameters",
            f"{compact.live_parameters:,} live, {compact.parameters:,} as computed, {dense.parameters:,} dense",
        ),
        (
            "MACs per image",
            f"{_millions(macs)} M live ({_share(macs, dense.macs)} of dense), {_millions(compact.macs)} M as computed "
            f"({_share(compact.macs, dense.macs)}), {_millions(dense.macs)} M dense",
        ),
        # With thresholds the mean over images is not the cost of the mean number of tokens.
        ("at its evaluation", f"{_millions(info.macs)} M live" if abs(info.macs - macs) > 0.005 * macs else ""),
        (
            "file",
            f"{contents.bytes / 1e6:,.3f} MB, {contents.bytes / contents.dense_bytes:.1%} of the dense weights "
            f"({contents.dense_bytes / 1e6:,.3f} MB) in {' and '.join(contents.dtypes)}",
        ),
    ]


def _provenance(contents: Contents) -> list[tuple[str, str]]:
    info = contents.info
    size = " x ".join(map(str, (*as_pair(info.image_size), info.in_chans)))
    metrics = ", ".join(f"{name} {_metric(value)}" for name, value in info.metrics.items())
    known = ", ".join(f"{name.replace('_', ' ')} {version}" for name, version in versions().items())
    return [
        ("model", f"{info.model}{_settings(info.model_args, ' with ')}"),
        ("token selector", "none" if info.selector is None else _settings(info.selector)),
        ("input", f"{size}, mean {_numbers(info.mean)}, std {_numbers(info.std)}"),
        ("pictures", _settings(info.preparation)),
        ("classes", "" if info.class_names is None else f"{len(info.class_names):,}: {_some(info.class_names)}"),
        ("made by", f"recipe {info.recipe or '(unnamed)'}, {info.step:,} steps"),
        ("metrics", metrics or "none"),
        ("read by", known),
    ]


def print_run(console: Console, status: Mapping[str, Any]) -> None:
    """How far a run is: ``status`` as :func:`experiments.inspection.run.to_json` gives it."""
    last, best, updates = status["last"], status["best"], status["updates"]
    total, epochs, score = status["total_steps"], status["epochs"], status["score"]
    length = f"{status['step']:,}" + (f" of {total:,}" if total is not None else "") + " steps"
    length += f" ({epochs:,} epochs)" if epochs is not None and total is not None else ""
    length += f" of {epochs:,} epochs" if epochs is not None and total is None else ""
    if status["finished"]:
        state = f"finished: {length}"
    else:
        share = f", {status['step'] / total:.0%}" if total else ""
        state = f"not finished: {length}{share}; last written {_ago(status['last_written'])}"
    accuracy = "not evaluated yet"
    if last is not None and best is not None:
        accuracy = (
            f"last top-1 {last[score]:.2f} % at step {last['step']:,}; best {best['value']:.2f} % at step "
            f"{best['step']:,} ({len(status['evaluations']):,} evaluations)"
        )
    planned = f" of {updates['planned']:,}" if updates["planned"] is not None else ""
    when = f", the last at step {updates['last_step']:,}" if updates["last_step"] is not None else ""
    loss, done = status["train_loss"], status["finished"] or status["bundle"] is None
    facts = [
        ("recipe", status["recipe"] or ""),
        ("status", state),
        ("accuracy", accuracy),
        ("training loss", "" if loss is None else f"{loss:.4f}"),
        ("mask updates", f"{updates['done']:,}{planned} done{when}"),
        ("dropped steps", f"{status['dropped_steps']:,}"),
        ("checkpoint", f"{status['checkpoint']}" if status["checkpoint"] is not None else "none yet"),
        ("resume bundle", status["bundle"] or "none"),
        ("go on with", "" if done else f"sparse-trainer train --resume {shlex.quote(str(status['folder']))}"),
        *(("note", note) for note in status["notes"]),
    ]
    print_facts(console, f"{status['folder']}: the run", facts)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Masks layer by layer, units block by block, and the two networks beside each other."""
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        console.print(Text(f"{name}  {side.path}"), soft_wrap=True)
    names, found = list(comparison.layers), list(comparison.layers.values())
    print_columns(
        console,
        "masks of A and B in the dense network",
        [
            Column("weight", [name.removesuffix(".weight") for name in names], total="all", left=True),
            *_overlaps([*found, comparison.total]),
        ],
    )
    blocks = comparison.blocks
    if any(item.a < item.total or item.b < item.total for item in _units(blocks)):
        print_columns(
            console,
            "units of A and B",
            [
                Column("block", list(blocks), total="all", left=True),
                *_shared_units("heads", [block.heads for block in blocks.values()], rank=1),
                *_shared_units("neurons", [block.neurons for block in blocks.values()], rank=2),
            ],
        )
    _print_sides(console, comparison.a, comparison.b)
    console.print(
        "IoU: live in both over live in either. random: what two random masks of these densities have on the mean. "
        "differ: weights live in one alone (Hamming distance).",
        markup=False,
    )


def _overlaps(rows: Sequence[Overlap]) -> list[Column]:
    """Columns about masks; the last row stands under the line."""

    def column(heading: str, text: Callable[[Overlap], str], rank: int = 0) -> Column:
        cells = [text(row) for row in rows]
        return Column(heading, cells[:-1], total=cells[-1], rank=rank)

    return [
        column("live A", lambda row: f"{row.a:,}", 3),
        column("live B", lambda row: f"{row.b:,}", 3),
        column("both", lambda row: f"{row.both:,}", 2),
        column("A in B", lambda row: f"{row.share_of_a:.1%}", 4),
        column("IoU", lambda row: f"{row.iou:.1%}"),
        column("random", lambda row: f"{row.random_iou:.1%}"),
        column("differ", lambda row: f"{row.hamming:,}"),
        column("random", lambda row: f"{row.random_hamming:,.0f}"),
    ]


def _shared_units(kind: str, rows: Sequence[Overlap], rank: int) -> list[Column]:
    shared = sum(row.both for row in rows)
    return [
        Column(f"{kind} A", [f"{row.a:,} of {row.total:,}" for row in rows], rank=rank),
        Column(f"{kind} B", [f"{row.b:,} of {row.total:,}" for row in rows], rank=rank),
        Column(f"{kind} in both", [f"{row.both:,}" for row in rows], total=f"{shared:,}"),
        Column("random", [f"{row.random_both:,.1f}" for row in rows], total=f"{sum(r.random_both for r in rows):,.1f}"),
    ]


def _units(blocks: Mapping[str, BlockOverlap]) -> list[Overlap]:
    return [overlap for block in blocks.values() for overlap in (block.heads, block.neurons)]


def _print_sides(console: Console, a: Contents, b: Contents) -> None:
    def row(name: str, text: Callable[[Contents], str], number: Callable[[Contents], float | None], unit: str) -> None:
        first, second = number(a), number(b)
        change = ""
        if first is not None and second is not None:
            change = f"{second - first:+.2f} points" if unit == "points" else _change(first, second)
        if text(a) or text(b):
            rows.append((name, text(a), text(b), change))

    rows: list[tuple[str, str, str, str]] = []
    row("top-1", lambda side: _percent(accuracy_of(side.info)), lambda side: accuracy_of(side.info), "points")
    row("live weights", lambda side: f"{side.info.budget.live:,}", lambda side: side.info.budget.live, "")
    row("density", lambda side: f"{side.info.budget.density:.2%}", lambda side: None, "")
    row("MMACs live", lambda side: _millions(side.compact.live_macs), lambda side: side.compact.live_macs, "")
    row("MMACs as computed", lambda side: _millions(side.compact.macs), lambda side: side.compact.macs, "")
    row("file, MB", lambda side: f"{side.bytes / 1e6:,.3f}", lambda side: side.bytes, "")
    row("steps", lambda side: f"{side.info.step:,}", lambda side: None, "")
    row("recipe", lambda side: side.info.recipe or "(unnamed)", lambda side: None, "")
    names, of_a, of_b, changes = (list(column) for column in zip(*rows, strict=True))
    print_columns(
        console,
        "A and B",
        [Column("", names, left=True), Column("A", of_a), Column("B", of_b), Column("B against A", changes)],
    )


def bar(share: float | None, utf8: bool = True) -> str:
    """A share in 0..1 as a bar of at most :data:`BAR` characters."""
    if share is None:
        return ""
    if not utf8:
        return "#" * round(share * BAR)
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image size."""
    return size if isinstance(size, tuple) else (size, size)


def _layer_name(layer: Layer) -> str:
    return layer.name.removesuffix(".weight") if layer.shape is not None else f"{layer.name} (qk, av)"


def _shape(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))


def _of(counts: tuple[int, int] | None) -> str:
    return "" if counts is None else f"{counts[0]:,} of {counts[1]:,}"


def _sum(counts: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    found = [count for count in counts if count is not None]
    return sum(live for live, _ in found), sum(total for _, total in found)


def _millions(macs: float, greatest: float | None = None) -> str:
    """With as many digits as the greatest of a column."""
    return f"{macs / 1e6:,.{1 if (greatest or macs) >= 1e8 else 2}f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _change(first: float, second: float) -> str:
    return f"{second / first - 1:+.1%}" if first else ""


def _metric(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"


def _settings(values: Mapping[str, Any], before: str = "") -> str:
    """Settings that say something, as in ``keep_ratio 0.5, stages 0``."""
    given = [f"{name} {_setting(value)}" for name, value in values.items() if value is not None]
    return before + ", ".join(given) if given else ""


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _ago(written: str | None) -> str:
    """How long ago a time was."""
    if written is None:
        return "never"
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(written)).total_seconds())
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return f"{seconds:.0f} seconds ago"
